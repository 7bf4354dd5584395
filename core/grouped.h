// Linear maps with one matrix per group of consecutive rows: the arithmetic of every bank of stacked experts.
#pragma once

#include "core/tensor.h"

namespace moelab {

// y[n] = weight[e]·x[n] (+ bias[e]) for the rows n in [offsets[e], offsets[e+1]). One matrix product per expert that has rows.
// The gradient of an expert without rows is zero, not missing. Inside autocast the product runs in autocast's dtype. Second
// derivatives are refused.
Tensor grouped_linear(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1);

}  // namespace moelab
