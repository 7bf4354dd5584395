#include "core/model/backbone.h"

#include "core/model/recompute.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

namespace moelab {
namespace {

// A forward pass on its way through the blocks.
struct Pass {
  const StepContext& context;
  RouteInput in;  // the carry of the latest routed layer is in here
  std::vector<SiteResult>& sites;

  void prepare(int64_t layer, const Block& block) {
    in.layer = layer;
    in.random = layer_key(context, layer);
    in.forced = nullptr;
    if (!context.forced || !block.moe()) return;
    const Assignment& replayed = context.forced->at(sites.size());
    if (replayed.defined()) in.forced = &replayed;  // plans that choose nothing have none
  }
  Tensor take(BlockOutput out) {
    if (out.site) {
      in.carry = out.site->carry;
      sites.push_back(std::move(*out.site));
    }
    return out.x_BLD;
  }
};

// The part of a request's state that the next block reads.
BlockState state_of_block(DecodeState& state, size_t block, bool routes, size_t site) {
  BlockState kept{state.position, &state.caches[block], nullptr, nullptr};
  if (!routes) return kept;
  kept.router = &state.routers[site];
  kept.experts = &state.experts[site];
  return kept;
}

}  // namespace

void Backbone::add_blocks(const std::vector<BlockSettings>& settings) {
  for (const BlockSettings& block : settings) {
    const int64_t index = blocks();
    blocks_.push_back(std::make_shared<Block>(index, block));
    add_child(fmt::format("layers.{}", index), blocks_.back());
  }
}

Tensor Backbone::through_blocks(Tensor x_BLD, const std::shared_ptr<const BatchRows>& rows, const StepContext& context,
                                std::vector<SiteResult>& sites, DecodeState* state) const {
  const bool recompute = context.recompute && at::GradMode::is_enabled();
  Pass pass{context, rows->route_input(context), sites};
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const std::shared_ptr<Block>& block = blocks_[b];
    pass.prepare(static_cast<int64_t>(b), *block);
    const BlockState kept = state ? state_of_block(*state, b, block->moe() != nullptr, sites.size()) : BlockState{};
    x_BLD = pass.take(recompute ? forward_recomputed(block, x_BLD, rows, pass.in) : block->forward(x_BLD, *rows, pass.in, kept));
  }
  return x_BLD;
}

std::vector<Site*> Backbone::sites() const {
  std::vector<Site*> all;
  for (const auto& block : blocks_)
    if (block->moe()) all.push_back(&block->moe()->site());
  return all;
}

std::vector<std::string> Backbone::training_sees_future() const {
  std::vector<std::string> labels;
  for (const auto& block : blocks_)
    if (!block->sees_future().empty()) labels.push_back(block->moe()->site().path + ": " + block->sees_future());
  return labels;
}

int64_t Backbone::active_parameters() const {
  int64_t active = parameter_count();
  for (const auto& block : blocks_) active -= block->parameter_count() - block->active_parameters();
  return active;
}

double Backbone::block_flops_per_row(int64_t context) const {
  double flops = 0;
  for (const auto& block : blocks_) flops += block->flops_per_row(context);
  return flops;
}

}  // namespace moelab
