// A feed-forward layer as linear maps with an activation between them, so that something may be laid on each map.
#pragma once

#include "core/expert.h"

#include <string>
#include <vector>

namespace moelab {

enum class Activation { kRelu, kGelu, kGeluTanh, kSwiglu };
Activation activation_named(const std::string& name);  // as [moe.expert] names them

//   relu, gelu, gelu_tanh:  y = out · act(in · x)        swiglu:  y = down · (silu(gate · x) ∘ (up · x))
class FeedForwardForm {
 public:
  explicit FeedForwardForm(Activation activation) : activation_(activation) {}

  // "w_in", "w_out", or "w_gate", "w_up", "w_down": in the order in which they are applied.
  std::vector<std::string> maps() const;
  std::vector<LinearShape> shapes(int64_t width, int64_t hidden) const;
  size_t last() const { return gated() ? 2 : 1; }

  // What the last map reads. linear(i, rows) is map i of the rows.
  template <class Linear>
  Tensor hidden(const Tensor& x, Linear linear) const {
    const Tensor first = activated(linear(0, x));
    return gated() ? first.mul(linear(1, x)) : first;
  }

 private:
  bool gated() const { return activation_ == Activation::kSwiglu; }
  Tensor activated(const Tensor& rows) const;
  Activation activation_;
};

// The maps of a dense layer, a bank of one feed-forward expert with parameters named as above, biases "b_…".
class DenseMaps {
 public:
  DenseMaps(const ExpertBank& bank, Activation activation);

  const FeedForwardForm& form() const { return form_; }
  Tensor weight_OI(size_t map) const;
  Tensor linear(size_t map, const Tensor& rows) const;  // with its bias
  Tensor without_bias(size_t map, const Tensor& rows) const;
  Tensor operator()(const Tensor& x) const;  // the whole layer

 private:
  FeedForwardForm form_;
  std::vector<Tensor> weight_1OI_, bias_1O_;
};

}  // namespace moelab
