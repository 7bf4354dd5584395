// The four losses of DynMoE by plain loops: values, landmarks, gradients, and any cut of the rows.
#include "tests/losses/plain_losses.h"
#include "tests/support/route_case.h"

#include <ATen/ATen.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

namespace moelab::dynmoe_losses_test {
namespace {

using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;
using test::make_loss;

constexpr int64_t kRows = 30, kExperts = 6, kActive = 5, kWidth = 4;
const std::vector<std::string> kDynmoeLosses{"diversity", "simplicity", "efficiency", "dynmoe_balance"};

std::unique_ptr<Router> random_dynmoe() {
  auto router = build_router({.name = "dynmoe", .width = kWidth, .experts = kActive, .max_experts = kExperts});
  set_tensor(*router, "weight", random_tensor(1, {kExperts, kWidth}));
  set_tensor(*router, "thresholds", random_tensor(2, {kExperts}).mul(0.5));
  return router;
}

RouteCase rows_between(int64_t from, int64_t to, Mode mode = Mode::kTrain) {
  RouteCase input(random_tensor(3, {kRows, kWidth}).slice(0, from, to));
  input.in.mode = mode;
  return input;
}

Tensor loss_value(const std::string& name, const Router& router, const RouteCase& input, LossScope scope = LossScope::kStep) {
  const LossTerm term{make_loss(name), name, 1, scope};
  const RouteOutput out = route(router, input);
  return local_value(term, collect_statistics(*term.loss, scope, {input.in, out, router, router.spec().max_experts}), router);
}

double loss_of(const std::string& name, const Router& router, const RouteCase& input) {
  return loss_value(name, router, input).item<double>();
}

// 1 where u > 0.
std::vector<std::vector<int>> slow_indicators(const Router& router, const RouteCase& input) {
  const Tensor margin_TE = route(router, input).probes.at("margin").detach();
  std::vector<std::vector<int>> active(margin_TE.size(0), std::vector<int>(margin_TE.size(1)));
  for (size_t t = 0; t < active.size(); ++t)
    for (size_t e = 0; e < active[t].size(); ++e) active[t][e] = margin_TE[t][e].item<double>() > 0;
  return active;
}

int active_in(const std::vector<int>& row) { return static_cast<int>(std::count(row.begin(), row.end(), 1)); }

struct SlowBalance {
  double rows = 0, value = 0;
  std::vector<double> share = std::vector<double>(kExperts), probability = std::vector<double>(kExperts);
};

SlowBalance slow_dynmoe_balance(const std::vector<std::vector<int>>& active) {
  SlowBalance sums;
  for (const auto& row : active) sums.rows += active_in(row) > 0;
  for (const auto& row : active)
    for (size_t e = 0; e < row.size(); ++e) {
      sums.share[e] += row[e] / sums.rows;
      if (row[e]) sums.probability[e] += 1.0 / active_in(row) / sums.rows;
    }
  for (size_t e = 0; e < kExperts; ++e) sums.value += kExperts * sums.share[e] * sums.probability[e];
  return sums;
}

double slow_diversity(const Tensor& weight_ED, const std::vector<int64_t>& experts) {
  double sum = 0;
  for (const int64_t a : experts)
    for (const int64_t b : experts) {
      const Tensor first = weight_ED[a], second = weight_ED[b];
      const double cosine = first.dot(second).item<double>() / first.norm().item<double>() / second.norm().item<double>();
      sum += (cosine - (a == b)) * (cosine - (a == b));
    }
  return std::sqrt(sum);
}

// ∂u/∂G = -σ(G)(1 - σ(G)).
double threshold_slope(const Router& router, int64_t expert) {
  const double bar = find_tensor(router, "thresholds")[expert].sigmoid().item<double>();
  return -bar * (1 - bar);
}

Tensor threshold_gradient(const std::string& name, const Router& router) {
  router.zero_grad();
  loss_value(name, router, rows_between(0, kRows)).backward();
  return find_tensor(router, "thresholds").grad();
}

// Rows t = 0 … E-1 take k experts from first(t) on, in a circle.
double landmark_value(const std::string& name, const std::function<int64_t(int64_t)>& first, int64_t k) {
  std::vector<std::vector<int64_t>> choices(kExperts);
  for (int64_t t = 0; t < kExperts; ++t)
    for (int64_t rank = 0; rank < k; ++rank) choices[t].push_back((first(t) + rank) % kExperts);
  const Tensor choice_TK = test::choices_of(choices);
  const RouteOutput out = test::decision_of(choice_TK, at::full(choice_TK.sizes(), 1.0 / k, at::kDouble), {});
  return test::value_of(*make_loss(name), test::input_of(kExperts), out, kExperts).item<double>();
}

}  // namespace

TEST_CASE("3.10 diversity of the oracle's four directions is 2.1726, whatever their lengths") {
  auto router = build_router({.name = "dynmoe", .width = 2});
  for (const double length : {1.0, 7.0}) {
    set_tensor(*router, "weight", numbers({{1, 0}, {0, 1}, {-1, 0}, {.6, .8}}).mul(length));
    CHECK_THAT(loss_of("diversity", *router, RouteCase(numbers({{1, 0}}))), WithinAbs(2.1726, 5.1e-5));
    CHECK_THAT(loss_of("simplicity", *router, RouteCase(numbers({{1, 0}}))), WithinRel(length, 1e-14));
  }
}

TEST_CASE("1.3 diversity counts active experts only, simplicity all max_experts, by plain loops") {
  const auto router = random_dynmoe();
  const Tensor weight_ED = find_tensor(*router, "weight").detach();
  double length = 0;
  for (int64_t e = 0; e < kExperts; ++e) length += weight_ED[e].norm().item<double>() / kExperts;
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const RouteCase input = rows_between(0, kRows, mode);
    CHECK_THAT(loss_of("diversity", *router, input), WithinRel(slow_diversity(weight_ED, {0, 1, 2, 3, 4}), 1e-12));
    CHECK_THAT(loss_of("simplicity", *router, input), WithinRel(length, 1e-12));
  }
  set_tensor(*router, "mask", at::tensor({0.0, 1.0, 1.0, 0.0, 0.0, 1.0}, at::kDouble));
  CHECK_THAT(loss_of("diversity", *router, rows_between(0, kRows)), WithinRel(slow_diversity(weight_ED, {1, 2, 5}), 1e-12));
}

TEST_CASE("1.3 diversity is 0 for orthonormal directions and for one expert") {
  auto router = build_router({.name = "dynmoe", .width = 5, .experts = 3});
  CHECK(loss_of("diversity", *router, RouteCase(random_tensor(1, {4, 5}))) < 1e-14);
  auto alone = build_router({.name = "dynmoe", .width = 5, .experts = 1});
  CHECK(loss_of("diversity", *alone, RouteCase(random_tensor(1, {4, 5}))) < 1e-14);
}

TEST_CASE("1.3 gradients of diversity and simplicity by the weight equal central differences") {
  const auto router = random_dynmoe();
  for (const char* name : {"diversity", "simplicity"}) {
    const auto value = [&] { return loss_value(name, *router, rows_between(0, kRows)); };
    CHECK(gradient_error(value, find_tensor(*router, "weight")) < 1e-8);
  }
}

TEST_CASE("1.3 efficiency and dynmoe_balance equal plain loops over the indicators; a fallback of evaluation is no indicator") {
  const auto router = random_dynmoe();
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const RouteCase input = rows_between(0, kRows, mode);
    const auto active = slow_indicators(*router, input);
    double used = 0, without = 0;
    for (const auto& row : active) used += active_in(row), without += active_in(row) == 0;
    REQUIRE(without > 0);
    CHECK_THAT(loss_of("efficiency", *router, input), WithinRel(used / (kRows * kExperts), 1e-13));
    CHECK_THAT(loss_of("dynmoe_balance", *router, input), WithinRel(slow_dynmoe_balance(active).value, 1e-13));
  }
}

TEST_CASE("contract 3: efficiency's gradient by u is 1/(rows · max_experts) for active experts, straight through") {
  const auto router = random_dynmoe();
  const Tensor gradient_E = threshold_gradient("efficiency", *router);
  const auto active = slow_indicators(*router, rows_between(0, kRows));
  for (int64_t e = 0; e < kExperts; ++e) {
    double expected = 0;
    for (const auto& row : active) expected += row[e] * threshold_slope(*router, e) / (kRows * kExperts);
    CHECK_THAT(gradient_E[e].item<double>(), WithinAbs(expected, 1e-15));
  }
}

TEST_CASE("contract 3: dynmoe_balance differentiates indicator/K through K, and not the counts") {
  const auto router = random_dynmoe();
  const Tensor gradient_E = threshold_gradient("dynmoe_balance", *router);
  const auto active = slow_indicators(*router, rows_between(0, kRows));
  const SlowBalance sums = slow_dynmoe_balance(active);
  for (size_t e = 0; e < kExperts; ++e) {
    double expected = 0;
    for (const auto& row : active) {
      if (!row[e]) continue;
      const double used = active_in(row);
      double slope = sums.share[e] / used;  // ∂/∂m_e of Σ_j f_j m_j/K
      for (size_t j = 0; j < kExperts; ++j) slope -= sums.share[j] * row[j] / (used * used);
      expected += kExperts / sums.rows * slope * threshold_slope(*router, static_cast<int64_t>(e));
    }
    CHECK_THAT(gradient_E[static_cast<int64_t>(e)].item<double>(), WithinAbs(expected, 1e-14));
  }
}

TEST_CASE("1.3 landmarks: dynmoe_balance is K at balance and E at collapse, efficiency k/E; unknown where k varies") {
  for (const int64_t k : {1, 2, 3}) {
    for (const char* name : {"dynmoe_balance", "efficiency"}) {
      const Landmarks landmarks = make_loss(name)->landmarks(kExperts, k);
      CHECK_THAT(landmark_value(name, [](int64_t t) { return t; }, k), WithinRel(landmarks.balance, 1e-12));
      CHECK_THAT(landmark_value(name, [](int64_t) { return 0; }, k), WithinRel(landmarks.collapse, 1e-12));
    }
    CHECK(make_loss("dynmoe_balance")->landmarks(kExperts, k).balance == k);
    CHECK(make_loss("dynmoe_balance")->landmarks(kExperts, k).collapse == kExperts);
  }
  CHECK(std::isnan(make_loss("dynmoe_balance")->landmarks(kExperts, 0).balance));
  CHECK(std::isnan(make_loss("efficiency")->landmarks(kExperts, 0).balance));
  CHECK(std::isnan(make_loss("diversity")->landmarks(kExperts, 2).balance));
  CHECK(std::isnan(make_loss("simplicity")->landmarks(kExperts, 2).collapse));
}

TEST_CASE("DynMoE's losses and their gradients do not depend on how a step is cut, empty parts included") {
  const auto router = random_dynmoe();
  for (const std::string& name : kDynmoeLosses) {
    CAPTURE(name);
    const auto loss = make_loss(name);
    router->zero_grad();
    const Tensor whole = loss_value(name, *router, rows_between(0, kRows));
    whole.backward();
    const Tensor expected_ED = find_tensor(*router, "weight").grad().clone();
    router->zero_grad();
    LossStatistics total;
    std::vector<LossStatistics> parts;
    for (const auto& [from, to] : {std::pair{0, 7}, std::pair{7, 7}, std::pair{7, 30}}) {
      const RouteCase input = rows_between(from, to);
      const RouteOutput out = route(*router, input);
      parts.push_back(collect_statistics(*loss, LossScope::kStep, {input.in, out, *router, kExperts}).front());
      total.rows += parts.back().rows;
      for (size_t i = 0; i < parts.back().sums.size(); ++i) {
        if (i < total.sums.size()) total.sums[i] = total.sums[i].add(parts.back().sums[i].detach());
        else total.sums.push_back(parts.back().sums[i].detach());
      }
    }
    CHECK(relative_error(loss->value(total, *router), whole) < 1e-13);
    for (const LossStatistics& part : parts) inner_product(statistics_gradient(*loss, total, *router), part).backward();
    CHECK(relative_error(find_tensor(*router, "weight").grad(), expected_ED) < 1e-12);
  }
}

TEST_CASE("DynMoE's losses are 0 without rows and work per sequence") {
  const auto router = random_dynmoe();
  for (const std::string& name : kDynmoeLosses) {
    CAPTURE(name);
    CHECK(loss_of(name, *router, rows_between(0, 0)) == 0);
    RouteCase cut = rows_between(0, 9);
    cut.sequences({0, 1, 0, 1, 0, 0, 1, 1, 0});
    const double by_sequence = loss_value(name, *router, cut, LossScope::kSequence).item<double>();
    CHECK(std::isfinite(by_sequence));
    if (name != "dynmoe_balance") CHECK_THAT(by_sequence, WithinRel(loss_of(name, *router, cut), 1e-12));
  }
}

TEST_CASE("DynMoE's losses refuse routers without a straight-through choice of a variable number of experts") {
  for (const std::string& name : kDynmoeLosses) {
    const LossEntry& entry = Registry<LossEntry>::instance().find(name);
    CHECK_FALSE(entry.refuses({.variable_k = true}).empty());
    CHECK_FALSE(entry.refuses({}).empty());
    CHECK(entry.refuses(Registry<RouterEntry>::instance().find("dynmoe").facts).empty());
  }
}

}  // namespace moelab::dynmoe_losses_test
