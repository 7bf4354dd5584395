#include "core/model/settings.h"

#include "core/error.h"
#include "core/layer_tables.h"
#include "core/model/causal.h"
#include "core/model/overrides.h"
#include "core/model/routed_attention.h"
#include "core/model/twin.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <map>

namespace moelab {
namespace {

at::ScalarType model_dtype(const Options& model) { return model.text("dtype") == "float64" ? at::kDouble : at::kFloat; }

void refuse_unfit_attention(const Table& here, const AttentionPlace& place) {
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(place.layer.expert);
  const std::string reason = entry.refuses_attention ? entry.refuses_attention(place) : "";
  if (!reason.empty()) fail_with_place(here, "expert", reason);
}

// Which table describes experts of a place, and what they are.
struct PlaceTable {
  const char* table;
  const char* what;
};

PlaceTable table_of(ExpertPlace place) {
  switch (place) {
    case ExpertPlace::kAttention:
      return {"attention", "are attention heads"};
    case ExpertPlace::kLinears:
      return {"adapters", "are laid on the linear maps of dense blocks"};
    default:
      return {"moe", "stand in for a feed-forward layer"};
  }
}

void require_own_table(const Table& here, const std::string& table, const LayerSettings& layer) {
  const PlaceTable own = table_of(layer.place);
  if (own.table == table) return;
  std::vector<std::string> fitting;
  for (const ExpertEntry& entry : Registry<ExpertEntry>::instance().all())
    if (table_of(entry.place).table == table) fitting.push_back(entry.name);
  here.child("expert").fail("name", fmt::format("experts '{}' {}: describe them in [{}]; [{}] takes {}", layer.expert, own.what,
                                                own.table, table, fmt::join(fitting, ", ")));
}

bool adds_noise(const LayerSettings& layer) {
  const NoiseSpec::Kind kind = layer.router_spec.noise.kind;
  if (kind != NoiseSpec::Kind::kPaper) return kind == NoiseSpec::Kind::kNormal;
  return make_router(layer.router, layer.router_spec)->noise_shape(Mode::kTrain).starts_with("normal");
}

// Training with a loss that cannot have a gradient. `route` reports the value all the same, and so do the paper's own sets.
void refuse_losses_without_noise(const Table& tables, const LayerSettings& layer) {
  for (const Table& loss : tables.array("loss")) {
    const std::string name = loss.options({option("name", "", "")}, loss.keys()).text("name");
    if (Registry<LossEntry>::instance().find(name).needs_noise && !adds_noise(layer))
      loss.fail("name",
                fmt::format("loss '{}' has a gradient through noise on the logits alone, and router '{}' has none here; set "
                            "[{}.noise] kind = \"normal\", or take another loss",
                            name, layer.router, layer.table));
  }
}

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

  DenseSettings dense(int64_t index) const {
    ExpertSpec expert{model.integer("width"), 1, model_dtype(model), init_of(index).with("dense"), output_scale(), {}};
    return dense_expert("ffn", std::move(expert), dense_hidden(), model.text("dense_activation"));
  }

  int64_t dense_hidden() const { return hidden_width(model.integer("dense_width"), model.integer("width")); }

  LayerSettings layer(const Table& tables, const std::string& table, int64_t index) const {
    const RandomKey key = table == "moe" ? init_of(index) : init_of(index).with(table);
    LayerSettings layer =
        read_layer(tables, model.integer("width"), index, spec.data.vocabulary(), model_dtype(model), key, table);
    layer.expert_spec.output_scale = output_scale();
    refuse_losses_without_noise(tables, layer);
    return layer;
  }

  // `routed` are the tables that describe this block's routed places.
  BlockSettings read(const Table& tables, const std::vector<std::string>& routed, int64_t index) const {
    BlockSettings settings = block(index);
    for (const std::string& table : routed) place(settings, tables, table, layer(tables, table, index));
    if (!settings.moe && !settings.dense) settings.dense = dense(index);
    if (settings.adapters && (settings.moe || settings.routed_attention))
      tables.child("adapters")
          .fail("layers", fmt::format("block {} has routed experts: adapters are laid on blocks without them", index));
    return settings;
  }

  void place(BlockSettings& settings, const Table& tables, const std::string& table, LayerSettings layer) const {
    const Table here = tables.child(table);
    require_own_table(here, table, layer);
    const bool twin = model.text("twin") != "none";
    if (twin && layer.place != ExpertPlace::kFeedForward)
      spec.root.child("model").fail("twin",
                                    fmt::format("only feed-forward experts have a dense twin; '{}' has none", layer.expert));
    if (attention && attention->causal && !twin)
      if (const std::string why = require_causal(here, layer, spec.allow_noncausal_training, spec.eval_prompt); !why.empty())
        settings.sees_future.push_back(fmt::format("layers.{}.{}: {}", layer.router_spec.layer, table, why));
    if (layer.place == ExpertPlace::kAttention) {
      if (!attention)
        here.child("expert").fail("name",
                                  fmt::format("experts '{}' are attention heads, but this model has no attention", layer.expert));
      if (attention->causal) require_causal_mask(here.child("expert"), layer);
      refuse_unfit_attention(here, {table, *attention, layer});
      settings.routed_attention = std::move(layer);
    } else if (layer.place == ExpertPlace::kLinears) {
      settings.adapters = read_adapters(here.child("expert"), std::move(layer), linears());
    } else if (twin) {
      settings.dense = dense_twin(tables, layer, model.text("twin"));
    } else {
      settings.moe = std::move(layer);
    }
  }

  // The maps of a block that adapters may be laid on.
  std::vector<LinearShape> linears() const {
    const int64_t width = model.integer("width");
    std::vector<LinearShape> all;
    if (attention)
      for (const char* name : {"q", "k", "v", "o"}) all.push_back({std::string("attention.") + name, width, width});
    const FeedForwardForm form(activation_named(model.text("dense_activation")));
    for (const LinearShape& map : form.shapes(width, dense_hidden())) all.push_back({"dense." + map.name, map.in, map.out});
    return all;
  }
};

// The tables that describe routed places, with the blocks that each of them routes in. Where none is written, all is the default
// of [moe]; where others are, [moe] has to be written too.
struct RoutedTable {
  std::string name;
  std::vector<bool> blocks;
};

std::vector<RoutedTable> routed_tables(const Table& root, const Options& model, int64_t layers) {
  std::vector<RoutedTable> routed;
  for (const std::string& name : layer_tables()) {
    const Table table = root.child(name);
    if (name == "moe" || !table.present()) continue;
    const std::string where = table.options({option("layers", "all", "")}, table.keys()).text("layers");
    routed.push_back({name, named_blocks(table, "layers", where, layers)});
  }
  if (root.child("moe").present() || routed.empty())
    routed.push_back({"moe", named_blocks(root.child("model"), "moe_layers", model.text("moe_layers"), layers)});
  return routed;
}

std::vector<std::string> tables_at(const std::vector<RoutedTable>& routed, size_t block) {
  std::vector<std::string> names;
  for (const RoutedTable& table : routed)
    if (table.blocks[block]) names.push_back(table.name);
  return names;
}

std::vector<bool> any_blocks(const std::vector<RoutedTable>& routed, int64_t layers) {
  std::vector<bool> any(static_cast<size_t>(layers), false);
  for (const RoutedTable& table : routed)
    for (size_t b = 0; b < any.size(); ++b) any[b] = any[b] || table.blocks[b];
  return any;
}

// The [[loss]] of a label, or [moe] where the loss is the paper's.
Table table_of_loss(const Table& root, const std::string& label) {
  for (const Table& loss : root.array("loss")) {
    const Options words = loss.options({option("name", "", ""), option("label", "", "")}, loss.keys());
    if ((words.text("label").empty() ? words.text("name") : words.text("label")) == label) return loss;
  }
  return root.child("moe");
}

std::vector<const LayerSettings*> routed_places(const BlockSettings& block) {
  std::vector<const LayerSettings*> places;
  if (block.routed_attention) places.push_back(&*block.routed_attention);
  if (block.adapters) places.push_back(&block.adapters->layer);
  if (block.moe) places.push_back(&*block.moe);
  return places;
}

// A pooled loss adds what its layers count expert by expert: the layers of one table, since another's experts are others.
void refuse_unequal_pools(const std::vector<Table>& tables, const std::vector<BlockSettings>& blocks) {
  std::map<std::pair<std::string, std::string>, std::pair<size_t, int64_t>> first;  // (table, label) -> block and experts
  for (size_t b = 0; b < blocks.size(); ++b) {
    for (const LayerSettings* place : routed_places(blocks[b])) {
      const int64_t experts = place->router_spec.max_experts;
      for (const LossTerm& term : place->losses) {
        if (!term.loss->pooled_over_layers()) continue;
        const auto [block, others] = first.try_emplace({place->table, term.label}, b, experts).first->second;
        if (others == experts) continue;
        table_of_loss(tables[b], term.label)
            .fail("layers", fmt::format("loss '{}' pools its layers, which must have equally many experts, but layer {} has {} "
                                        "and layer {} has {}; use "
                                        "layers = \"each\"",
                                        term.label, block, others, b, experts));
      }
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
  const int64_t layers = options.integer("layers");
  const std::vector<RoutedTable> routed = routed_tables(spec.root, options, layers);
  const std::vector<Table> tables = tables_of_blocks(spec.root, any_blocks(routed, layers));
  const BlockReader reader{spec, options, attention, random_key(spec.seed, "init")};
  BackboneSettings settings{options.integer("width"), model_dtype(options), reader.init, {}};
  for (int64_t block = 0; block < layers; ++block)
    settings.blocks.push_back(reader.read(tables[block], tables_at(routed, static_cast<size_t>(block)), block));
  refuse_unequal_pools(tables, settings.blocks);
  return settings;
}

}  // namespace moelab
