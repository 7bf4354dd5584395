// Rows through merged experts: one set of mixed parameters per group of rows.
#pragma once

#include "core/execute.h"

namespace moelab {

// A bank whose merge() is not the mean of its stacked parameters also derives from this, and says when: its mixtures are then
// made by merge() alone.
class OwnMerge {
 public:
  virtual ~OwnMerge() = default;
  virtual bool merges_its_own_way() const = 0;
};

// y [T, output width]: row t through the expert of parameters Σ_e alpha[g,e]·θ_e, g = its group. No more than four merged copies
// exist at a time, forward or backward: with more groups the backward pass merges and runs forward once more. Mixtures of an
// OwnMerge all stay on the graph. `bank` must outlive the graph.
Tensor execute_merge(const MergePlan& plan, const ExpertBank& bank, const ExecuteInput& input);

}  // namespace moelab
