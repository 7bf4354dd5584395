#include "core/expert.h"

#include "core/error.h"
#include "core/registry_impl.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace moelab {
namespace {

std::vector<int64_t> without_expert_axis(const Tensor& stacked) {
  return {stacked.sizes().begin() + 1, stacked.sizes().end()};
}

// alpha_E · stacked, with the expert axis contracted.
Tensor mixed_parameter(const Tensor& stacked, const Tensor& alpha_E) {
  const Tensor flat_EP = stacked.view({stacked.size(0), -1});
  return alpha_E.to(stacked.scalar_type()).unsqueeze(0).matmul(flat_EP).view(without_expert_axis(stacked));
}

void require_permutation(const std::vector<int64_t>& order, int64_t experts) {
  std::vector<bool> seen(static_cast<size_t>(experts), false);
  check_invariant(static_cast<int64_t>(order.size()) == experts, "permute: one entry per expert expected");
  for (const int64_t old : order) {
    check_invariant(old >= 0 && old < experts && !seen[static_cast<size_t>(old)], "permute: not a permutation of the experts");
    seen[static_cast<size_t>(old)] = true;
  }
}

}  // namespace

ExpertBank::~ExpertBank() = default;

int64_t ExpertBank::experts() const {
  int64_t count = 0;
  for (const ExpertGroup& group : groups_) count += group.experts;
  return count;
}

const ExpertGroup& ExpertBank::group_of(int64_t expert) const {
  for (const ExpertGroup& group : groups_)
    if (expert >= group.first && expert < group.first + group.experts) return group;
  throw Error(ExitCode::kBug, "expert " + std::to_string(expert) + " of a bank of " + std::to_string(experts()));
}

const ExpertGroup& ExpertBank::only_group(const char* purpose) const {
  if (groups_.size() != 1)
    usage_error(std::string(purpose) + ": the experts of '" + name_ + "' form " + std::to_string(groups_.size()) +
                " groups of different shapes; use experts of one kind and width");
  return groups_.front();
}

Tensor ExpertBank::forward_layer(const ExpertContext&) const { return {}; }

Tensor ExpertBank::forward_with(const std::vector<Tensor>&, const Tensor&) const {
  usage_error("experts '" + name_ + "' cannot run with merged parameters; use experts of one group and one stage");
}

std::vector<Tensor> ExpertBank::merge(const Tensor& alpha_E) const {
  std::vector<Tensor> merged;
  for (const NamedTensor& entry : only_group("merge").stacked) merged.push_back(mixed_parameter(entry.tensor, alpha_E));
  return merged;
}

Tensor ExpertBank::Slice::view() const { return stacked.select(0, slot); }

std::vector<ExpertBank::Slice> ExpertBank::slices(int64_t expert) const {
  const ExpertGroup& group = group_of(expert);
  std::vector<Slice> found;
  for (const NamedTensor& entry : group.stacked) found.push_back({entry.tensor, expert - group.first});
  return found;
}

std::vector<Tensor> ExpertBank::parameters_of(int64_t expert) const {
  std::vector<Tensor> views;
  for (const Slice& slice : slices(expert)) views.push_back(slice.view());
  return views;
}

int64_t ExpertBank::parameters_per_expert(int64_t expert) const {
  int64_t count = 0;
  for (const Slice& slice : slices(expert)) count += slice.stacked.numel() / slice.stacked.size(0);
  return count;
}

void ExpertBank::clone_expert(int64_t from, int64_t to) {
  const at::NoGradGuard no_grad;
  const std::vector<Slice> source = slices(from), target = slices(to);
  const bool alike = source.size() == target.size() &&
                     std::equal(source.begin(), source.end(), target.begin(), [](const Slice& a, const Slice& b) {
                       return without_expert_axis(a.stacked) == without_expert_axis(b.stacked);
                     });
  if (!alike)
    usage_error("clone: experts " + std::to_string(from) + " and " + std::to_string(to) + " of '" + name_ +
                "' differ in shape; clone within a group");
  for (size_t i = 0; i < source.size(); ++i) target[i].view().copy_(source[i].view());
}

void ExpertBank::permute(const std::vector<int64_t>& old_of_new) {
  const at::NoGradGuard no_grad;
  const ExpertGroup& group = only_group("permute");
  require_permutation(old_of_new, group.experts);
  for (const NamedTensor& entry : group.stacked) {
    const Tensor before = entry.tensor.clone();
    for (int64_t slot = 0; slot < group.experts; ++slot)
      entry.tensor.select(0, slot).copy_(before.select(0, old_of_new[static_cast<size_t>(slot)]));
  }
}

template class Registry<ExpertEntry>;

int64_t hidden_width(int64_t asked, int64_t model_width) { return asked > 0 ? asked : 4 * model_width; }

std::unique_ptr<ExpertBank> make_experts(const std::string& name, ExpertSpec spec) {
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(name);
  std::unique_ptr<ExpertBank> bank = entry.make(std::move(spec));
  bank->set_name(entry.name);
  return bank;
}

}  // namespace moelab
