// Banks whose experts add to linear maps that stand elsewhere: one decision may serve any number of maps, each a stage.
#pragma once

#include "core/execute.h"

namespace moelab {

class AdapterBank : public ExpertBank {
 public:
  // What the experts add to linear map `map`: Σ_e gate · expert_e(x), [T, out of the map]. input.x_TD is what the map reads.
  virtual Tensor delta(const Plan& plan, size_t map, const ExecuteInput& input) const = 0;

  // What folding one expert into each map adds to its weight, [out, in]: in the order of the maps.
  virtual std::vector<Tensor> dense_deltas(int64_t expert) const = 0;
};

}  // namespace moelab
