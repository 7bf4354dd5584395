// What attention whose heads are experts is made of: stacked projections, and attention over rows of ragged sequences.
#pragma once

#include "core/model/routed_attention.h"
#include "core/model/sequence_grid.h"

#include <string>
#include <vector>

namespace moelab {

// One projection of every head: [heads, out, in].
struct HeadMap {
  std::string name;
  int64_t out, in;
  double scale = 1;  // of the initial weights, N(0, scale²/in)
};

struct HeadShape {
  int64_t width = 0, heads = 1, size = 0;
  bool causal = true, rotary = false;
  double rope_base = 10000, output_scale = 1;

  HeadMap in(const char* name) const { return {name, size, width}; }
  HeadMap out(const char* name) const { return {name, width, size, output_scale}; }
};

// Routed projections. Stage s of the bank is its map `stages[s]`; a module may read the others itself.
class HeadBank : public ExpertBank {
 public:
  HeadBank(const ExpertSpec& spec, std::vector<HeadMap> maps, std::vector<size_t> stages);

  int stages() const override { return static_cast<int>(stages_.size()); }
  int64_t output_width(int stage) const override { return maps_.at(stages_.at(static_cast<size_t>(stage))).out; }
  Tensor forward(const ExpertContext& context, int stage) const override;
  std::string refuses(PlanForm form) const override;
  double flops_per_row(int64_t expert) const override;
  void reset_expert(int64_t expert, RandomKey key) override;

  const Tensor& weight(size_t map) const { return groups_.front().stacked.at(map).tensor; }

 private:
  std::vector<HeadMap> maps_;
  std::vector<size_t> stages_;
  int64_t first_;  // global id of expert 0
};

// What heads have in common, trained but not routed.
class SharedHeads : public Module {
 public:
  SharedHeads(const ExpertSpec& spec, int64_t heads, const std::vector<HeadMap>& maps);
  const Tensor& weight(size_t map) const { return weights_.at(map); }

 private:
  std::vector<Tensor> weights_;
};

// All heads of one projection at once: [T,H,A].
Tensor project_heads(const Tensor& x_TD, const Tensor& weight_HAD);

// Attention over the rows of one pass. `shape` and `in` outlive it.
class HeadPass {
 public:
  HeadPass(const HeadShape& shape, const RouteInput& in, DecodeCache* cache)
      : shape_(shape), in_(in), cache_(cache), grid_(in.sequence_T, in.position_T, in.sequences) {}

  Tensor turned(const Tensor& x_THA) const { return turned(x_THA, in_.position_T); }
  Tensor turned(const Tensor& x_THA, const Tensor& position_T) const;

  // q_THA over keys and values of as many heads, or of one that all share; [T,H,A]. With a cache, over those of earlier calls
  // too.
  Tensor attended(const Tensor& q_THA, const Tensor& k_ThA, const Tensor& v_ThA) const;

 private:
  Tensor heads_first(const Tensor& x_THA) const { return grid_.lay(x_THA).transpose(1, 2); }
  Tensor kept(const char* name, const Tensor& more_BhLA) const;

  const HeadShape& shape_;
  const RouteInput& in_;
  DecodeCache* cache_;
  SequenceGrid grid_;
};

}  // namespace moelab
