// Experts that choose rows under a cap on the experts of each row (expert choice, `cap_per_token`).
#pragma once

#include "core/tensor.h"

namespace moelab {

// Each of E experts takes exactly `places` of N rows, and no row has more than `cap` experts; bool [N,E]. The pairs are those of
// the entropy-regularised assignment max Σ S·A + lambda·H(A) under these bounds (at a small lambda the best assignment), after at
// most `iterations` rounds of projections. Needs places ≤ N and places·E ≤ cap·N; where that is so tight that refused experts
// find no other row, some row goes over its cap. Ties go to the lowest row.
Tensor capped_choice(const Tensor& score_NE, int64_t places, int64_t cap, double lambda, int64_t iterations);

}  // namespace moelab
