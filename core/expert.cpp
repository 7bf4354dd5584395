#include "core/expert.h"

#include "core/error.h"
#include "core/registry_impl.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

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

Tensor ExpertBank::forward_expert(int64_t, const std::vector<Tensor>& parameters, const Tensor& rows_ND) const {
  return forward_with(parameters, rows_ND);
}

std::string ExpertBank::refuses(PlanForm form) const {
  if (stages() != 1)
    return fmt::format("experts '{}' work in {} stages around code of their module; place them in a site that runs the stages "
                       "itself", name_, stages());
  if (form != PlanForm::kMerge) return "";
  if (groups_.size() > 1)
    return fmt::format("the experts of '{}' form {} groups of different kinds or shapes, whose parameters have no mean; use "
                       "experts of one kind and width", name_, groups_.size());
  if (groups_.front().stacked.empty()) return fmt::format("experts '{}' have no parameters that could be mixed", name_);
  return has_forward_with() ? "" : fmt::format("experts '{}' cannot run with mixed parameters", name_);
}

std::vector<Tensor> ExpertBank::merge(const Tensor& alpha_E) const {
  std::vector<Tensor> merged;
  for (const NamedTensor& entry : only_group("merge").stacked) merged.push_back(mixed_parameter(entry.tensor, alpha_E));
  return merged;
}

Tensor ExpertBank::base_output(const Tensor&) const { return {}; }

Tensor ExpertBank::run(const Plan&, const ExecuteInput&) const { return {}; }

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

bool ExpertBank::alike(int64_t expert, int64_t other) const {
  const ExpertGroup &a = group_of(expert), &b = group_of(other);
  return a.kind == b.kind && std::equal(a.stacked.begin(), a.stacked.end(), b.stacked.begin(), b.stacked.end(),
                                        [](const NamedTensor& x, const NamedTensor& y) {
                                          return x.name == y.name &&
                                                 without_expert_axis(x.tensor) == without_expert_axis(y.tensor);
                                        });
}

void ExpertBank::require_alike(const char* purpose, int64_t from, int64_t to) const {
  if (!alike(from, to))
    usage_error(
        fmt::format("{}: experts {} and {} of '{}' differ in kind or shape; stay within a group", purpose, from, to, name_));
}

void ExpertBank::clone_expert(int64_t from, int64_t to) {
  const at::NoGradGuard no_grad;
  require_alike("clone", from, to);
  const std::vector<Slice> source = slices(from), target = slices(to);
  for (size_t i = 0; i < source.size(); ++i) target[i].view().copy_(source[i].view());
}

void ExpertBank::permute(const std::vector<int64_t>& old_of_new) {
  const at::NoGradGuard no_grad;
  require_permutation(old_of_new, experts());
  std::vector<std::vector<Tensor>> before(old_of_new.size());
  for (int64_t e = 0; e < experts(); ++e) {
    const int64_t source = old_of_new[static_cast<size_t>(e)];
    require_alike("permute", source, e);
    for (const Slice& slice : slices(source)) before[static_cast<size_t>(e)].push_back(slice.view().clone());
  }
  for (int64_t e = 0; e < experts(); ++e) {
    const std::vector<Slice> target = slices(e);
    for (size_t i = 0; i < target.size(); ++i) target[i].view().copy_(before[static_cast<size_t>(e)][i]);
  }
}

template class Registry<ExpertEntry>;

int64_t hidden_width(int64_t asked, int64_t model_width) { return asked > 0 ? asked : 4 * model_width; }

}  // namespace moelab
