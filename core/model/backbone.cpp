#include "core/model/backbone.h"

#include "core/model/recompute.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace moelab {
namespace {

// A forward pass on its way through the blocks.
class BlockWalk {
 public:
  BlockWalk(const StepContext& context, RouteInput in, std::vector<SiteResult>& done, DecodeState* state)
      : context_(context), in_(std::move(in)), done_(done), state_(state) {}

  // What the next block gets.
  const RouteInput& input(int64_t layer) {
    in_.layer = layer;
    in_.random = layer_key(context_, layer);
    return in_;
  }

  std::vector<SiteShare> shares(const Block& block) {
    std::vector<SiteShare> all;
    for (const MoELayer* site : block.sites()) all.push_back(share(*site, done_.size() + all.size()));
    return all;
  }

  BlockState block_state(size_t block) const {
    return state_ ? BlockState{state_->position, &state_->caches[block]} : BlockState{};
  }

  Tensor take(const Block& block, BlockOutput out) {
    const std::vector<MoELayer*> sites = block.sites();
    for (size_t s = 0; s < sites.size(); ++s) {
      carry_[site_name(sites[s]->site())] = out.sites[s].carry;
      done_.push_back(std::move(out.sites[s]));
    }
    return out.x_BLD;
  }

 private:
  SiteShare share(const MoELayer& site, size_t index) {
    SiteShare share{.carry = carry_[site_name(site.site())]};
    if (context_.forced && context_.forced->at(index).defined()) share.forced = &context_.forced->at(index);
    if (!state_) return share;
    share.state = &state_->routers[index];
    share.cache = &state_->experts[index];
    return share;
  }

  const StepContext& context_;
  RouteInput in_;
  std::vector<SiteResult>& done_;
  DecodeState* state_;
  std::map<std::string, Tensor> carry_;  // of the latest site of each name
};

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
  BlockWalk walk(context, rows->route_input(context), sites, state);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const std::shared_ptr<Block>& block = blocks_[b];
    const RouteInput& in = walk.input(static_cast<int64_t>(b));
    const std::vector<SiteShare> shares = walk.shares(*block);
    x_BLD = walk.take(*block, recompute ? forward_recomputed(block, x_BLD, rows, in, shares)
                                        : block->forward(x_BLD, *rows, in, shares, walk.block_state(b)));
  }
  return x_BLD;
}

std::vector<Site*> Backbone::sites() const {
  std::vector<Site*> all;
  for (const auto& block : blocks_)
    for (MoELayer* site : block->sites()) all.push_back(&site->site());
  return all;
}

std::vector<std::string> Backbone::training_sees_future() const {
  std::vector<std::string> labels;
  for (const auto& block : blocks_) labels.insert(labels.end(), block->sees_future().begin(), block->sees_future().end());
  return labels;
}

bool Backbone::has_adapters() const {
  return std::any_of(blocks_.begin(), blocks_.end(), [](const auto& block) { return block->adapters() != nullptr; });
}

void Backbone::fold_adapters(const FoldedExperts& experts) const {
  const at::NoGradGuard no_grad;
  for (const auto& block : blocks_) {
    if (!block->adapters()) continue;
    const std::vector<NamedTensor> deltas = block->adapters()->folded(experts);
    for (const NamedTensor& parameter : block->parameters())
      for (const NamedTensor& delta : deltas)
        if (delta.name == parameter.name) parameter.tensor.add_(delta.tensor.view_as(parameter.tensor));
  }
}

void Backbone::freeze_base() const {
  if (!has_adapters()) return;
  for (const NamedTensor& parameter : parameters())
    if (parameter.name.find(".adapters.") == std::string::npos) parameter.tensor.requires_grad_(false);
}

std::vector<NamedTensor> Backbone::optimised() const {
  std::vector<NamedTensor> all = parameters();
  if (has_adapters())
    std::erase_if(all, [](const NamedTensor& parameter) { return parameter.name.find(".adapters.") == std::string::npos; });
  return all;
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
