// Every router of the catalogue's first part against plain loops: plan, output, losses, probes, gradients, in training and in
// evaluation, with drops, padding and two interleaved sequences.
#include "route_support.h"

#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;
using oracle::Capacity;
using oracle::Layer;
using oracle::LossCase;

namespace {

// Tight enough to drop pairs in each of the two sequences.
const Capacity kTight{.mode = "factor", .factor = 1.0};
const Capacity kTightTimesK{.mode = "factor", .factor = 0.9, .times_k = true, .scope = "micro"};

const std::vector<LossCase> kScoreLosses{{"balance", 0.3, "step", {{"counts", "any_choice"}}},
                                         {"importance", 0.2, "sequence", {{"of", "probabilities"}}},
                                         {"z", 0.05}};

void agree(Layer layer, bool train) {
  layer.train = train;
  expect_agreement(layer, random_inputs(layer));
}

void agree_in_both_modes(const Layer& layer) {
  agree(layer, true);
  agree(layer, false);
}

}  // namespace

TEST_CASE("route agrees with plain loops for noisy_topk") {
  Layer layer{.router = "noisy_topk", .activation = "relu", .capacity = kTight};
  layer.losses = {{"importance", 0.1}, {"load", 0.1}, {"z", 0.01}};
  agree_in_both_modes(layer);
  layer.renormalise = "after_drop";
  layer.noise_epsilon = 0.01;
  agree_in_both_modes(layer);
}

TEST_CASE("route agrees with plain loops for softmax_topk, softmax before or after the selection, each renormalisation") {
  bool train = true;
  for (const std::string softmax : {"before", "after"})
    for (const std::string renormalise : {"none", "before_drop", "after_drop"}) {
      agree({.router = "softmax_topk", .softmax = softmax, .renormalise = renormalise, .activation = "swiglu",
             .capacity = kTightTimesK, .losses = kScoreLosses}, train);
      train = !train;
    }
}

TEST_CASE("route agrees with plain loops for switch") {
  agree_in_both_modes({.router = "switch", .noise_epsilon = 0.3, .activation = "gelu", .bias = true, .capacity = kTight,
                       .losses = {{"balance", 0.4, "step", {{"probabilities", "noisy"}}}, {"z", 0.1}}});
}

TEST_CASE("route agrees with plain loops for gshard and every policy of its second expert") {
  for (const std::string policy : {"random_2g", "random_2p", "threshold", "all", "none", "gumbel"})
    agree({.router = "gshard", .renormalise = "before_drop", .second_expert = policy, .threshold = 0.4, .activation = "gelu_tanh",
           .capacity = kTight, .losses = {{"balance", 0.3}}}, true);
  agree({.router = "gshard",
         .renormalise = "before_drop",
         .second_expert = "all",
         .capacity = kTight,
         .losses = {{"balance", 0.3}}},
        false);
  agree({.router = "gshard", .renormalise = "after_drop", .second_expert = "random_2g", .threshold = 0.2, .capacity = kTight},
        false);
}

TEST_CASE("route agrees with plain loops for the controls uniform, random and frozen") {
  for (const int64_t k : {1, 3}) {
    agree_in_both_modes(
        {.router = "uniform", .k = k, .capacity = {.mode = "absolute", .value = 2}, .losses = {{"importance", 0.3}}});
    agree_in_both_modes({.router = "random", .k = k, .capacity = {.mode = "absolute", .value = 2}});
  }
  agree_in_both_modes({.router = "frozen", .renormalise = "after_drop", .capacity = kTight, .losses = kScoreLosses});
}

TEST_CASE("route in float32 agrees with plain loops") {
  Layer layer{
      .router = "softmax_topk", .renormalise = "before_drop", .activation = "swiglu", .capacity = kTight, .losses = kScoreLosses};
  expect_agreement(layer, random_inputs(layer), at::kFloat);
}
