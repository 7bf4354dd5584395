// `moelab route` against plain loops for routers that read ids, labels or draws: hash layers, StableMoE, THOR, domains.
#include "route_support.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>

using namespace moelab;
using namespace moelab::testing;
using oracle::Array;
using oracle::Arrays;
using oracle::Capacity;
using oracle::Layer;

namespace {

const Capacity kTwoEach{.mode = "absolute", .value = 2};

void agree_by_ids(const Layer& layer, uint64_t seed = 1) { expect_agreement(layer, random_inputs(layer, {}, seed)); }

Layer stable_layer(const std::string& distilled, int64_t step, std::map<std::string, std::string> more = {},
                   bool train = true) {
  more.insert({{"distilled", distilled}, {"distill_dim", "3"}, {"stage1_steps", "10"}});
  return {.router = "stablemoe",
          .activation = "gelu",
          .bias = true,
          .capacity = {.mode = "factor", .factor = 1, .scope = "micro"},
          .losses = {{"stablemoe_balance", 0.3}, {"distillation", 0.7, "sequence"}, {"z", 0.1}},
          .train = train,
          .options = std::move(more),
          .step = step};
}

// As many draws as the granularity has.
Arrays thor_inputs(const Layer& layer, size_t draws) {
  Arrays arrays = random_inputs(layer);
  arrays["noise"].shape = {static_cast<int64_t>(draws)};
  arrays["noise"].value.resize(draws);
  return arrays;
}

}  // namespace

TEST_CASE("route agrees with plain loops for hash of every kind whose line is known, k = 1 and 2, with drops") {
  bool train = true;
  for (const std::string kind : {"balanced", "random", "previous", "future", "position"}) {
    agree_by_ids({.router = "hash",
                  .activation = "gelu",
                  .capacity = kTwoEach,
                  .losses = {{"importance", 0.2}},
                  .train = train,
                  .options = {{"kind", kind}}});
    train = !train;
  }
  agree_by_ids({.router = "hash",
                .capacity = {.mode = "factor", .factor = 1, .times_k = true},
                .options = {{"kind", "random"}, {"k", "2"}}});
  agree_by_ids({.router = "hash", .train = false, .options = {{"kind", "multi"}, {"k", "2"}}});
}

TEST_CASE("route of hash takes the order of tokens from positions where the file gives them") {
  for (const std::string kind : {"previous", "future"}) {
    const Layer layer{.router = "hash", .train = false, .options = {{"kind", kind}}};
    Arrays arrays = random_inputs(layer);
    arrays["positions"] = {{12}, {11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}};
    expect_agreement(layer, arrays);
  }
}

TEST_CASE(
    "route of bigram hashes: the line is one function of (token before, token), learned from pairs, met in longer texts") {
  // With as many experts as lines and the identity for a table, the expert is the line.
  Layer layer{.router = "hash", .experts = 6, .options = {{"kind", "bigram"}}};
  Arrays pairs = random_inputs(layer, {.rows = 72, .padding = false, .sequences = false});
  pairs["router.table"].value = {0, 1, 2, 3, 4, 5};
  pairs["sequence_ids"] = {{72}, {}};
  for (int64_t t = 0; t < 72; ++t) {
    pairs["sequence_ids"].value.push_back(static_cast<double>(t / 2));
    pairs["token_ids"].value[t] = static_cast<double>(t % 2 == 0 ? t / 12 : t / 2 % 6);
  }
  const RouteRun run = run_layer(layer, pairs);
  REQUIRE(run.code == 0);
  std::vector<int64_t> line(72);
  for (size_t n = 0; n < 72; ++n) line[integers(run.tensors.at("token"))[n]] = integers(run.tensors.at("expert"))[n];
  Arrays text = random_inputs(layer, {}, 2);
  text["router.table"].value = pairs["router.table"].value;
  std::map<double, int64_t> before;
  for (size_t t = 0; t < 12; ++t) {
    if (text["padding"].value[t] != 0) continue;
    int64_t& last = before[text["sequence_ids"].value[t]];  // token 0 before the first
    const auto token = static_cast<int64_t>(text["token_ids"].value[t]);
    layer.given_choice.push_back(line[2 * (6 * last + token) + 1]);
    last = token;
  }
  expect_agreement(layer, text);
}

TEST_CASE(
    "route agrees with plain loops for stablemoe's stage 1 in training, with drops, both distilled routers, and its last "
    "step") {
  agree_by_ids(stable_layer("word", 3));
  expect_agreement_after_step(stable_layer("cnn", 8), random_inputs(stable_layer("cnn", 8)));
  expect_agreement_after_step(stable_layer("word", 9), random_inputs(stable_layer("word", 9), {}, 2));
}

TEST_CASE("route agrees with plain loops for stablemoe's stage 2: frozen choice, gradients of zero, no losses of its own") {
  agree_by_ids(stable_layer("word", 10));
  agree_by_ids(stable_layer("cnn", 12, {}, false));
}

TEST_CASE("route agrees with plain loops for stablemoe's evaluation in stage 1, by the distilled router or the main one") {
  agree_by_ids(stable_layer("cnn", 0, {}, false));
  agree_by_ids(stable_layer("word", 0, {{"eval_router", "main"}}, false));
}

TEST_CASE("route agrees with plain loops for thor at every granularity of the given draws, in training and in evaluation") {
  // Sequences of seven and three rows: two sequences, seven positions.
  for (const auto& [granularity, draws] :
       std::map<std::string, size_t>{{"batch", 1}, {"sequence", 2}, {"position", 7}, {"token", 12}}) {
    const Layer layer{.router = "thor",
                      .activation = "gelu",
                      .capacity = kTwoEach,
                      .losses = {{"importance", 0.1}},
                      .options = {{"granularity", granularity}}};
    expect_agreement(layer, thor_inputs(layer, draws));
    if (granularity == "batch") continue;
    const Layer eval{.router = "thor", .train = false, .options = {{"inference_granularity", granularity}}};
    expect_agreement(eval, thor_inputs(eval, draws));
  }
}

TEST_CASE("route of thor takes a draw per sequence of the file, those that are padding alone included, or per one that is left") {
  const Layer layer{.router = "thor", .options = {{"granularity", "sequence"}}};
  Arrays arrays = random_inputs(layer);
  arrays["sequence_ids"] = {{12}, {7, 7, 7, 5, 5, 9, 9, 9, 9, 2, 2, 2}};
  arrays["padding"] = {{12}, {0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0}};
  arrays["noise"] = {{3}, {3, 1, 2}};
  const RouteRun left = run_layer(layer, arrays);
  arrays["noise"] = {{4}, {3, 0, 1, 2}};  // 5 has no row left
  const RouteRun all = run_layer(layer, arrays);
  for (const RouteRun& run : {left, all}) {
    REQUIRE(run.code == 0);
    CHECK(at::equal(run.tensors.at("token"), at::tensor({5, 6, 7, 8, 9, 10, 11, 0, 1}, at::kLong)));
    CHECK(at::equal(run.tensors.at("expert"), at::tensor({1, 1, 1, 1, 2, 2, 2, 3, 3}, at::kLong)));
  }
}

TEST_CASE("route of thor takes a draw per row where there are as many positions as rows in the file") {
  const Layer layer{.router = "thor", .options = {{"granularity", "token"}}};
  Arrays arrays = random_inputs(layer);
  arrays["positions"] = {{12}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}};
  expect_agreement(layer, arrays);
}

TEST_CASE("route agrees with plain loops for thor's ensemble and fixed expert") {
  agree_by_ids({.router = "thor", .activation = "gelu", .train = false, .options = {{"inference", "ensemble"}}});
  agree_by_ids({.router = "thor", .train = false, .options = {{"fixed_expert", "2"}, {"inference", "fixed"}}});
}

TEST_CASE("route of thor with distinct pairs: the two passes of a step draw two experts, each for the whole batch") {
  const Layer layer{.router = "thor", .experts = 3, .options = {{"pair", "distinct"}}};
  Arrays arrays = random_inputs(layer);
  arrays.erase("noise");
  for (const std::string seed : {"1", "2"}) {
    std::vector<std::vector<int64_t>> experts;
    for (const std::string pass : {"0", "1"})
      experts.push_back(
          integers(run_layer(layer, arrays, "--set route.pass=" + pass + " --set route.seed=" + seed).tensors.at("expert")));
    CHECK(experts[0] == std::vector<int64_t>(10, experts[0][0]));
    CHECK(experts[1] == std::vector<int64_t>(10, experts[1][0]));
    CHECK(experts[0][0] != experts[1][0]);
  }
}

TEST_CASE("route agrees with plain loops for domain, hard and learned, with drops, in both modes") {
  agree_by_ids({.router = "domain",
                .activation = "gelu",
                .capacity = kTwoEach,
                .losses = {{"importance", 0.3}},
                .options = {{"k", "2"}}});
  const std::vector<oracle::LossCase> losses{{"balance", 0.3}, {"z", 0.1}, {"entropy", 0.2}};
  agree_by_ids({.router = "domain",
                .renormalise = "before_drop",
                .capacity = kTwoEach,
                .losses = losses,
                .options = {{"hard", "false"}, {"k", "2"}}});
  agree_by_ids({.router = "domain",
                .renormalise = "after_drop",
                .capacity = kTwoEach,
                .losses = losses,
                .train = false,
                .options = {{"hard", "false"}, {"k", "3"}}});
}
