// One block: x + attention(norm(x)) where it has attention, then + experts(norm(·)), routed or dense.
#pragma once

#include "core/model/layers.h"
#include "core/model/model.h"
#include "core/model/rows.h"

#include <optional>

namespace moelab {

// A feed-forward layer without routing: one expert that every row uses.
struct DenseSettings {
  std::string expert = "ffn";
  ExpertSpec spec;
};

// Either `moe` or `dense`.
struct BlockSettings {
  int64_t width = 0;
  at::ScalarType dtype = at::kFloat;
  std::optional<AttentionSpec> attention = {};  // none: rows meet in the experts alone
  std::optional<LayerSettings> moe = {};
  std::optional<DenseSettings> dense = {};
  std::string sees_future = {};  // why training decisions look at later tokens; "" = they do not
};

struct BlockOutput {
  Tensor x_BLD;
  std::optional<SiteResult> site;  // of blocks that route
};

// What one block keeps of a request while decoding.
struct BlockState {
  int64_t first = 0;  // position of column 0
  DecodeCache* attention = nullptr;
  RouteState* router = nullptr;
  DecodeCache* experts = nullptr;
};

class Block : public Module {
 public:
  Block(int64_t index, const BlockSettings& settings);

  // `in` is complete but for x_TD.
  BlockOutput forward(const Tensor& x_BLD, const BatchRows& rows, RouteInput in, const BlockState& state = {}) const;

  MoELayer* moe() const { return moe_.get(); }  // null in dense blocks
  const std::string& sees_future() const { return sees_future_; }

  int64_t active_parameters() const;
  double flops_per_row(int64_t context) const;

 private:
  BlockOutput routed(const Tensor& x_BLD, const Tensor& normed_BLD, const BatchRows& rows, RouteInput in,
                     const BlockState& state) const;

  std::shared_ptr<SelfAttention> attention_;
  std::shared_ptr<MoELayer> moe_;
  std::shared_ptr<ExpertBank> dense_;
  Tensor norm_attention_D_, norm_experts_D_;
  std::string sees_future_;
};

// Choices per row where every row makes the same number, 0 where it varies or the plan is not sparse.
int64_t choices_per_row(const RouterFacts& facts, const RouterSpec& spec, Mode mode = Mode::kTrain);

}  // namespace moelab
