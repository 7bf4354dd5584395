#include "core/model/decoder.h"

#include "core/error.h"
#include "core/model/recompute.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>

#include <fmt/format.h>

namespace moelab {
namespace {

constexpr double kEmbeddingStd = 0.02;

AttentionSpec attention_of_block(const DecoderSettings& settings, int64_t block) {
  AttentionSpec spec = settings.attention;
  spec.init = settings.block_init(block).with("attention");
  return spec;
}

void check_tokens(const Tensor& tokens_BL, int64_t vocabulary, int64_t end, int64_t context) {
  if (end > context) usage_error(fmt::format("a sequence of {} tokens is longer than the model's context of {}", end, context));
  if (tokens_BL.numel() == 0) return;
  const auto lowest = tokens_BL.min().item<int64_t>(), highest = tokens_BL.max().item<int64_t>();
  if (lowest < 0 || highest >= vocabulary)
    usage_error(fmt::format("token {} is outside the vocabulary of {}", lowest < 0 ? lowest : highest, vocabulary));
}

// A forward pass on its way through the blocks.
struct Pass {
  std::shared_ptr<const BatchRows> rows;
  RouteInput in;  // the carry of the latest routed layer is in here
  const StepContext& context;
  std::vector<SiteResult> sites;

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

Pass begin_pass(const Batch& batch, const StepContext& context, int64_t first) {
  auto rows = std::make_shared<const BatchRows>(batch, first);
  RouteInput in = rows->route_input(context);
  return {std::move(rows), std::move(in), context, {}};
}

}  // namespace

DecoderModel::DecoderModel(DecoderSettings settings, int64_t seed)
    : attention_(settings.attention), vocabulary_(settings.vocabulary), seed_(seed) {
  const int64_t width = attention_.width;
  const auto matrix_VD = [&](const char* name) {
    return normal_tensor(settings.init.with(name), {vocabulary_, width}, kEmbeddingStd, attention_.dtype);
  };
  embedding_VD_ = add_parameter("embedding.weight", matrix_VD("embedding"));
  for (size_t b = 0; b < settings.blocks.size(); ++b) {
    const auto index = static_cast<int64_t>(b);
    blocks_.push_back(std::make_shared<Block>(index, attention_of_block(settings, index), settings.blocks[b]));
    add_child(fmt::format("layers.{}", b), blocks_.back());
  }
  norm_D_ = add_parameter("norm.weight", at::ones({width}, at::TensorOptions().dtype(attention_.dtype)));
  if (!settings.tie_embeddings) output_VD_ = add_parameter("output.weight", matrix_VD("output"));
}

Tensor DecoderModel::embed(const Tensor& tokens_BL) const {
  return at::embedding(embedding_VD_, tokens_BL.to(embedding_VD_.device()));
}

Tensor DecoderModel::logits(const Tensor& x_BLD) const { return at::linear(rms_norm(x_BLD, norm_D_), output_weight_VD()); }

ModelOutput DecoderModel::forward(const Batch& batch, const StepContext& context) const {
  Pass pass = begin_pass(batch, context, 0);
  check_tokens(pass.rows->tokens_BL(), vocabulary_, batch.tokens_BL.size(1), attention_.context);
  const bool recompute = context.recompute && at::GradMode::is_enabled();
  Tensor x_BLD = embed(pass.rows->tokens_BL());
  for (size_t b = 0; b < blocks_.size(); ++b) {
    pass.prepare(static_cast<int64_t>(b), *blocks_[b]);
    x_BLD = pass.take(recompute ? forward_recomputed(blocks_[b], x_BLD, pass.rows, pass.in)
                                : blocks_[b]->forward(x_BLD, *pass.rows, pass.in));
  }
  return {logits(x_BLD), std::move(pass.sites)};
}

void DecoderModel::start(DecodeState& state, int64_t sequences) const {
  check_invariant(state.position == 0 || state.caches.size() == blocks_.size(), "a decode state of another model");
  if (state.position > 0) {
    const int64_t before = state.caches.front().kept.at("k").size(0);
    check_invariant(before == sequences, "a decode state continues as many sequences as it began with");
    return;
  }
  const size_t routed = sites().size();
  state.caches.assign(blocks_.size(), {});
  state.routers.assign(routed, {});
  state.experts.assign(routed, {});
}

Tensor DecoderModel::decode(const Tensor& tokens_BL, DecodeState& state) const {
  const at::NoGradGuard no_grad;
  start(state, tokens_BL.size(0));
  check_tokens(tokens_BL, vocabulary_, state.position + tokens_BL.size(1), attention_.context);
  StepContext context;
  context.mode = Mode::kDecode;
  context.seed = seed_;
  context.step = state.step;
  context.total_steps = state.total_steps;
  Batch batch;
  batch.tokens_BL = tokens_BL;
  Pass pass = begin_pass(batch, context, state.position);
  Tensor x_BLD = embed(tokens_BL);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    pass.prepare(static_cast<int64_t>(b), *blocks_[b]);
    BlockState kept{state.position, &state.caches[b], nullptr, nullptr};
    if (blocks_[b]->moe()) {
      kept.router = &state.routers[pass.sites.size()];
      kept.experts = &state.experts[pass.sites.size()];
    }
    x_BLD = pass.take(blocks_[b]->forward(x_BLD, *pass.rows, pass.in, kept));
  }
  state.position += tokens_BL.size(1);
  return logits(x_BLD.narrow(1, x_BLD.size(1) - 1, 1)).squeeze(1);
}

std::vector<Site*> DecoderModel::sites() const {
  std::vector<Site*> all;
  for (const auto& block : blocks_)
    if (block->moe()) all.push_back(&block->moe()->site());
  return all;
}

std::vector<std::string> DecoderModel::training_sees_future() const {
  std::vector<std::string> labels;
  for (const auto& block : blocks_)
    if (!block->sees_future().empty()) labels.push_back(block->moe()->site().path + ": " + block->sees_future());
  return labels;
}

int64_t DecoderModel::active_parameters() const {
  int64_t active = parameter_count();
  for (const auto& block : blocks_) active -= block->parameter_count() - block->active_parameters();
  return active;
}

double DecoderModel::flops_per_token() const {
  double flops = 2.0 * static_cast<double>(vocabulary_ * attention_.width);
  for (const auto& block : blocks_) flops += block->flops_per_token(attention_.context);
  return flops;
}

std::shared_ptr<Model> make_model(const Table& root, int64_t vocabulary, int64_t seed, bool allow_noncausal_training) {
  return std::make_shared<DecoderModel>(read_decoder(root, vocabulary, seed, allow_noncausal_training), seed);
}

}  // namespace moelab
