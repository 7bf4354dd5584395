// How far bfloat16 may be from exact arithmetic, entry by entry: a plan of feed-forward experts is worked through in double with
// a running bound beside every number.
//
// Storing a number in bfloat16 moves it by at most u = 2⁻⁹ of itself. A product of matrices whose result is stored, and added to
// once more, is off by at most r·u·(|a|·|b|) beside what its operands bring along, where r counts the roundings; sums are made in
// float, whose own unit (and the float activations' accuracy) is kFloatUnit. No constant is fitted.
#pragma once

#include "core/execute.h"

#include <vector>

namespace moelab::testing {

struct Bounded {
  Tensor value;  // float64
  Tensor error;  // ≥ |what bfloat16 gives − value|
};

// y, then the gradients of ⟨y, grad_y⟩: of the plan's leaves (gates [T,K] are not made, but the plan's gate_N is; key, scale,
// query; alpha), of the bank's parameters (w, b of each map in their order, stacked), of x. Float64 rows, weights and leaves that
// bfloat16 (rows, weights) and float (leaves) hold exactly; no noise in plans; biases on. `activation` as [moe.expert] names it.
std::vector<Bounded> bfloat_bounds(const Plan& plan, const ExpertBank& bank, const std::string& activation, const Tensor& x_TD,
                                   const Tensor& grad_y_TD);

}  // namespace moelab::testing
