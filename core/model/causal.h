// A causal language model may not look ahead: never in evaluation, in training only where the experiment allows it.
#pragma once

#include "core/config.h"
#include "core/moe_layer.h"

#include <string>

namespace moelab {

// Throws Error(kUsage) at the place that lets the future in. Otherwise returns why training sees the future, "" if it does
// not. `moe` is the table that describes the layer, `prompt` the tokens that evaluation does not judge.
std::string require_causal(const Table& moe, const LayerSettings& layer, bool allow_noncausal_training, int64_t prompt);

// Attention heads may have a mask of their own. Throws Error(kUsage) at it where it shows later tokens; `expert` is the table
// that describes them.
void require_causal_mask(const Table& expert, const LayerSettings& layer);

}  // namespace moelab
