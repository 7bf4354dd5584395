#include "trainers/optimizer.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

namespace moelab {
namespace {

bool contains(const std::string& name, const char* part) { return name.find(part) != std::string::npos; }

// Weight decay is for matrices that multiply activations.
double decay_of(const NamedTensor& parameter, double weight_decay) {
  const bool exempt = parameter.tensor.dim() < 2 || contains(parameter.name, "embedding") || contains(parameter.name, ".router.");
  return exempt ? 0 : weight_decay;
}

// The fused kernels walk memory linearly and refuse missing gradients.
Tensor usable_gradient(const Tensor& parameter) {
  const Tensor gradient = parameter.grad();
  return gradient.defined() ? gradient.contiguous() : at::zeros_like(parameter);
}

// What the slice is of the parameter, of a tensor laid out alike (a moment): stacked rows may be a view of the parameter.
Tensor same_part(const Tensor& tensor, const ExpertBank::Slice& slice) {
  const Tensor part = slice.view();
  return tensor.as_strided(part.sizes(), part.strides(), part.storage_offset() - slice.stacked.storage_offset() +
                                                             tensor.storage_offset());
}

struct SavedSlice {
  Tensor live;
  Tensor copy;
};

}  // namespace

Optimizer::Optimizer(const OptimizerSettings& settings, std::vector<NamedTensor> parameters) : settings_(settings) {
  for (NamedTensor& parameter : parameters) {
    check_invariant(parameter.tensor.is_contiguous(), "parameter '" + parameter.name + "' is not contiguous");
    Entry entry{parameter.name, parameter.tensor, at::zeros_like(parameter.tensor), {}, at::zeros({}, at::kFloat),
                contains(parameter.name, ".router.") ? settings.router_lr_scale : 1, decay_of(parameter, settings.weight_decay)};
    if (settings.name == "adamw") entry.second = at::zeros_like(parameter.tensor);
    entries_.push_back(std::move(entry));
  }
}

Optimizer::Entry& Optimizer::entry_of(const Tensor& stacked) {
  for (Entry& entry : entries_)
    if (entry.parameter.is_alias_of(stacked)) return entry;
  check_invariant(false, "surgery on a parameter that the optimiser does not know");
  return entries_.front();
}

std::map<Optimizer::Group, std::vector<Optimizer::Entry*>> Optimizer::active_groups() {
  std::map<Group, std::vector<Entry*>> groups;
  for (Entry& entry : entries_)
    if (entry.parameter.requires_grad()) groups[{entry.lr_scale, entry.weight_decay}].push_back(&entry);
  return groups;
}

void Optimizer::step(double lr, const std::vector<ExpertBank::Slice>& untouched) {
  const at::NoGradGuard no_grad;
  std::vector<SavedSlice> saved;
  for (const ExpertBank::Slice& slice : untouched) {
    Entry& entry = entry_of(slice.stacked);
    for (const Tensor& tensor : {entry.parameter, entry.first, entry.second})
      if (tensor.defined()) saved.push_back({same_part(tensor, slice), same_part(tensor, slice).clone()});
  }
  for (const auto& [group, entries] : active_groups()) {
    if (settings_.name == "adamw") update_adamw(entries, lr);
    else update_sgd(entries, lr);
  }
  for (const SavedSlice& slice : saved) slice.live.copy_(slice.copy);
}

void Optimizer::update_adamw(const std::vector<Entry*>& entries, double lr) {
  std::vector<Tensor> parameters, gradients, first, second, updates;
  for (Entry* entry : entries) {
    parameters.push_back(entry->parameter);
    gradients.push_back(usable_gradient(entry->parameter));
    first.push_back(entry->first);
    second.push_back(entry->second);
    updates.push_back(entry->updates);
  }
  at::_foreach_add_(updates, 1);
  at::_fused_adamw_(parameters, gradients, first, second, {}, updates, lr * entries.front()->lr_scale, settings_.beta1,
                    settings_.beta2, entries.front()->weight_decay, settings_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
}

void Optimizer::update_sgd(const std::vector<Entry*>& entries, double lr) {
  std::vector<Tensor> parameters, gradients, momentum, updates;
  for (Entry* entry : entries) {
    parameters.push_back(entry->parameter);
    gradients.push_back(usable_gradient(entry->parameter));
    momentum.push_back(entry->first);
    updates.push_back(entry->updates);
  }
  at::_foreach_add_(updates, 1);
  // Momentum starts at zero, so the first step is no special case (is_first_step only saves a multiplication).
  at::_fused_sgd_(parameters, gradients, momentum, entries.front()->weight_decay, settings_.momentum,
                  lr * entries.front()->lr_scale, /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false,
                  /*is_first_step=*/false);
}

void Optimizer::reset_slice(const ExpertBank::Slice& slice) {
  const at::NoGradGuard no_grad;
  Entry& entry = entry_of(slice.stacked);
  for (const Tensor& moment : {entry.first, entry.second})
    if (moment.defined()) same_part(moment, slice).zero_();
}

void Optimizer::copy_slice(const ExpertBank::Slice& from, const ExpertBank::Slice& to) {
  const at::NoGradGuard no_grad;
  const Entry& source = entry_of(from.stacked);
  const Entry& target = entry_of(to.stacked);
  same_part(target.first, to).copy_(same_part(source.first, from));
  if (source.second.defined()) same_part(target.second, to).copy_(same_part(source.second, from));
}

std::vector<Tensor> Optimizer::moments(const ExpertBank::Slice& slice) const {
  std::vector<Tensor> parts;
  for (const Entry& entry : entries_) {
    if (!entry.parameter.is_alias_of(slice.stacked)) continue;
    for (const Tensor& moment : {entry.first, entry.second})
      if (moment.defined()) parts.push_back(same_part(moment, slice));
  }
  return parts;
}

std::vector<NamedTensor> Optimizer::state() const {
  std::vector<NamedTensor> all;
  for (const Entry& entry : entries_) {
    all.push_back({"m." + entry.name, entry.first});
    if (entry.second.defined()) all.push_back({"v." + entry.name, entry.second});
    all.push_back({"step." + entry.name, entry.updates});
  }
  return all;
}

double gradient_norm(const std::vector<NamedTensor>& parameters) {
  std::vector<Tensor> gradients;
  for (const NamedTensor& parameter : parameters)
    if (parameter.tensor.grad().defined()) gradients.push_back(parameter.tensor.grad());
  if (gradients.empty()) return 0;
  double sum = 0;
  for (const Tensor& norm : at::_foreach_norm(gradients)) {
    const double value = norm.item<double>();
    sum += value * value;
  }
  return std::sqrt(sum);
}

void clip_gradients(const std::vector<NamedTensor>& parameters, double norm, double limit) {
  if (limit <= 0 || norm <= limit) return;
  std::vector<Tensor> gradients;
  for (const NamedTensor& parameter : parameters)
    if (parameter.tensor.grad().defined()) gradients.push_back(parameter.tensor.grad());
  at::_foreach_mul_(gradients, limit / norm);
}

}  // namespace moelab
