// `[model]`, `[[layer]]` and the tables of every layer, read and checked before anything large is allocated.
#pragma once

#include "core/config.h"
#include "core/model/block.h"

#include <optional>
#include <string>
#include <vector>

namespace moelab {

struct BackboneSettings {
  int64_t width = 0;
  at::ScalarType dtype = at::kFloat;
  RandomKey init;
  std::vector<BlockSettings> blocks;
};

// The keys of `[model]` that every model of blocks has, followed by its own.
OptionSpecs backbone_options(const OptionSpecs& own);
OptionSpec heads_option();

// The key of `[[layer]]` beside the tables of a layer.
OptionSpecs layer_override_options();

// Width, heads and dtype of the attention that [model] asks for; refused where heads do not divide the width.
AttentionSpec read_attention(const Table& model, const Options& options);

// The tables of every block. Each gets `attention`, if any; where that is causal, routers that look ahead are refused.
BackboneSettings read_backbone(const ModelSpec& spec, const Options& options, const std::optional<AttentionSpec>& attention);

}  // namespace moelab
