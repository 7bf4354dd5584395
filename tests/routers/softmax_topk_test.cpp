#include "tests/routers/oracle.h"

using namespace moelab;

namespace {

std::unique_ptr<Router> softmax_topk_with(const char* softmax, const char* renormalise, int64_t k = 2,
                                          const CapacityPolicy& capacity = {}) {
  auto router = build_router({.name = "softmax_topk", .width = 5, .experts = 4,
                              .options = {{"k", k}, {"softmax", word(softmax)}, {"renormalise", word(renormalise)}},
                              .capacity = capacity});
  set_tensor(*router, "weight", random_tensor(1, {4, 5}));
  return router;
}

}  // namespace

TEST_CASE("softmax_topk on the logits of spec 2.1: softmax before keeps p, after is the softmax of the two chosen") {
  const auto gates = [](const char* softmax) {
    const auto router = oracle_router({.name = "softmax_topk", .options = {{"softmax", word(softmax)}}});
    return route(*router, RouteCase(numbers(kOracleLogits))).gate_TK;
  };
  CHECK(printed_digits_agree(gates("before"), numbers({{.6652, .2447}, {.5033, .4554}, {.3672, .3322}, {.7214, .2654}})));
  CHECK(printed_digits_agree(gates("after"), numbers({{.7311, .2689}, {.5250, .4750}, {.5250, .4750}, {.7311, .2689}})));
}

TEST_CASE("softmax_topk oracle (spec 1.3 and 2.3): the balance loss of any choice is 2.4117") {
  const auto router = oracle_router({.name = "softmax_topk"});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  Rows probs;
  for (const auto& z : kOracleLogits) probs.push_back(slow_softmax(z));
  CHECK(std::abs(slow_balance(out, 2, probs) - 2.4117) < 5.1e-5);
  CHECK(std::abs(slow_balance(out, 1, probs) - 1.6928) < 5.1e-5);
}

TEST_CASE("softmax_topk equals plain loops for softmax before and after") {
  const int64_t rows = 15, k = 3;
  const Tensor x_TD = random_tensor(2, {rows, 5});
  const Rows z = slow_linear(x_TD, random_tensor(1, {4, 5}));
  for (const bool before : {true, false}) {
    const RouteOutput out = route(*softmax_topk_with(before ? "before" : "after", "none", k), RouteCase(x_TD));
    for (int64_t t = 0; t < rows; ++t) {
      std::vector<double> chosen;
      for (int64_t rank = 0; rank < k; ++rank) chosen.push_back(z[t][slow_argmax(z[t], rank)]);
      for (int64_t rank = 0; rank < k; ++rank) {
        const double expected = before ? slow_softmax(z[t])[slow_argmax(z[t], rank)] : slow_softmax(chosen)[rank];
        CHECK(out.assignment.choice_TK[t][rank].item<int64_t>() == slow_argmax(z[t], rank));
        CHECK(std::abs(out.gate_TK[t][rank].item<double>() - expected) < 1e-12);
      }
    }
  }
}

TEST_CASE("softmax before with renormalisation is softmax after, when nothing is dropped") {
  const RouteCase input(random_tensor(2, {9, 5}));
  const Tensor after = route(*softmax_topk_with("after", "none"), input).gate_TK;
  CHECK(relative_error(route(*softmax_topk_with("before", "before_drop"), input).gate_TK, after) < 1e-8);
  CHECK(relative_error(dense_gates(sparse(route(*softmax_topk_with("before", "after_drop"), input))),
                       dense_gates(sparse(route(*softmax_topk_with("after", "none"), input)))) < 1e-8);
}

TEST_CASE("the three normalisations differ once a pair is dropped") {
  // Row 0 takes the only place of expert 0, so that row 1 keeps its second choice alone.
  const CapacityPolicy one{.mode = CapacityPolicy::Mode::kAbsolute, .value = 1};
  const Tensor z_TE = numbers({{3, 1, 0}, {3, 0, 1}});
  const auto kept_gate = [&](const char* renormalise) {
    const auto router = oracle_router({.name = "softmax_topk", .options = {{"renormalise", word(renormalise)}}, .capacity = one});
    return dense_gates(sparse(route(*router, RouteCase(z_TE))))[1];
  };
  const std::vector<double> p = slow_softmax({3, 0, 1});
  CHECK(relative_error(kept_gate("none"), at::tensor({0.0, 0.0, p[2]}, at::kDouble)) < 1e-12);
  CHECK(relative_error(kept_gate("before_drop"), at::tensor({0.0, 0.0, p[2] / (p[0] + p[2] + 1e-9)}, at::kDouble)) < 1e-12);
  CHECK(relative_error(kept_gate("after_drop"), at::tensor({0.0, 0.0, p[2] / (p[2] + 1e-9)}, at::kDouble)) < 1e-12);
}

TEST_CASE("k = 1: softmax after the selection gives the router no task gradient, softmax before does (spec 0.3, 6)") {
  for (const bool before : {true, false}) {
    const auto router = softmax_topk_with(before ? "before" : "after", "none", 1);
    sparse(route(*router, RouteCase(random_tensor(2, {9, 5})).train())).gate_N.mul(random_tensor(3, {9})).sum().backward();
    const double gradient = find_tensor(*router, "weight").grad().abs().max().item<double>();
    if (before) CHECK(gradient > 1e-3);
    else CHECK(gradient == 0);
  }
}

TEST_CASE("softmax_topk has no noise of its own, and takes the kinds of [moe.noise]") {
  const Tensor x_TD = random_tensor(2, {9, 3}), draw_TE = random_tensor(3, {9, 3});
  const auto quiet = oracle_router({.name = "softmax_topk"});
  CHECK(route(*quiet, RouteCase(x_TD).train()).scores.noisy_TE.equal(x_TD));
  CHECK_FALSE(quiet->facts().noisy_in_training);
  const auto normal = oracle_router({.name = "softmax_topk", .noise = {.kind = NoiseSpec::Kind::kNormal, .std = 0.7}});
  CHECK(relative_error(route(*normal, RouteCase(x_TD).train().noise(draw_TE)).scores.noisy_TE, x_TD + 0.7 * draw_TE) < 1e-14);
  CHECK(normal->facts().noisy_in_training);
}

TEST_CASE("gradients of softmax_topk equal finite differences with the selection frozen, for each convention, with drops") {
  const CapacityPolicy tight{.mode = CapacityPolicy::Mode::kFactor, .factor = 1.2};
  for (const char* softmax : {"before", "after"})
    for (const char* renormalise : {"none", "before_drop", "after_drop"}) {
      INFO(softmax << " " << renormalise);
      CHECK(frozen_gradient_error(*softmax_topk_with(softmax, renormalise, 2, tight),
                                  RouteCase(random_tensor(2, {11, 5})).train()) < 1e-7);
    }
}
