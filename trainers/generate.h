// Text from a model, sampled token by token with counter-based draws: the same seed writes the same text.
#pragma once

#include "core/model/model.h"

#include <vector>

namespace moelab {

struct SampleSettings {
  int64_t tokens = 200;
  double temperature = 0.8;  // 0 = the most probable token
  int64_t seed = 0;
  int64_t step = 0;          // steps trained, of how many: routers may work in stages
  int64_t total_steps = 1;
};

// Continues `prompt` (at least one token). Where the model's context is full it goes on from the later half of what it has.
std::vector<int64_t> generate(const Model& model, const std::vector<int64_t>& prompt, const SampleSettings& settings);

}  // namespace moelab
