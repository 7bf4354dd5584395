// Rows through merged experts: one set of mixed parameters per group of rows.
#pragma once

#include "core/execute.h"

namespace moelab {

// y [T, output width]: row t through the expert of parameters Σ_e alpha[g,e]·θ_e, g = its group. No more than four merged copies
// exist at a time, forward or backward: with more groups the backward pass merges and runs forward once more. `bank` must outlive
// the graph.
Tensor execute_merge(const MergePlan& plan, const ExpertBank& bank, const ExecuteInput& input);

}  // namespace moelab
