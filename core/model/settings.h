// `[model]`, `[[layer]]` and the tables of every layer, read and checked before anything large is allocated.
#pragma once

#include "core/config.h"
#include "core/model/block.h"

#include <string>
#include <vector>

namespace moelab {

struct DecoderSettings {
  AttentionSpec attention;  // of every block, but for `init`
  int64_t vocabulary = 0;
  bool tie_embeddings = true;
  RandomKey init;
  std::vector<BlockSettings> blocks;

  RandomKey block_init(int64_t block) const { return init.with("layer", block); }
};

// The keys of `[model]`.
OptionSpecs model_options();

// The key of `[[layer]]` beside the tables of a layer.
OptionSpecs layer_override_options();

DecoderSettings read_decoder(const Table& root, int64_t vocabulary, int64_t seed, bool allow_noncausal_training);

}  // namespace moelab
