// The decoder language model: embedding → blocks with causal attention → norm → logits of the next token.
#include "core/model/backbone.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>

#include <fmt/format.h>

namespace moelab {
namespace {

constexpr double kTokenEmbeddingStd = 0.02;

AttentionSpec decoder_attention(const Table& model, const Options& options) {
  AttentionSpec spec = read_attention(model, options);
  const int64_t size = spec.width / spec.heads;
  if (size % 2 != 0)
    model.fail("heads", fmt::format("width / heads = {} is odd, but rotary positions turn pairs; change width or heads", size));
  spec.context = options.integer("context");
  spec.rope_base = options.real("rope_base");
  return spec;
}

void check_tokens(const Tensor& tokens_BL, int64_t vocabulary, int64_t end, int64_t context) {
  if (end > context) usage_error(fmt::format("a sequence of {} tokens is longer than the model's context of {}", end, context));
  if (tokens_BL.numel() == 0) return;
  const auto lowest = tokens_BL.min().item<int64_t>(), highest = tokens_BL.max().item<int64_t>();
  if (lowest < 0 || highest >= vocabulary)
    usage_error(fmt::format("token {} is outside the vocabulary of {}", lowest < 0 ? lowest : highest, vocabulary));
}

class DecoderModel : public Backbone {
 public:
  DecoderModel(const ModelSpec& spec, const Options& options)
      : context_(options.integer("context")), vocabulary_(spec.data.classes), seed_(spec.seed) {
    const BackboneSettings settings = read_backbone(spec, options, decoder_attention(spec.root.child("model"), options));
    const auto matrix_VD = [&](const char* name) {
      return normal_tensor(settings.init.with(name), {vocabulary_, settings.width}, kTokenEmbeddingStd, settings.dtype);
    };
    embedding_VD_ = add_parameter("embedding.weight", matrix_VD("embedding"));
    add_blocks(settings.blocks);
    norm_D_ = add_parameter("norm.weight", at::ones({settings.width}, at::TensorOptions().dtype(settings.dtype)));
    if (!options.flag("tie_embeddings")) output_VD_ = add_parameter("output.weight", matrix_VD("output"));
    freeze_base();
  }

  ModelOutput forward(const Batch& batch, const StepContext& context) const override {
    const auto rows = std::make_shared<const BatchRows>(batch);
    check_tokens(rows->tokens_BL(), vocabulary_, batch.tokens_BL.size(1), context_);
    ModelOutput out;
    out.logits_BLV = logits(through_blocks(embed(rows->tokens_BL()), rows, context, out.sites));
    return out;
  }

  Tensor decode(const Tensor& tokens_BL, DecodeState& state) const override {
    const at::NoGradGuard no_grad;
    start(state, tokens_BL.size(0));
    check_tokens(tokens_BL, vocabulary_, state.position + tokens_BL.size(1), context_);
    StepContext context;
    context.mode = Mode::kDecode;
    context.seed = seed_;
    context.step = state.step;
    context.total_steps = state.total_steps;
    Batch batch;
    batch.tokens_BL = tokens_BL;
    std::vector<SiteResult> decided;
    const auto rows = std::make_shared<const BatchRows>(batch, state.position);
    const Tensor x_BLD = through_blocks(embed(tokens_BL), rows, context, decided, &state);
    state.position += tokens_BL.size(1);
    return logits(x_BLD.narrow(1, x_BLD.size(1) - 1, 1)).squeeze(1);
  }

  int64_t context() const override { return context_; }

  double flops_per_token() const override {
    return 2.0 * static_cast<double>(embedding_VD_.numel()) + block_flops_per_row(context_);
  }

 private:
  Tensor embed(const Tensor& tokens_BL) const { return at::embedding(embedding_VD_, tokens_BL.to(embedding_VD_.device())); }

  Tensor logits(const Tensor& x_BLD) const {
    return at::linear(rms_norm(x_BLD, norm_D_), output_VD_.defined() ? output_VD_ : embedding_VD_);
  }

  void start(DecodeState& state, int64_t sequences) const {
    const auto all = static_cast<size_t>(blocks());
    check_invariant(state.position == 0 || state.caches.size() == all, "a decode state of another model");
    if (state.position > 0) {
      const int64_t before = state.caches.front().kept.at("k").size(0);
      check_invariant(before == sequences, "a decode state continues as many sequences as it began with");
      return;
    }
    const size_t routed = sites().size();
    state.caches.assign(all, {});
    state.routers.assign(routed, {});
    state.experts.assign(routed, {});
  }

  int64_t context_;
  int64_t vocabulary_;
  int64_t seed_;  // keys the draws while decoding
  Tensor embedding_VD_, norm_D_, output_VD_;  // output_VD_ undefined where tied
};

const Registration<ModelEntry> registration_decoder{{
    .name = "decoder",
    .title = "A decoder language model with rotary positions",
    .doc = "Every token is predicted from those before it, so routers that look ahead are refused: in evaluation always, in "
           "training unless allow_noncausal_training says otherwise.",
    .reads = DataKind::kTokens,
    .causal = true,
    .options = backbone_options({heads_option(),
                                 option("context", 256, "longest sequence in tokens").at_least(1),
                                 option("tie_embeddings", true, "the output matrix is the embedding"),
                                 option("rope_base", 10000.0, "base of the rotary positions").at_least(1)}),
    .make = [](const ModelSpec& spec, const Options& options) -> std::shared_ptr<Model> {
      return std::make_shared<DecoderModel>(spec, options);
    },
}};

}  // namespace
}  // namespace moelab
