// Activation recomputation: a block's forward keeps its input alone and runs again in the backward pass.
#pragma once

#include "core/model/block.h"

namespace moelab {

// Equal to block.forward(x_BLD, rows, in, shares) in values and gradients. The first pass alone makes the records, the
// assignments and the deltas; the second replays the assignments, the random keys and the autocast state, and counts nothing.
// `block` and `rows` are kept until the graph is freed.
BlockOutput forward_recomputed(const std::shared_ptr<const Block>& block, const Tensor& x_BLD,
                               const std::shared_ptr<const BatchRows>& rows, const RouteInput& in,
                               const std::vector<SiteShare>& shares);

}  // namespace moelab
