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

at::ScalarType model_dtype(const Options& model) { return model.text("dtype") == "float64" ? at::kDouble : at::kFloat; }

// Reads the blocks of one model, one by one.
struct BlockReader {
  const ModelSpec& spec;
  const Options& model;
  const std::optional<AttentionSpec>& attention;
  RandomKey init;

  RandomKey init_of(int64_t block) const { return init.with("layer", block); }

  // Each block adds one term to the residual stream, or two; this keeps its variance independent of the depth.
  double output_scale() const {
    return 1 / std::sqrt((attention ? 2.0 : 1.0) * static_cast<double>(model.integer("layers")));
  }

  BlockSettings block(int64_t index) const {
    BlockSettings settings{.width = model.integer("width"), .dtype = model_dtype(model), .attention = attention};
    if (!attention) return settings;
    settings.attention->output_scale = output_scale();
    settings.attention->init = init_of(index).with("attention");
    return settings;
  }

  BlockSettings dense(int64_t index) const {
    BlockSettings settings = block(index);
    ExpertSpec expert{settings.width, 1, settings.dtype, init_of(index).with("dense"), output_scale(), {}};
    const int64_t hidden = hidden_width(model.integer("dense_width"), settings.width);
    settings.dense = dense_expert("ffn", std::move(expert), hidden, model.text("dense_activation"));
    return settings;
  }

  BlockSettings routed(const Table& tables, int64_t index) const {
    BlockSettings settings = block(index);
    LayerSettings layer = read_layer(tables, settings.width, index, spec.data.vocabulary(), settings.dtype, init_of(index));
    layer.expert_spec.output_scale = output_scale();
    const std::string& twin = model.text("twin");
    if (twin != "none") {
      settings.dense = dense_twin(tables, layer, twin);
      return settings;
    }
    if (attention && attention->causal) settings.sees_future = require_causal(tables, layer, spec.allow_noncausal_training);
    settings.moe = std::move(layer);
    return settings;
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

OptionSpecs backbone_options(const OptionSpecs& own) {
  OptionSpecs all{
      option("layers", 4, "blocks, counted from 0").at_least(1),
      option("width", 128, "model width D").at_least(2),
      option("moe_layers", "all", "blocks with experts: all, none, odd, even, first, last, or a list like \"1,3\""),
      option("dense_width", 0, "hidden width of blocks without experts; 0 = 4·width").at_least(0),
      option("dense_activation", "swiglu", "of blocks without experts").one_of({"relu", "gelu", "gelu_tanh", "swiglu"}),
      option("twin", "none", "replace experts by a dense layer with as many active, or total, expert parameters")
          .one_of({"none", "dense_active", "dense_total"}),
      option("dtype", "float32", "of parameters and computation").one_of({"float32", "float64"}),
  };
  all.insert(all.end(), own.begin(), own.end());
  return all;
}

OptionSpec heads_option() { return option("heads", 4, "attention heads; must divide the width").at_least(1); }

AttentionSpec read_attention(const Table& model, const Options& options) {
  AttentionSpec spec;
  spec.width = options.integer("width");
  spec.heads = options.integer("heads");
  spec.dtype = model_dtype(options);
  if (spec.width % spec.heads != 0)
    model.fail("heads", fmt::format("width = {} is not divisible by heads = {}", spec.width, spec.heads));
  return spec;
}

BackboneSettings read_backbone(const ModelSpec& spec, const Options& options, const std::optional<AttentionSpec>& attention) {
  const Table model = spec.root.child("model");
  const int64_t layers = options.integer("layers");
  const std::vector<bool> has_moe = named_blocks(model, "moe_layers", options.text("moe_layers"), layers);
  const std::vector<Table> tables = tables_of_blocks(spec.root, has_moe);
  const BlockReader reader{spec, options, attention, random_key(spec.seed, "init")};
  BackboneSettings settings{options.integer("width"), model_dtype(options), reader.init, {}};
  for (int64_t block = 0; block < layers; ++block)
    settings.blocks.push_back(has_moe[block] ? reader.routed(tables[block], block) : reader.dense(block));
  refuse_unequal_pools(tables, settings.blocks);
  return settings;
}

}  // namespace moelab
