#include "core/error.h"
#include "core/select.h"

#include "tests/support/route_case.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

using namespace moelab;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// All columns in order of (-score, column), cut at k.
std::vector<int64_t> select_slow_topk(const std::vector<double>& score, int64_t k) {
  std::vector<int64_t> order(score.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
  order.resize(k);
  return order;
}

// Few distinct values, so that ties are the rule.
std::vector<double> select_tied_scores(std::mt19937& random, int64_t columns) {
  static const std::vector<double> values{-kInfinity, -1.5, 0, 0.25, 0.25, 3};
  std::vector<double> score;
  for (int64_t e = 0; e < columns; ++e) score.push_back(values[random() % values.size()]);
  return score;
}

}  // namespace

TEST_CASE("stable top-k equals a full sort by score, then by column, on 200 rows full of ties and of -inf") {
  std::mt19937 random(1);
  for (int i = 0; i < 200; ++i) {
    const int64_t columns = 1 + random() % 16, k = random() % (columns + 1);
    const std::vector<double> score = select_tied_scores(random, columns);
    const Tensor score_TE = at::tensor(score, at::kDouble).unsqueeze(0);
    const Tensor expected = at::tensor(select_slow_topk(score, k), at::kLong).unsqueeze(0);
    CHECK(stable_topk(score_TE, k).equal(expected));
    CHECK(stable_topk(score_TE.to(at::kFloat), k).equal(expected));
  }
}

TEST_CASE("equal scores go to the lowest experts in order, -inf included") {
  CHECK(stable_topk(at::zeros({2, 5}), 3).equal(at::tensor({0, 1, 2, 0, 1, 2}, at::kLong).view({2, 3})));
  CHECK(stable_topk(at::full({1, 4}, -kInfinity), 4).equal(at::arange(4, at::kLong).unsqueeze(0)));
}

TEST_CASE("stable top-k of no rows, of no choices, and of a transposed matrix") {
  CHECK(stable_topk(at::zeros({0, 3}), 2).sizes() == at::IntArrayRef({0, 2}));
  CHECK(stable_topk(at::zeros({3, 3}), 0).sizes() == at::IntArrayRef({3, 0}));
  const Tensor score_TE = random_tensor(3, {4, 6}).t();
  CHECK(stable_topk(score_TE, 2).equal(stable_topk(score_TE.contiguous(), 2)));
  CHECK_THROWS_AS(stable_topk(at::zeros({1, 2}), 3), std::exception);
}

TEST_CASE("a given noise replaces the raw draw, and another shape is refused") {
  const Tensor x_TD = random_tensor(1, {3, 2});
  const Tensor given = random_tensor(2, {3, 4});
  CHECK(raw_normal(RouteCase(x_TD).noise(given).in, 4).equal(given));
  CHECK(raw_uniform(RouteCase(x_TD).noise(given.select(1, 0)).in, 1).equal(given.slice(1, 0, 1)));
  CHECK_THROWS_AS(raw_normal(RouteCase(x_TD).noise(given).in, 5), Error);
}

TEST_CASE("normal noise adds std times the draw, jitter multiplies the input, and evaluation has neither") {
  const Tensor x_TD = random_tensor(1, {3, 2}), weight_ED = random_tensor(2, {4, 2});
  const Tensor normal_TE = random_tensor(3, {3, 4}), uniform_TD = at::rand({3, 2}, at::kDouble);
  const Tensor clean_TE = x_TD.matmul(weight_ED.t());
  const NoiseSpec normal{.kind = NoiseSpec::Kind::kNormal, .std = 0.3}, jitter{.kind = NoiseSpec::Kind::kJitter, .epsilon = 0.2};

  const NoisyLogits added = noisy_logits(RouteCase(x_TD).train().noise(normal_TE).in, weight_ED, normal);
  CHECK(relative_error(added.noisy_TE, clean_TE + 0.3 * normal_TE) < 1e-14);
  CHECK(relative_error(added.std_TE, at::full_like(clean_TE, 0.3)) < 1e-14);

  const NoisyLogits scaled = noisy_logits(RouteCase(x_TD).train().noise(uniform_TD).in, weight_ED, jitter);
  CHECK(relative_error(scaled.noisy_TE, (x_TD * (0.8 + 0.4 * uniform_TD)).matmul(weight_ED.t())) < 1e-14);
  CHECK(relative_error(scaled.clean_TE, clean_TE) < 1e-14);

  CHECK(noisy_logits(RouteCase(x_TD).in, weight_ED, normal).noisy_TE.equal(clean_TE));
}

TEST_CASE("a bfloat16 input is scored in float32") {
  CHECK(router_logits(at::ones({2, 3}, at::kBFloat16), at::ones({4, 3}, at::kBFloat16)).scalar_type() == at::kFloat);
}

TEST_CASE("the softmax of the choices ignores the other experts and the missing choices") {
  const Tensor logits_TE = numbers({{1, 2, 3, 4}, {0, 0, 5, 0}});
  const Tensor choice_TK = at::tensor({3, 1, 2, -1}, at::kLong).view({2, 2});
  const double e2 = std::exp(2.0);
  CHECK(relative_error(softmax_of_choices(logits_TE, choice_TK), numbers({{e2 / (e2 + 1), 1 / (e2 + 1)}, {1, 0}})) < 1e-14);
  CHECK(gather_choices(logits_TE, choice_TK).equal(numbers({{4, 2}, {5, 0}})));
}

TEST_CASE("renormalised divides by the counted entries plus 1e-9") {
  const Tensor gate_TK = numbers({{0.4, 0.2}, {0.4, 0.2}, {0, 0}});
  const Tensor counted_TK = at::tensor({1, 1, 1, 0, 1, 1}, at::kLong).view({3, 2}).to(at::kBool);
  const Tensor expected = numbers({{0.4 / (0.6 + 1e-9), 0.2 / (0.6 + 1e-9)}, {0.4 / (0.4 + 1e-9), 0.2 / (0.4 + 1e-9)}, {0, 0}});
  CHECK(relative_error(renormalised(gate_TK, counted_TK), expected) < 1e-14);
}

TEST_CASE("a non-finite tensor is an error of divergence that names tensor, layer and step") {
  RouteCase input(numbers({{1, kInfinity}}));
  input.in.layer = 3;
  input.in.step = 17;
  try {
    require_finite(input.in.x_TD, "x", input.in);
    FAIL("no error");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kDiverged);
    CHECK(std::string(error.what()) == "non-finite x in the router of layer 3 at step 17");
  }
}

TEST_CASE("a router without scores gives each of its k choices the gate 1/k") {
  RouterSpec spec;
  spec.max_experts = spec.experts = 3;
  const Tensor choice_TK = at::tensor({0, 2, 1, 0}, at::kLong).view({2, 2});
  const RouteOutput out = finish_unscored(RouteCase(random_tensor(1, {2, 2})).in, spec, choice_TK);
  CHECK(dense_gates(sparse(out)).equal(numbers({{0.5, 0, 0.5}, {0.5, 0.5, 0}})));
  CHECK(out.k == 2);
}
