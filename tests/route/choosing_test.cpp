// `moelab route` against plain loops for the routers that choose over many rows at once: V-MoE's priority, BASE, expert choice.
#include "route_support.h"

#include "core/io/safetensors.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <numeric>

using namespace moelab;
using namespace moelab::testing;
using oracle::Arrays;
using oracle::Capacity;
using oracle::Layer;

namespace {

void agree_choosing(const Layer& layer, uint64_t seed = 1) { expect_agreement(layer, random_inputs(layer, {}, seed)); }

// The expert of each routed row, in the order of rows.
std::vector<int64_t> choice_by_row(const RouteRun& run) {
  const std::vector<int64_t> token = integers(run.tensors.at("token")), expert = integers(run.tensors.at("expert"));
  std::map<int64_t, int64_t> of_row;
  for (size_t n = 0; n < token.size(); ++n) of_row[token[n]] = expert[n];
  std::vector<int64_t> choice;
  for (const auto& entry : of_row) choice.push_back(entry.second);
  return choice;
}

std::vector<int64_t> loads_in(const RouteRun& run) {
  const std::vector<int64_t> offsets = integers(run.tensors.at("offsets"));
  std::vector<int64_t> loads;
  for (size_t e = 1; e < offsets.size(); ++e) loads.push_back(offsets[e] - offsets[e - 1]);
  return loads;
}

// Scores of the rows that are no padding.
std::vector<std::vector<double>> scores_in(const RouteRun& run, const Arrays& arrays, size_t experts) {
  const std::vector<double> logits = numbers(run.tensors.at("probe.logits"));
  std::vector<std::vector<double>> rows;
  for (size_t t = 0; t < arrays.at("padding").value.size(); ++t)
    if (arrays.at("padding").value[t] == 0) rows.emplace_back(logits.begin() + t * experts, logits.begin() + (t + 1) * experts);
  return rows;
}

double value_of_choice(const std::vector<std::vector<double>>& score, const std::vector<int64_t>& choice) {
  double sum = 0;
  for (size_t t = 0; t < score.size(); ++t) sum += score[t][choice[t]];
  return sum;
}

// Σ_t max_e(s - p) + the largest Σ_e load_e·p_e with loads ⌊T/E⌋ and ⌈T/E⌉.
double dual_value(const std::vector<std::vector<double>>& score, std::vector<double> price) {
  double sum = 0;
  for (const std::vector<double>& row : score) {
    double best = -1e300;
    for (size_t e = 0; e < row.size(); ++e) best = std::max(best, row[e] - price[e]);
    sum += best;
  }
  std::sort(price.rbegin(), price.rend());
  for (size_t e = 0; e < price.size(); ++e)
    sum += price[e] * static_cast<double>(score.size() / price.size() + (e < score.size() % price.size()));
  return sum;
}

Layer base_layer(std::map<std::string, std::string> options, bool train = true) {
  return {.router = "base",
          .experts = 3,
          .activation = "gelu",
          .losses = {{"balance", 0.2}, {"z", 0.1}},
          .train = train,
          .options = std::move(options)};
}

}  // namespace

TEST_CASE("route agrees with plain loops for vmoe: noise 1/E, its own conventions of both losses, batch priority with drops") {
  const Capacity priority{
      .mode = "factor", .factor = 0.5, .times_k = true, .multiple_of = 4, .scope = "micro", .priority = "batch"};
  agree_choosing({.router = "vmoe",
                  .activation = "gelu",
                  .bias = true,
                  .capacity = priority,
                  .losses = {{"importance", 0.3}, {"load", 0.4}}});
  agree_choosing({.router = "vmoe",
                  .k = 1,
                  .capacity = {.mode = "absolute", .value = 2, .priority = "batch"},
                  .losses = {{"importance", 0.3}, {"load", 0.4}}},
                 2);
  agree_choosing({.router = "vmoe",
                  .noise = "normal",
                  .noise_std = 0.6,
                  .losses = {{"balance", 0.2, "sequence", {{"probabilities", "noisy"}}}}});
  agree_choosing({.router = "vmoe", .capacity = priority, .losses = {{"load", 0.4}, {"importance", 0.1}}, .train = false});
}

TEST_CASE("route with mode = \"paper\" takes vmoe's capacity: ceil(n·k·1.05/E), up to a multiple of 4, batch priority") {
  Layer layer{
      .router = "vmoe",
      .experts = 5,
      .k = 1,
      .width = 3,
      .capacity = {.mode = "factor", .factor = 1.05, .times_k = true, .multiple_of = 4, .scope = "micro", .priority = "batch"}};
  Arrays arrays = random_inputs(layer, {.rows = 20});
  for (size_t t = 0; t < 20; ++t) arrays["x"].value[t * 4] = 1.0 + 0.01 * static_cast<double>(t);
  for (size_t d = 0; d < 4; ++d) arrays["router.weight"].value[d] = d == 0 ? 3 : 0;  // most rows want expert 0
  const RouteFolder folder;
  const std::string text = toml_of(layer);
  const size_t begin = text.find("[moe.capacity]"), end = text.find("order = \"k_major\"\n") + 18;
  folder.write("exp.toml", text.substr(0, begin) + "[moe.capacity]\nmode = \"paper\"\n" + text.substr(end));
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays));
  const RouteRun run = folder.run("--train --grad");
  expect_agreement(run, layer, arrays);
  CHECK(integers(run.tensors.at("dropped_token")).size() > 0);
}

TEST_CASE("route agrees with every assignment tried for base: 10 rows, 3 experts, each rule for the extra slot") {
  agree_choosing(base_layer({}));
  agree_choosing(base_layer({{"extra_slots", "lowest"}}), 2);
  Layer rotating = base_layer({{"extra_slots", "rotate"}, {"scope", "global"}});
  rotating.step = 5;
  agree_choosing(rotating, 3);
}

TEST_CASE("route agrees with plain loops for base with solver = greedy, its gap, and the given permutation of the rows") {
  agree_choosing(base_layer({{"solver", "greedy"}, {"extra_slots", "lowest"}}));
  const Layer layer = base_layer({{"solver", "greedy"}, {"extra_slots", "lowest"}, {"shuffle", "true"}});
  Arrays arrays = random_inputs(layer);
  for (size_t t = 4; t < 12; ++t)  // equal rows: the permutation decides
    for (size_t d = 0; d < 4; ++d) arrays["x"].value[t * 4 + d] = arrays["x"].value[d];
  expect_agreement(layer, arrays);
  const Layer exact = base_layer({{"shuffle", "true"}});
  expect_agreement(exact, random_inputs(exact, {}, 4));
}

TEST_CASE("route of base's approximate solvers: balanced, no better than the best, no further from it than their gap says") {
  for (const std::string solver : {"auction", "sinkhorn"}) {
    Layer layer = base_layer({{"solver", solver}});
    const Arrays arrays = random_inputs(layer);
    const RouteRun run = run_layer(layer, arrays, "--grad");
    INFO(solver << run.err);
    REQUIRE(run.code == 0);
    std::vector<int64_t> loads = loads_in(run);
    std::sort(loads.begin(), loads.end());
    CHECK(loads == std::vector<int64_t>{3, 3, 4});
    const RouteRun best = run_layer(base_layer({}), arrays);
    const auto score = scores_in(run, arrays, 3);
    const double lost = value_of_choice(score, choice_by_row(best)) - value_of_choice(score, choice_by_row(run));
    const double gap = numbers(run.tensors.at("probe.gap")).at(0);
    CHECK(lost >= -1e-9);
    CHECK(lost <= gap + 1e-9);
    layer.given_choice = choice_by_row(run);
    RouteRun without_gap = run;
    without_gap.tensors.erase("probe.gap");
    expect_agreement(without_gap, layer, arrays);
  }
}

TEST_CASE("route agrees with plain loops for base in evaluation, without and with the prices of IN, and with a capacity") {
  Layer layer = base_layer({}, false);
  layer.capacity = {.mode = "absolute", .value = 2};
  agree_choosing(layer);
  agree_choosing(base_layer({{"eval", "greedy_with_prices"}}, false));
}

TEST_CASE("route of base with --end-step: the prices are an optimal dual solution, so that bound and value meet") {
  const Layer layer = base_layer({});
  const Arrays arrays = random_inputs(layer, {}, 5);
  const RouteRun run = run_layer(layer, arrays, "--end-step");
  REQUIRE(run.code == 0);
  const std::vector<double> price = numbers(run.tensors.at("after.router.prices"));
  CHECK(*std::min_element(price.begin(), price.end()) == 0);
  const auto score = scores_in(run, arrays, 3);
  CHECK(std::abs(dual_value(score, price) - value_of_choice(score, choice_by_row(run))) < 1e-10);
  CHECK(dual_value(score, {0, 0, 0}) > value_of_choice(score, choice_by_row(run)) + 1e-3);  // the bound tells prices apart
  CHECK(numbers(run.tensors.at("after.router.weight")) == arrays.at("router.weight").value);
  CHECK(numbers(run_layer(base_layer({}, false), arrays, "--end-step").tensors.at("after.router.prices")) ==
        arrays.at("router.prices").value);
}

TEST_CASE("route agrees with plain loops for expert_choice: groups, both normalisations, noise, both modes") {
  const std::vector<oracle::LossCase> losses{{"z", 0.1},
                                             {"balance", 0.2, "step", {{"counts", "any_choice"}, {"divide_by_k", "true"}}}};
  agree_choosing(
      {.router = "expert_choice", .activation = "gelu", .capacity = {.mode = "factor", .factor = 1.4}, .losses = losses});
  agree_choosing({.router = "expert_choice",
                  .noise = "normal",
                  .noise_std = -1,
                  .capacity = {.mode = "absolute", .value = 2, .scope = "micro"},
                  .losses = losses,
                  .options = {{"score_norm", "tokens"}}});
  agree_choosing({.router = "expert_choice",
                  .capacity = {.mode = "token_fraction", .factor = 0.3},
                  .losses = losses,
                  .train = false,
                  .options = {{"score_norm", "tokens"}, {"group", "sequence"}}});
  agree_choosing({.router = "expert_choice",
                  .capacity = {.mode = "factor", .factor = 2, .round = "round"},
                  .train = false,
                  .options = {{"group", "time_step"}}});
}

TEST_CASE("route agrees with every selection tried for expert_choice with a cap per row") {
  for (const auto& [cap, factor] : std::map<std::string, double>{{"1", 0.8}, {"2", 1.7}})
    agree_choosing({.router = "expert_choice",
                    .experts = 3,
                    .capacity = {.mode = "factor", .factor = factor},
                    .options = {{"cap_per_token", cap}, {"cap_iterations", "2000"}}},
                   3);
}

TEST_CASE(
    "route agrees with plain loops for expert_choice by thresholds in evaluation, with drops, and moves them in end_step") {
  agree_choosing({.router = "expert_choice",
                  .capacity = {.mode = "absolute", .value = 2, .priority = "score"},
                  .losses = {{"importance", 0.2}},
                  .train = false,
                  .options = {{"eval", "thresholds"}}});
  const Layer layer{
      .router = "expert_choice", .capacity = {.mode = "factor", .factor = 1.4}, .options = {{"threshold_rate", "0.3"}}};
  expect_agreement_after_step(layer, random_inputs(layer));
}
