#include "core/model/settings.h"

#include "core/error.h"
#include "core/model/causal.h"
#include "core/model/overrides.h"
#include "core/model/twin.h"

#include <fmt/format.h>

#include <cmath>
#include <map>

namespace moelab {
namespace {

void check_heads(const Table& model, int64_t width, int64_t heads) {
  if (width % heads != 0) model.fail("heads", fmt::format("width = {} is not divisible by heads = {}", width, heads));
  if (width / heads % 2 != 0)
    model.fail("heads", fmt::format("width / heads = {} is odd, but rotary positions turn pairs; change width or heads", width / heads));
}

AttentionSpec attention_spec(const Table& model, const Options& options) {
  AttentionSpec spec;
  spec.width = options.integer("width");
  spec.heads = options.integer("heads");
  check_heads(model, spec.width, spec.heads);
  spec.context = options.integer("context");
  spec.rope_base = options.real("rope_base");
  // Each block adds two terms to the residual stream; this keeps its variance independent of the depth.
  spec.output_scale = 1 / std::sqrt(2.0 * static_cast<double>(options.integer("layers")));
  spec.dtype = options.text("dtype") == "float64" ? at::kDouble : at::kFloat;
  return spec;
}

DenseSettings plain_dense(const Options& model, const AttentionSpec& attention, RandomKey init) {
  const int64_t width = model.integer("dense_width");
  ExpertSpec spec{attention.width, 1, attention.dtype, init.with("dense"), attention.output_scale, {}};
  return dense_expert("ffn", std::move(spec), hidden_width(width, attention.width), model.text("dense_activation"));
}

// What all blocks of one model share while they are read.
struct BlockReader {
  const Options& model;
  const DecoderSettings& settings;
  bool allow_noncausal_training;

  BlockSettings dense(int64_t block) const {
    return {std::nullopt, plain_dense(model, settings.attention, settings.block_init(block)), ""};
  }

  BlockSettings routed(const Table& tables, int64_t block) const {
    const AttentionSpec& attention = settings.attention;
    LayerSettings layer = read_layer(tables, attention.width, block, settings.vocabulary, attention.dtype, settings.block_init(block));
    layer.expert_spec.output_scale = attention.output_scale;
    const std::string& twin = model.text("twin");
    if (twin != "none") return {std::nullopt, dense_twin(tables, layer, twin), ""};
    std::string sees_future = require_causal(tables, layer, allow_noncausal_training);
    return {std::move(layer), std::nullopt, std::move(sees_future)};
  }
};

// The [[loss]] of a label, or [moe] where the loss is the paper's.
Table table_of_loss(const Table& root, const std::string& label) {
  for (const Table& loss : root.array("loss")) {
    const Options words = loss.options({option("name", "", ""), option("label", "", "")}, loss.keys());
    if ((words.text("label").empty() ? words.text("name") : words.text("label")) == label) return loss;
  }
  return root.child("moe");
}

// A pooled loss adds what its layers count expert by expert.
void refuse_unequal_pools(const std::vector<Table>& tables, const std::vector<BlockSettings>& blocks) {
  std::map<std::string, std::pair<size_t, int64_t>> first;  // label -> block and experts of the pool's first layer
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (!blocks[b].moe) continue;
    const int64_t experts = blocks[b].moe->router_spec.max_experts;
    for (const LossTerm& term : blocks[b].moe->losses) {
      if (!term.loss->pooled_over_layers()) continue;
      const auto [block, others] = first.try_emplace(term.label, b, experts).first->second;
      if (others == experts) continue;
      table_of_loss(tables[b], term.label).fail("layers", fmt::format(
          "loss '{}' pools its layers, which must have equally many experts, but layer {} has {} and layer {} has {}; use "
          "layers = \"each\"", term.label, block, others, b, experts));
    }
  }
}

}  // namespace

OptionSpecs model_options() {
  return {
      option("name", "decoder", "the backbone").one_of({"decoder"}),
      option("layers", 4, "blocks, counted from 0").at_least(1),
      option("width", 128, "model width D").at_least(2),
      option("heads", 4, "attention heads; must divide the width").at_least(1),
      option("context", 256, "longest sequence in tokens").at_least(1),
      option("moe_layers", "all", "blocks with experts: all, none, odd, even, first, last, or a list like \"1,3\""),
      option("dense_width", 0, "hidden width of blocks without experts; 0 = 4·width").at_least(0),
      option("dense_activation", "swiglu", "of blocks without experts").one_of({"relu", "gelu", "gelu_tanh", "swiglu"}),
      option("tie_embeddings", true, "the output matrix is the embedding"),
      option("rope_base", 10000.0, "base of the rotary positions").at_least(1),
      option("twin", "none", "replace experts by a dense layer with as many active, or total, expert parameters")
          .one_of({"none", "dense_active", "dense_total"}),
      option("dtype", "float32", "of parameters and computation").one_of({"float32", "float64"}),
  };
}

DecoderSettings read_decoder(const Table& root, int64_t vocabulary, int64_t seed, bool allow_noncausal_training) {
  check_invariant(vocabulary > 0, "the decoder needs a vocabulary");
  const Table model = root.child("model");
  const Options options = model.options(model_options());
  DecoderSettings settings;
  settings.attention = attention_spec(model, options);
  settings.vocabulary = vocabulary;
  settings.tie_embeddings = options.flag("tie_embeddings");
  settings.init = random_key(seed, "init");
  const int64_t layers = options.integer("layers");
  const std::vector<bool> has_moe = named_blocks(model, "moe_layers", options.text("moe_layers"), layers);
  const std::vector<Table> tables = tables_of_blocks(root, has_moe);
  const BlockReader reader{options, settings, allow_noncausal_training};
  std::vector<BlockSettings> blocks;
  for (int64_t block = 0; block < layers; ++block)
    blocks.push_back(has_moe[block] ? reader.routed(tables[block], block) : reader.dense(block));
  refuse_unequal_pools(tables, blocks);
  settings.blocks = std::move(blocks);
  return settings;
}

}  // namespace moelab
