// What the four losses of DynMoE (Guo et al. 2024, 2405.14297) share.
#pragma once

#include "core/losses/parts.h"

namespace moelab {

// 1 where a row activates an expert, on the router's straight-through graph; where the router gives no such rows, its choices
// without gradient. [T,E]
Tensor indicator_rows(const LossInput& input);

// The router's matrix `weight`, one row per expert, in float32 or better. [E,D]
Tensor router_matrix(const LossInput& input, const char* loss);

// A value that no row changes, as what each row contributes to a mean: the mean is that value however the rows are cut, and
// its gradient reaches the router in shares that sum to the whole. [T,1]
Tensor same_for_every_row(const Tensor& value, const LossInput& input);

// Reason to refuse a router, "" = none.
std::string refuses_without_indicators(const RouterFacts& facts);

}  // namespace moelab
