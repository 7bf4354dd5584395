#include "core/module.h"

#include "core/error.h"

namespace moelab {
namespace {

void append(std::vector<NamedTensor>& out, const std::string& prefix, const std::vector<NamedTensor>& more) {
  for (const NamedTensor& entry : more) out.push_back({prefix + entry.name, entry.tensor});
}

void refuse_duplicate(const std::vector<NamedTensor>& have, const std::string& name) {
  for (const NamedTensor& entry : have) check_invariant(entry.name != name, "tensor '" + name + "' registered twice");
}

// A child without a name is a part of its parent: its tensors are named as the parent's own.
std::string below(const std::string& prefix, const std::string& child) { return child.empty() ? prefix : prefix + child + "."; }

}  // namespace

Module::~Module() = default;

Tensor Module::add_parameter(const std::string& name, Tensor value, bool trainable) {
  refuse_duplicate(parameters_, name);
  check_invariant(value.is_contiguous(), "parameter '" + name + "' is not contiguous");  // the fused optimiser walks memory
  value.requires_grad_(trainable);
  parameters_.push_back({name, value});
  return value;
}

Tensor Module::add_buffer(const std::string& name, Tensor value) {
  refuse_duplicate(buffers_, name);
  buffers_.push_back({name, value});
  return value;
}

void Module::add_child(const std::string& name, std::shared_ptr<Module> child) {
  children_.push_back({name, std::move(child)});
}

std::vector<NamedTensor> Module::parameters(const std::string& prefix) const {
  std::vector<NamedTensor> all;
  append(all, prefix, parameters_);
  for (const Child& child : children_) append(all, "", child.module->parameters(below(prefix, child.name)));
  return all;
}

std::vector<NamedTensor> Module::buffers(const std::string& prefix) const {
  std::vector<NamedTensor> all;
  append(all, prefix, buffers_);
  for (const Child& child : children_) append(all, "", child.module->buffers(below(prefix, child.name)));
  return all;
}

std::vector<NamedTensor> Module::trainable(const std::string& prefix) const {
  std::vector<NamedTensor> moving;
  for (NamedTensor& entry : parameters(prefix))
    if (entry.tensor.requires_grad()) moving.push_back(std::move(entry));
  return moving;
}

int64_t Module::parameter_count() const {
  int64_t count = 0;
  for (const NamedTensor& entry : parameters()) count += entry.tensor.numel();
  return count;
}

void Module::zero_grad() const {
  for (const NamedTensor& entry : parameters()) entry.tensor.mutable_grad() = Tensor();
}

}  // namespace moelab
