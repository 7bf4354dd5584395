// Linear maps with one matrix per group of consecutive rows: the arithmetic of every bank of stacked experts.
#pragma once

#include "core/tensor.h"

namespace moelab {

// The products that grouped_linear is made of: one matrix product per expert; the library's grouped product; one batched product
// over rows padded to the longest group. kAuto takes the batched one where all groups are equally long and short, else the loop.
// Where the library's rules (dtype, strides of 16 bytes) or the padding (more than twice the rows) forbid a kind, it is the loop.
// kReference is a linear layer per expert that autograd differentiates by itself: what the others are tested against.
enum class GroupedProduct { kAuto, kLoop, kGrouped, kBmm, kReference };

// The kind that `execution` asks for (core/execute.h).
enum class Execution : int;
GroupedProduct product_of(Execution execution);

// The kind for the calls of this thread, as autocast is; restored when the guard goes.
class GroupedProductGuard {
 public:
  explicit GroupedProductGuard(GroupedProduct product);
  ~GroupedProductGuard();
  GroupedProductGuard(const GroupedProductGuard&) = delete;
  GroupedProductGuard& operator=(const GroupedProductGuard&) = delete;

 private:
  GroupedProduct before_;
};
GroupedProduct grouped_product();

// What autocast does for a linear layer: weights are cast once per step, gradients come back in the parameter's dtype.
Tensor autocast_operand(const Tensor& tensor);

// y[n] = weight[e]·x[n] (+ bias[e]) for the rows n in [offsets[e], offsets[e+1]). One matrix product per expert that has rows.
// The gradient of an expert without rows is zero, not missing. Inside autocast the product runs in autocast's dtype. Second
// derivatives are refused.
Tensor grouped_linear(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1);

}  // namespace moelab
