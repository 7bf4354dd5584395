// Activation recomputation: a block's forward keeps its input alone and runs again in the backward pass.
#pragma once

#include "core/model/block.h"

namespace moelab {

// Equal to block.forward(x_BLD, rows, in) in values and gradients. The first pass alone makes the record, the assignment and
// the deltas; the second replays the assignment, the random keys and the autocast state, and counts nothing. `block` and
// `rows` are kept until the graph is freed.
BlockOutput forward_recomputed(const std::shared_ptr<const Block>& block, const Tensor& x_BLD,
                               const std::shared_ptr<const BatchRows>& rows, const RouteInput& in);

}  // namespace moelab
