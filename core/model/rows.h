// The rows of a batch that are routed: padding removed, with the side channels that routers may read.
#pragma once

#include "core/model/model.h"

namespace moelab {

class BatchRows {
 public:
  // Of tokens; `first` is the position of column 0.
  explicit BatchRows(const Batch& batch, int64_t first = 0);

  // Of samples that have no tokens: each is a sequence of `positions` rows.
  static BatchRows of_samples(const Batch& batch, int64_t positions);

  // Rows of real tokens, [B,L,D] → [T,D], and back; padding gets 0.
  Tensor gather(const Tensor& x_BLD) const;
  Tensor scatter(const Tensor& y_TD) const;

  // Everything of a RouteInput that is the same in every layer. `x_TD`, the layer, its key, carry and forced selection are
  // filled in per layer.
  RouteInput route_input(const StepContext& context) const;

  // Token ids as the embedding may read them: padding is 0, whatever it held. Undefined where samples have none.
  const Tensor& tokens_BL() const { return tokens_BL_; }

 private:
  BatchRows(const Batch& batch, int64_t length, int64_t first);

  int64_t batch_, length_;
  Tensor tokens_BL_;
  Tensor index_T_;  // b·L + l of each row; undefined where there is no padding
  RouteInput channels_;
};

// The stream of one layer in one pass. Evaluation and decoding have keys of their own that do not know the step.
RandomKey layer_key(const StepContext& context, int64_t layer);

}  // namespace moelab
