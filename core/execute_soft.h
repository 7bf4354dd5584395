// Slots of one sequence, filled and read without ever storing D or C: blocks of rows, whose logits are made again in the backward
// pass.
#pragma once

#include "core/plan.h"

namespace moelab {

// One sequence's part of a soft plan.
struct SoftSequence {
  const SoftPlan* plan;
  Tensor row_M;     // its rows
  Tensor query_MD;  // on the graph, float or better
};
SoftSequence sequence_of(const SoftPlan& plan, int64_t sequence);

// Dᵀ·x over the slots that the key has [S,D], from the sequence's rows of x. Slots of a sequence without rows are 0.
Tensor fill_slots(const SoftSequence& sequence, const Tensor& x_MD);

// C·slots [M,W], from the slots that the key has.
Tensor read_slots(const SoftSequence& sequence, const Tensor& slots_SW);

}  // namespace moelab
