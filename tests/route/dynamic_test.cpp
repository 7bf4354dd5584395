// `moelab route` against plain loops for top-p, DynMoE and sigmoid top-k.
#include "route_support.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>

using namespace moelab;
using namespace moelab::testing;
using oracle::Arrays;
using oracle::Layer;
using oracle::LossCase;

namespace {

const std::vector<LossCase> kTopPLosses{{"balance", 0.3, "step", {{"counts", "any_choice"}, {"divide_by_k", "true"}}},
                                        {"entropy", 0.2}};
const std::vector<LossCase> kDynmoeLosses{
    {"diversity", 0.3}, {"simplicity", 0.2}, {"dynmoe_balance", 0.4, "sequence"}, {"efficiency", 0.5}, {"importance", 0.1}};

void agree_dynamic(const Layer& layer, uint64_t seed = 1) { expect_agreement(layer, random_inputs(layer, {}, seed)); }

Layer dynmoe_layer(std::map<std::string, std::string> options, bool train) {
  return {.router = "dynmoe",
          .experts = 5,
          .activation = "gelu",
          .losses = kDynmoeLosses,
          .train = train,
          .options = std::move(options),
          .active = 4};
}

// Thresholds so high that some rows have no expert.
Arrays dynmoe_inputs(const Layer& layer, uint64_t seed = 1) {
  Arrays arrays = random_inputs(layer, {}, seed);
  for (double& threshold : arrays["router.thresholds"].value) threshold += 0.3;
  return arrays;
}

// Routed rows that no expert is above the threshold of.
int64_t rows_without_expert(const Layer& layer, const Arrays& arrays) {
  Layer training = layer;
  training.train = true;
  training.capacity = {};
  std::vector<int64_t> token = oracle::evaluate(training, arrays).token;
  std::sort(token.begin(), token.end());
  return 10 - (std::unique(token.begin(), token.end()) - token.begin());
}

}  // namespace

TEST_CASE("route agrees with plain loops for top_p: prefixes past p, k_max, drops, both modes") {
  agree_dynamic(
      {.router = "top_p", .activation = "swiglu", .capacity = {.mode = "absolute", .value = 2}, .losses = kTopPLosses});
  agree_dynamic({.router = "top_p",
                 .renormalise = "after_drop",
                 .capacity = {.mode = "factor", .factor = 1, .order = "token_major"},
                 .losses = kTopPLosses,
                 .train = false,
                 .options = {{"p", "0.7"}, {"k_max", "2"}}},
                2);
  agree_dynamic({.router = "top_p",
                 .renormalise = "before_drop",
                 .noise = "normal",
                 .noise_std = 0.5,
                 .losses = kTopPLosses,
                 .options = {{"p", "0.9"}}},
                3);
  agree_dynamic({.router = "top_p", .train = false, .options = {{"p", "1.0"}}});
}

TEST_CASE(
    "route agrees with plain loops for dynmoe in training: the declared surrogate, rows without an expert, a masked expert, "
    "its losses") {
  Layer layer = dynmoe_layer({}, true);
  const Arrays arrays = dynmoe_inputs(layer);
  REQUIRE(rows_without_expert(layer, arrays) > 0);
  expect_agreement(layer, arrays);
  layer.options["temperature"] = "2.5";
  layer.capacity = {.mode = "absolute", .value = 1, .priority = "score"};
  expect_agreement(layer, dynmoe_inputs(layer, 2));
}

TEST_CASE(
    "route agrees with plain loops for dynmoe in evaluation, where rows without an expert fall back by score or by margin") {
  for (const std::string fallback : {"score", "margin"}) {
    const Layer layer = dynmoe_layer({{"eval_fallback", fallback}}, false);
    Arrays arrays = dynmoe_inputs(layer);
    arrays["router.thresholds"].value = {0.9, 0.2, 1.5, 0.7, 0};  // the best score is not the best margin
    REQUIRE(rows_without_expert(layer, arrays) > 1);
    expect_agreement(layer, arrays);
  }
}

TEST_CASE("route of dynmoe with --end-step at the end of a window: unused experts go, one comes for the rows that none took") {
  const std::map<std::string, std::string> window{{"window_start", "0"}, {"window_update", "1"}, {"window_period", "1"}};
  const Layer layer = dynmoe_layer(window, true);
  Arrays arrays = dynmoe_inputs(layer);
  arrays["router.thresholds"].value[1] = 40;  // nobody passes: it is removed, and its place is the first that is free
  REQUIRE(rows_without_expert(layer, arrays) > 0);
  const Arrays after = oracle::after_step(layer, arrays);
  CHECK(after.at("router.mask").value == std::vector<double>{1, 1, 1, 1, 0});
  CHECK(after.at("router.weight").value != arrays.at("router.weight").value);
  expect_agreement_after_step(layer, arrays);
  arrays["router.thresholds"].value = {-3, 40, -3, -3, 0};  // nobody is left without, so nobody comes
  CHECK(oracle::after_step(layer, arrays).at("router.mask").value == std::vector<double>{1, 0, 1, 1, 0});
  expect_agreement_after_step(layer, arrays);
}

TEST_CASE(
    "route agrees with plain loops for sigmoid_topk: bias in the choice alone, groups, scale, each normalisation, the bias "
    "update") {
  const std::vector<LossCase> losses{
      {"balance", 0.3, "step", {{"counts", "any_choice"}, {"divide_by_k", "true"}}}, {"importance", 0.2}, {"z", 0.1}};
  const oracle::Capacity tight{.mode = "absolute", .value = 2};
  const Layer grouped{
      .router = "sigmoid_topk",
      .experts = 6,
      .renormalise = "before_drop",
      .activation = "swiglu",
      .capacity = tight,
      .losses = losses,
      .options = {{"selection_bias", "true"}, {"bias_rate", "0.25"}, {"groups", "3"}, {"groups_kept", "2"}, {"scale", "2.5"}}};
  expect_agreement_after_step(grouped, random_inputs(grouped));
  agree_dynamic({.router = "sigmoid_topk",
                 .k = 3,
                 .renormalise = "after_drop",
                 .capacity = tight,
                 .losses = losses,
                 .train = false,
                 .options = {{"scale", "1.5"}}});
  agree_dynamic({.router = "sigmoid_topk",
                 .noise = "normal",
                 .noise_std = 0.4,
                 .losses = {{"load", 0.3}},
                 .options = {{"bias_rate", "0.1"}}});
}
