#include "tests/routers/oracle.h"

#include "core/loss.h"

using namespace moelab;

namespace {

std::vector<std::vector<int64_t>> chosen_by_row(const RouteOutput& out) {
  std::vector<std::vector<int64_t>> rows(out.assignment.choice_TK.size(0));
  for (size_t t = 0; t < rows.size(); ++t)
    for (int64_t rank = 0; rank < out.assignment.choice_TK.size(1); ++rank) {
      const int64_t expert = out.assignment.choice_TK[static_cast<int64_t>(t)][rank].item<int64_t>();
      if (expert >= 0) rows[t].push_back(expert);
    }
  return rows;
}

RouteOutput top_p_oracle(double p, int64_t k_max = 0) {
  return route(*oracle_router({.name = "top_p", .options = {{"p", p}, {"k_max", k_max}}}), RouteCase(numbers(kOracleLogits)));
}

std::unique_ptr<Router> top_p_random(double p, int64_t k_max = 0, const CapacityPolicy& capacity = {}) {
  auto router = build_router(
      {.name = "top_p", .width = 5, .experts = 6, .options = {{"p", p}, {"k_max", k_max}}, .capacity = capacity});
  set_tensor(*router, "weight", random_tensor(1, {6, 5}));
  return router;
}

// The value of one of the paper's losses over all rows.
double top_p_loss(const Router& router, const RouteCase& input, const std::string& name) {
  const LossEntry& entry = Registry<LossEntry>::instance().find(name);
  Options options(entry.options);
  for (const PaperLoss& paper : router.entry().paper_losses)
    for (const OptionSpec& key : entry.options)
      if (paper.name == name && paper.options.count(key.name)) options.set(key, paper.options.at(key.name));
  const auto loss = entry.make(options, router.entry());
  const RouteOutput out = route(router, input);
  const LossInput seen{input.in, out, router, router.spec().max_experts};
  return loss->value(collect_statistics(*loss, LossScope::kStep, seen).front(), router).item<double>();
}

}  // namespace

TEST_CASE("top_p oracle (spec 3.9): experts per row at p = .4, .5, .7, .9, and the mean of their number") {
  using Sets = std::vector<std::vector<int64_t>>;
  const std::vector<std::tuple<double, Sets, double>> oracle{{.4, {{0}, {0}, {0, 1}, {0}}, 1.25},
                                                             {.5, {{0}, {0}, {0, 1}, {0}}, 1.25},
                                                             {.7, {{0, 1}, {0, 1}, {0, 1, 2}, {0}}, 2.0},
                                                             {.9, {{0, 1}, {0, 1}, {0, 1, 2}, {0, 2}}, 2.25}};
  for (const auto& [p, expected, mean] : oracle) {
    INFO(p);
    const RouteOutput out = top_p_oracle(p);
    CHECK(chosen_by_row(out) == expected);
    CHECK(out.probes.at("k").to(at::kDouble).mean().item<double>() == mean);
    CHECK(out.k == 0);
  }
}

TEST_CASE("top_p oracle (spec 3.9, 1.4): gates are the probabilities, not renormalised, the tail 0") {
  CHECK(printed_digits_agree(dense_gates(sparse(top_p_oracle(.4))),
                             numbers({{.6652, 0, 0}, {.5033, 0, 0}, {.3672, .3322, 0}, {.7214, 0, 0}})));
}

TEST_CASE(
    "top_p oracle (spec 3.9): the entropies are .8324, .8354, 1.0953, .6448, their mean is .8520, and the paper weighs them with "
    "1e-4") {
  const auto router = oracle_router({.name = "top_p"});
  CHECK(std::abs(top_p_loss(*router, RouteCase(numbers(kOracleLogits)), "entropy") - .8520) < 5.1e-5);
  const std::vector<double> row_entropies{.8324, .8354, 1.0953, .6448};
  for (size_t t = 0; t < row_entropies.size(); ++t)
    CHECK(std::abs(top_p_loss(*router, RouteCase(numbers({kOracleLogits[t]})), "entropy") - row_entropies[t]) < 5.1e-5);
  const auto& losses = router->entry().paper_losses;
  REQUIRE(losses.size() == 2);
  CHECK(losses[0].coefficient == 1e-2);
  CHECK(losses[1].coefficient == 1e-4);
}

TEST_CASE("top_p's balance loss (spec 3.9, 1.3): f is the share of the choices; 1 where probabilities are uniform") {
  const auto router = oracle_router({.name = "top_p"});
  // p = .4: choices 0, 0, 0 and 1, 0, so f = (4/5, 1/5, 0); P = (.5643, .2614, .1743).
  const double by_hand = 3 * (.8 * .5643 + .2 * .2614);
  CHECK(std::abs(top_p_loss(*router, RouteCase(numbers(kOracleLogits)), "balance") - by_hand) < 3e-4);
  CHECK(std::abs(top_p_loss(*router, RouteCase(at::zeros({5, 3}, at::kDouble)), "balance") - 1) < 1e-14);
  CHECK(top_p_loss(*router, RouteCase(at::zeros({0, 3}, at::kDouble)), "balance") == 0);
}

TEST_CASE("top_p (spec 3.9): p = 0 takes the best alone, p = 1 all, one probability above p settles it") {
  for (const auto& row : chosen_by_row(top_p_oracle(0))) CHECK(row.size() == 1);
  for (const auto& row : chosen_by_row(top_p_oracle(1))) CHECK(row.size() == 3);
  CHECK(chosen_by_row(top_p_oracle(.72))[3].size() == 1);  // .7214
  const auto router = build_router({.name = "top_p", .width = 3, .experts = 3, .options = {{"p", 1.0}}, .dtype = at::kFloat});
  const RouteOutput out = route(*router, RouteCase((random_tensor(5, {50, 3}) * 40).to(at::kFloat)));
  CHECK(out.probes.at("k").eq(3).all().item<bool>());
}

TEST_CASE("top_p (spec 3.9): uniform probabilities keep ⌊pE⌋ + 1 experts, the lowest ones") {
  for (const int64_t experts : {1, 4, 8, 16})
    for (const double p : {0.0, .1, .25, .4, .5, .75, .9}) {
      INFO("E = " << experts << ", p = " << p);
      const auto router = build_router({.name = "top_p", .experts = experts, .options = {{"p", p}}});
      const auto rows = chosen_by_row(route(*router, RouteCase(at::zeros({2, 4}, at::kDouble))));
      std::vector<int64_t> expected(static_cast<size_t>(p * static_cast<double>(experts)) + 1);
      for (size_t e = 0; e < expected.size(); ++e) expected[e] = static_cast<int64_t>(e);
      CHECK(rows[0] == expected);
      CHECK(rows[1] == expected);
    }
}

TEST_CASE("top_p (spec 3.9): the number of experts does not fall with p, and their sum exceeds p or all are taken") {
  const Tensor x_TD = random_tensor(2, {40, 5});
  Tensor before_T = at::zeros({40}, at::kLong);
  for (const double p : {0.0, .2, .4, .6, .8, .95, 1.0}) {
    const RouteOutput out = route(*top_p_random(p), RouteCase(x_TD));
    const Tensor k_T = out.probes.at("k");
    CHECK(k_T.ge(before_T).all().item<bool>());
    CHECK(dense_gates(sparse(out)).sum(1).gt(p).logical_or(k_T.eq(6)).all().item<bool>());
    before_T = k_T;
  }
}

TEST_CASE("top_p equals plain loops, with k_max cutting the prefix") {
  const Tensor x_TD = random_tensor(2, {40, 5});
  const Rows z = slow_linear(x_TD, random_tensor(1, {6, 5}));
  for (const int64_t k_max : {0, 1, 2, 6, 9}) {
    const RouteOutput out = route(*top_p_random(.7, k_max), RouteCase(x_TD));
    const auto rows = chosen_by_row(out);
    for (size_t t = 0; t < 40; ++t) {
      const std::vector<double> probs = slow_softmax(z[t]);
      std::vector<int64_t> expected;
      for (double sum = 0; sum <= .7; sum += probs[expected.back()])
        expected.push_back(slow_argmax(probs, static_cast<int64_t>(expected.size())));
      if (k_max > 0) expected.resize(std::min<size_t>(expected.size(), k_max));
      CHECK(rows[t] == expected);
      for (size_t rank = 0; rank < expected.size(); ++rank)
        CHECK(std::abs(out.gate_TK[static_cast<int64_t>(t)][static_cast<int64_t>(rank)].item<double>() - probs[expected[rank]]) <
              1e-12);
    }
  }
}

TEST_CASE("top_p in training is top_p in evaluation (spec 3.9), unless noise is asked for") {
  const Tensor x_TD = random_tensor(2, {40, 5});
  const auto router = top_p_random(.6);
  CHECK(dense_gates(sparse(route(*router, RouteCase(x_TD).train()))).equal(dense_gates(sparse(route(*router, RouteCase(x_TD))))));
  CHECK_FALSE(router->facts().noisy_in_training);
  CHECK(router->facts().variable_k);
}

TEST_CASE("experts that are not there yet are none of top_p's, also at p = 1") {
  for (const double p : {.4, 1.0}) {
    const auto router = build_router({.name = "top_p", .width = 5, .experts = 3, .max_experts = 6, .options = {{"p", p}}});
    const RouteOutput out = route(*router, RouteCase(random_tensor(2, {40, 5})));
    CHECK(out.assignment.choice_TK.max().item<int64_t>() == 2);
    CHECK(out.scores.loss_TE.slice(1, 3).abs().max().item<double>() == 0);
    if (p == 1) CHECK(out.probes.at("k").eq(3).all().item<bool>());
  }
}

TEST_CASE("gradients of top_p equal finite differences with the selection frozen, drops included") {
  const CapacityPolicy capacity{.mode = CapacityPolicy::Mode::kFactor, .factor = 1.5};
  CHECK(frozen_gradient_error(*top_p_random(.7, 3, capacity), RouteCase(random_tensor(2, {11, 5})).train()) < 1e-7);
}
