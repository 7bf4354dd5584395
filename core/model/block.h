// One block: x + attention(norm(x)) where it has attention, then + experts(norm(·)). Attention and experts may be routed or
// dense, and adapters may be laid on the dense ones.
#pragma once

#include "core/model/adapters.h"
#include "core/model/layers.h"
#include "core/model/model.h"
#include "core/model/routed_attention.h"
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
  std::optional<AttentionSpec> attention = {};         // none: rows meet in the experts alone
  std::optional<LayerSettings> routed_attention = {};  // its heads are experts
  std::optional<LayerSettings> moe = {};
  std::optional<DenseSettings> dense = {};
  std::optional<AdapterSettings> adapters = {};
  std::vector<std::string> sees_future = {};  // "layers.3.moe: why its training decisions look at later tokens"
};

struct BlockOutput {
  Tensor x_BLD;
  std::vector<SiteResult> sites;  // in the order of Block::sites()
};

// What one block keeps of a request while decoding, beside what its sites keep.
struct BlockState {
  int64_t first = 0;  // position of column 0
  DecodeCache* attention = nullptr;
};

class Block : public Module {
 public:
  Block(int64_t index, const BlockSettings& settings);

  // `in` is complete but for x_TD; `shares` has one entry per site, or none.
  BlockOutput forward(const Tensor& x_BLD, const BatchRows& rows, RouteInput in, std::vector<SiteShare> shares = {},
                      const BlockState& state = {}) const;

  std::vector<MoELayer*> sites() const;  // every routed place, in the order of the forward pass
  const std::vector<std::string>& sees_future() const { return sees_future_; }
  const BlockAdapters* adapters() const { return adapters_.get(); }  // null where there are none

  int64_t active_parameters() const;
  double flops_per_row(int64_t context) const;

 private:
  Tensor attend(const Tensor& x_BLD, const BatchRows& rows, BlockAdapters::Pass& pass, const BlockState& state) const;
  Tensor feed_forward(const Tensor& x_TD, BlockAdapters::Pass& pass) const;
  void add_attention(const std::string& path, const BlockSettings& settings);
  void add_dense(const BlockSettings& settings);
  void add_adapters(const std::string& path, const BlockSettings& settings);

  std::shared_ptr<SelfAttention> attention_;
  std::shared_ptr<RoutedAttention> routed_attention_;
  std::shared_ptr<MoELayer> moe_;
  std::shared_ptr<ExpertBank> dense_;
  std::shared_ptr<const DenseMaps> dense_maps_;  // of dense_, where adapters are laid on it
  std::shared_ptr<BlockAdapters> adapters_;
  Tensor norm_attention_D_, norm_experts_D_;
  std::vector<std::string> sees_future_;
};

// Choices per row where every row makes the same number, 0 where it varies or the plan is not sparse.
int64_t choices_per_row(const RouterFacts& facts, const RouterSpec& spec, Mode mode = Mode::kTrain);

}  // namespace moelab
