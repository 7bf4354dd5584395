// A run whose adapters are made part of the weights that they stand on: a dense run, to use or to start others from.
#pragma once

#include "core/model/adapters.h"

#include <string>

namespace moelab {

// Writes the run folder `out`: the config of `run` without adapters, and its newest checkpoint with `experts` folded in. Throws
// Error(kUsage) where the run has no adapters or other experts, before anything is written.
void fold_run(const std::string& run, const std::string& out, const FoldedExperts& experts);

}  // namespace moelab
