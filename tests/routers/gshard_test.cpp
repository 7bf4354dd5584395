#include "tests/routers/oracle.h"

#include "core/error.h"
#include "core/loss.h"
#include "core/model/block.h"

using namespace moelab;

namespace {

std::unique_ptr<Router> gshard_oracle(const char* renormalise, const CapacityPolicy& capacity = {}) {
  return oracle_router({.name = "gshard", .options = {{"renormalise", word(renormalise)}}, .capacity = capacity});
}

// p1 and p2 of plain loops.
std::pair<double, double> gshard_slow_probs(const std::vector<double>& z) {
  const std::vector<double> p = slow_softmax(z);
  return {p[slow_argmax(z)], p[slow_argmax(z, 1)]};
}

std::unique_ptr<Router> gshard_with(const char* second_expert, double threshold = 0.5) {
  auto router = build_router({.name = "gshard", .width = 5, .experts = 6,
                              .options = {{"second_expert", word(second_expert)}, {"threshold", threshold}}});
  set_tensor(*router, "weight", random_tensor(1, {6, 5}));
  return router;
}

// The second choices that survive, as the router tells.
std::vector<bool> gshard_second_kept(const RouteOutput& out) {
  std::vector<bool> kept;
  for (int64_t t = 0; t < out.assignment.kept_TK.size(0); ++t) {
    CHECK(out.assignment.kept_TK[t][0].item<bool>());
    kept.push_back(out.assignment.kept_TK[t][1].item<bool>());
  }
  CHECK_FALSE(out.assignment.dropped_TK.any().item<bool>());  // refused is not dropped
  return kept;
}

}  // namespace

TEST_CASE("gshard oracle (spec 2.2): choices, and gates divided by p1 + p2") {
  const RouteOutput out = route(*gshard_oracle("before_drop"), RouteCase(numbers(kOracleLogits)));
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 1, 0, 1, 0, 1, 0, 2}).view({4, 2})));
  CHECK(printed_digits_agree(out.gate_TK, numbers({{.7311, .2689}, {.5250, .4750}, {.5250, .4750}, {.7311, .2689}})));
}

TEST_CASE("gshard oracle (spec 2.2): with C = 3 row 3 loses its first choice; .2689 before the drop, 1 after it") {
  const CapacityPolicy three{.mode = CapacityPolicy::Mode::kAbsolute, .value = 3};
  for (const auto& [renormalise, expected] : {std::pair{"before_drop", .2689}, std::pair{"after_drop", 1.0}}) {
    INFO(renormalise);
    const RouteOutput out = route(*gshard_oracle(renormalise, three), RouteCase(numbers(kOracleLogits)));
    CHECK(sparse(out).dropped_token_M.equal(longs_of({3})));
    CHECK(sparse(out).dropped_expert_M.equal(longs_of({0})));
    CHECK(std::abs(dense_gates(sparse(out))[3][2].item<double>() - expected) < 5.1e-5);
  }
  const RouteOutput raw = route(*gshard_oracle("none", three), RouteCase(numbers(kOracleLogits)));
  CHECK(std::abs(dense_gates(sparse(raw))[3][2].item<double>() - .2654) < 5.1e-5);
}

TEST_CASE("gshard oracle (spec 2.3): the balance loss that counts both choices is 2.4117") {
  const RouteOutput out = route(*gshard_oracle("before_drop"), RouteCase(numbers(kOracleLogits)));
  Rows probs;
  for (const auto& z : kOracleLogits) probs.push_back(slow_softmax(z));
  CHECK(std::abs(slow_balance(out, 2, probs) - 2.4117) < 5.1e-5);
}

TEST_CASE("gshard's paper capacity is 2·rows/E, first choices first") {
  const CapacityPolicy paper = Registry<RouterEntry>::instance().find("gshard").paper_capacity;
  CHECK(paper.places(12, 4, 2) == 6);
  CHECK(paper.order == CapacityPolicy::Order::kChoiceMajor);
}

TEST_CASE("each policy of the second expert equals plain loops with the draw given (contract section 4)") {
  const int64_t rows = 40;
  const Tensor x_TD = random_tensor(2, {rows, 5}), u_T = at::rand({rows}, at::kDouble);
  const Rows z = slow_linear(x_TD, random_tensor(1, {6, 5}));
  const double threshold = 0.35;
  const auto expected = [&](const std::string& policy, int64_t t) {
    const auto [p1, p2] = gshard_slow_probs(z[t]);
    const double g2 = p2 / (p1 + p2), u = u_T[t].item<double>();
    if (policy == "random_2g") return u < g2 / threshold;
    if (policy == "random_2p") return u < 2 * p2;
    if (policy == "threshold") return g2 > threshold;
    return policy == "all";
  };
  for (const char* policy : {"random_2g", "random_2p", "threshold", "all", "none"}) {
    INFO(policy);
    const RouteOutput out = route(*gshard_with(policy, threshold), RouteCase(x_TD).train().noise(u_T));
    const std::vector<bool> kept = gshard_second_kept(out);
    for (int64_t t = 0; t < rows; ++t) {
      CHECK(kept[t] == expected(policy, t));
      const auto [p1, p2] = gshard_slow_probs(z[t]);  // a refused partner still counts in the sum
      CHECK(std::abs(out.gate_TK[t][0].item<double>() - p1 / (p1 + p2 + 1e-9)) < 1e-12);
      CHECK(std::abs(out.gate_TK[t][1].item<double>() - p2 / (p1 + p2 + 1e-9)) < 1e-12);
    }
  }
}

TEST_CASE("gumbel takes the argmax of logits plus noise without the first, with its clean probability as gate") {
  const int64_t rows = 40;
  const Tensor x_TD = random_tensor(2, {rows, 5}), gumbel_TE = random_tensor(3, {rows, 6}) * 2;
  const Rows z = slow_linear(x_TD, random_tensor(1, {6, 5}));
  const RouteOutput out = route(*gshard_with("gumbel"), RouteCase(x_TD).train().noise(gumbel_TE));
  int64_t differs = 0;
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t first = slow_argmax(z[t]);
    std::vector<double> contest = z[t];
    for (int64_t e = 0; e < 6; ++e) contest[e] += gumbel_TE[t][e].item<double>();
    contest[first] = -1e300;
    const int64_t second = slow_argmax(contest);
    differs += second != slow_argmax(z[t], 1);
    CHECK(out.assignment.choice_TK[t].equal(longs_of({first, second})));
    const std::vector<double> p = slow_softmax(z[t]);
    CHECK(std::abs(out.gate_TK[t][1].item<double>() - p[second] / (p[first] + p[second] + 1e-9)) < 1e-12);
  }
  CHECK(differs > 5);
}

TEST_CASE("gshard is random in training and keeps every second expert in evaluation") {
  const Tensor x_TD = random_tensor(2, {200, 5});
  const auto router = gshard_with("random_2g");
  const std::vector<bool> trained = gshard_second_kept(route(*router, RouteCase(x_TD).train()));
  const auto kept = std::count(trained.begin(), trained.end(), true);
  CHECK(kept > 20);
  CHECK(kept < 180);
  const std::vector<bool> evaluated = gshard_second_kept(route(*router, RouteCase(x_TD)));
  CHECK(std::count(evaluated.begin(), evaluated.end(), true) == 200);
  CHECK(router->facts().noisy_in_training);
  CHECK_FALSE(router->facts().random_in_eval);
}

TEST_CASE("gshard's facts follow its policies") {
  const auto facts = [](std::map<std::string, OptionValue> options) {
    return build_router({.name = "gshard", .options = std::move(options)})->facts();
  };
  CHECK_FALSE(facts({{"second_expert", word("all")}}).noisy_in_training);
  CHECK_FALSE(facts({{"second_expert", word("threshold")}}).noisy_in_training);
  CHECK(facts({{"second_expert", word("gumbel")}}).noisy_in_training);
  CHECK(facts({{"second_expert_eval", word("random_2p")}}).random_in_eval);
}

TEST_CASE("each policy takes the noise of its own shape") {
  const RouteCase input = RouteCase(random_tensor(2, {7, 5})).train();
  CHECK_THROWS_AS(route(*gshard_with("random_2g"), RouteCase(input).noise(random_tensor(3, {7, 6}))), Error);
  CHECK_THROWS_AS(route(*gshard_with("gumbel"), RouteCase(input).noise(random_tensor(3, {7}))), Error);
}

TEST_CASE("noise on gshard's logits moves choice and gates, and a given draw stays the second expert's") {
  const RouterCase wanted{.name = "gshard", .width = 5, .experts = 6, .noise = {.kind = NoiseSpec::Kind::kNormal, .std = 3}};
  const auto router = build_router(wanted);
  const Tensor x_TD = random_tensor(2, {30, 5});
  const RouteOutput none = route(*router, RouteCase(x_TD).train().noise(at::ones({30}, at::kDouble)));
  const RouteOutput all = route(*router, RouteCase(x_TD).train().noise(at::zeros({30}, at::kDouble)));
  CHECK(none.scores.noisy_TE.equal(all.scores.noisy_TE));
  CHECK_FALSE(none.scores.noisy_TE.equal(none.scores.clean_TE));
  CHECK(none.assignment.kept_TK.select(1, 1).any().item<bool>() == false);
  CHECK(all.assignment.kept_TK.all().item<bool>());
}

TEST_CASE("with one expert gshard has no second choice") {
  const RouteOutput out = route(*build_router({.name = "gshard", .experts = 1}), RouteCase(random_tensor(1, {5, 4})).train());
  CHECK(out.k == 1);
  CHECK(relative_error(out.gate_TK, at::ones({5, 1}, at::kDouble)) < 1e-8);
}

// With k = 2 the importance loss, E/k - 1 at collapse, would be said to be able to fall below 0.
TEST_CASE("landmarks of gshard with one expert are those of one choice") {
  const auto router = build_router({.name = "gshard", .experts = 1});
  const int64_t k = choices_per_row(router->facts(), router->spec());
  CHECK(k == 1);
  const LossEntry& importance = Registry<LossEntry>::instance().find("importance");
  CHECK(importance.make(Options(importance.options), router->entry())->landmarks(1, k).collapse == 0);
  CHECK(choices_per_row(router->facts(), build_router({.name = "gshard", .experts = 3})->spec()) == 2);
}

TEST_CASE("gradients of gshard equal finite differences with the selection frozen, for each normalisation") {
  for (const char* renormalise : {"none", "before_drop", "after_drop"}) {
    INFO(renormalise);
    const auto router = build_router({.name = "gshard", .width = 5, .experts = 4, .options = {{"renormalise", word(renormalise)}},
                                      .capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = 1}});
    set_tensor(*router, "weight", random_tensor(1, {4, 5}));
    CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(2, {11, 5})).train()) < 1e-7);
  }
}
