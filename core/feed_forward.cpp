#include "core/feed_forward.h"

#include "core/error.h"

#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>

namespace moelab {

Activation activation_named(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "swiglu") return Activation::kSwiglu;
  check_invariant(name == "relu", "'" + name + "' is no activation");
  return Activation::kRelu;
}

std::vector<std::string> FeedForwardForm::maps() const {
  if (gated()) return {"w_gate", "w_up", "w_down"};
  return {"w_in", "w_out"};
}

std::vector<LinearShape> FeedForwardForm::shapes(int64_t width, int64_t hidden) const {
  std::vector<LinearShape> all;
  for (const std::string& name : maps()) all.push_back({name, width, hidden});
  all.back() = {all.back().name, hidden, width};
  return all;
}

Tensor FeedForwardForm::activated(const Tensor& rows) const {
  switch (activation_) {
    case Activation::kGelu: return at::gelu(rows);
    case Activation::kGeluTanh: return at::gelu(rows, "tanh");
    case Activation::kSwiglu: return at::silu(rows);
    default: return at::relu(rows);
  }
}

DenseMaps::DenseMaps(const ExpertBank& bank, Activation activation) : form_(activation) {
  const std::vector<NamedTensor> stacked = bank.groups().at(0).stacked;
  const auto named = [&](const std::string& name) {
    for (const NamedTensor& entry : stacked)
      if (entry.name == name) return entry.tensor;
    return Tensor();
  };
  for (const std::string& name : form_.maps()) {
    weight_1OI_.push_back(named(name));
    bias_1O_.push_back(named("b" + name.substr(1)));
    check_invariant(weight_1OI_.back().defined(), "experts '" + bank.name() + "' have no linear map '" + name + "'");
  }
}

Tensor DenseMaps::weight_OI(size_t map) const { return weight_1OI_.at(map).select(0, 0); }

Tensor DenseMaps::without_bias(size_t map, const Tensor& rows) const { return at::linear(rows, weight_OI(map)); }

Tensor DenseMaps::linear(size_t map, const Tensor& rows) const {
  return bias_1O_[map].defined() ? at::linear(rows, weight_OI(map), bias_1O_[map].select(0, 0)) : without_bias(map, rows);
}

Tensor DenseMaps::operator()(const Tensor& x) const {
  const auto map = [&](size_t i, const Tensor& rows) { return linear(i, rows); };
  return linear(form_.last(), form_.hidden(x, map));
}

}  // namespace moelab
