#include "tests/routers/oracle.h"

#include "core/error.h"
#include "core/loss.h"

using namespace moelab;

namespace {

using SigmoidOptions = std::map<std::string, OptionValue>;

double slow_sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

std::unique_ptr<Router> sigmoid_random(const SigmoidOptions& options, const CapacityPolicy& capacity = {}) {
  auto router = build_router({.name = "sigmoid_topk", .width = 5, .experts = 8, .options = options, .capacity = capacity});
  set_tensor(*router, "weight", random_tensor(1, {8, 5}));
  return router;
}

// With weight = identity and E = D the input is the logits; this gives the logits of wanted scores.
Tensor logits_of(const Rows& scores) {
  const Tensor s_TE = numbers(scores);
  return (s_TE / (1 - s_TE)).log();
}

std::unique_ptr<Router> sigmoid_identity(int64_t experts, const SigmoidOptions& options) {
  auto router = build_router({.name = "sigmoid_topk", .width = experts, .experts = experts, .options = options});
  set_tensor(*router, "weight", at::eye(experts, at::kDouble));
  return router;
}

std::string sigmoid_refusal(const SigmoidOptions& options) {
  try {
    build_router({.name = "sigmoid_topk", .width = 4, .experts = 8, .options = options});
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

// The choice of one row by plain loops: groups by the sum of their two best biased scores, then experts inside them.
std::vector<int64_t> slow_grouped_choice(const std::vector<double>& biased, int64_t groups, int64_t kept, int64_t k) {
  const auto size = static_cast<int64_t>(biased.size()) / groups;
  std::vector<double> group_score, masked(biased.size(), -1e300);
  for (int64_t g = 0; g < groups; ++g) {
    const std::vector<double> own(biased.begin() + g * size, biased.begin() + (g + 1) * size);
    group_score.push_back(own[slow_argmax(own)] + (size > 1 ? own[slow_argmax(own, 1)] : 0));
  }
  for (int64_t rank = 0; rank < kept; ++rank)
    for (int64_t i = 0, g = slow_argmax(group_score, rank); i < size; ++i) masked[g * size + i] = biased[g * size + i];
  std::vector<int64_t> choice;
  for (int64_t rank = 0; rank < k; ++rank) choice.push_back(slow_argmax(masked, rank));
  return choice;
}

Tensor step_of(const std::vector<double>& load, const SigmoidOptions& options) {
  auto router = build_router({.name = "sigmoid_topk", .experts = static_cast<int64_t>(load.size()), .options = options});
  router->end_step({{"load", at::tensor(load, at::kDouble)}}, 0);
  return find_tensor(*router, "bias");
}

}  // namespace

TEST_CASE("sigmoid_topk by hand (contract 4): s = σ(z), the k largest, gates s, scaled, and renormalised before the scale") {
  const Tensor z_TE = logits_of({{.9, .2, .6}, {.1, .3, .5}});
  const RouteOutput plain = route(*sigmoid_identity(3, {}), RouteCase(z_TE));
  CHECK(plain.assignment.choice_TK.equal(longs_of({0, 2, 2, 1}).view({2, 2})));
  CHECK(relative_error(plain.gate_TK, numbers({{.9, .6}, {.5, .3}})) < 1e-12);
  for (const char* renormalise : {"before_drop", "after_drop"}) {
    INFO(renormalise);
    const auto router = sigmoid_identity(3, {{"scale", 2.5}, {"renormalise", word(renormalise)}});
    const Tensor expected_TE = numbers({{1.5, 0, 1}, {0, .9375, 1.5625}});
    CHECK(relative_error(dense_gates(sparse(route(*router, RouteCase(z_TE)))), expected_TE) < 1e-8);
  }
}

TEST_CASE("sigmoid_topk scales what survives a drop, after renormalising it") {
  const CapacityPolicy one{.mode = CapacityPolicy::Mode::kAbsolute, .value = 1};
  auto router = build_router({.name = "sigmoid_topk", .width = 3, .experts = 3,
                              .options = {{"scale", 2.5}, {"renormalise", word("after_drop")}}, .capacity = one});
  set_tensor(*router, "weight", at::eye(3, at::kDouble));
  const RouteOutput out = route(*router, RouteCase(logits_of({{.9, .2, .6}, {.1, .3, .5}})));
  CHECK(relative_error(dense_gates(sparse(out)), numbers({{2.5, 0, 0}, {0, .9375, 1.5625}})) < 1e-8);  // row 0 lost expert 2
}

TEST_CASE("sigmoid_topk: losses read s / Σ s (extended 2.2), also where every s underflows") {
  const RouteOutput out = route(*sigmoid_identity(3, {}), RouteCase(logits_of({{.9, .2, .6}, {.1, .3, .5}})));
  CHECK(relative_error(out.scores.loss_TE, numbers({{9. / 17, 2. / 17, 6. / 17}, {1. / 9, 3. / 9, 5. / 9}})) < 1e-12);
  CHECK(relative_error(out.probes.at("scores"), numbers({{.9, .2, .6}, {.1, .3, .5}})) < 1e-12);
  const RouteOutput tiny = route(*sigmoid_identity(3, {}), RouteCase(numbers({{-1e4, -1e4, -1e4}})));
  CHECK(relative_error(tiny.scores.loss_TE, at::full({1, 3}, 1. / 3, at::kDouble)) < 1e-14);
}

TEST_CASE("sigmoid_topk's balance loss is 1 at balance: every choice counts, Σ f = 1") {
  const PaperLoss& paper = Registry<RouterEntry>::instance().find("sigmoid_topk").paper_losses.at(0);
  CHECK(paper.coefficient == 1e-4);
  const LossEntry& entry = Registry<LossEntry>::instance().find("balance");
  Options options(entry.options);
  for (const OptionSpec& key : entry.options)
    if (paper.options.count(key.name)) options.set(key, paper.options.at(key.name));
  CHECK(entry.make(options, {})->landmarks(8, 2).balance == 1);
}

TEST_CASE("sigmoid_topk: the bias enters the choice only, and only with selection_bias") {
  const Tensor z_TE = logits_of({{.9, .2, .6}});
  for (const bool biased : {false, true}) {
    const auto router = sigmoid_identity(3, {{"selection_bias", biased}});
    set_tensor(*router, "bias", at::tensor({0., 1., 0.}, at::kDouble));
    const RouteOutput out = route(*router, RouteCase(z_TE));
    CHECK(out.assignment.choice_TK.equal(biased ? longs_of({{1, 0}}).view({1, 2}) : longs_of({0, 2}).view({1, 2})));
    CHECK(relative_error(dense_gates(sparse(out)), biased ? numbers({{.9, .2, 0}}) : numbers({{.9, 0, .6}})) < 1e-12);
    CHECK(relative_error(out.scores.loss_TE, numbers({{9. / 17, 2. / 17, 6. / 17}})) < 1e-12);
  }
}

TEST_CASE("sigmoid_topk end_step: bias += rate · sign(mean load - load)") {
  const SigmoidOptions options{{"k", int64_t{1}}, {"bias_rate", 0.25}};
  CHECK(step_of({4, 0, 2, 2}, options).equal(at::tensor({-.25, .25, 0., 0.}, at::kDouble)));
  CHECK(step_of({0, 0, 0}, options).equal(at::zeros({3}, at::kDouble)));
  CHECK(step_of({7}, options).equal(at::zeros({1}, at::kDouble)));
  CHECK(step_of({1, 1, 2}, options).equal(at::tensor({.25, .25, -.25}, at::kDouble)));  // the mean is 4/3
}

TEST_CASE("sigmoid_topk's load counts choices before drops, and adds up over micro-batches") {
  const CapacityPolicy one{.mode = CapacityPolicy::Mode::kAbsolute, .value = 1};
  const auto router = sigmoid_random({{"k", int64_t{3}}, {"bias_rate", 0.1}}, one);
  const Tensor x_TD = random_tensor(2, {20, 5});
  const RouteOutput whole = route(*router, RouteCase(x_TD).train());
  CHECK(sparse(whole).dropped_token_M.numel() > 0);
  CHECK(whole.deltas.at("load").equal(at::bincount(whole.assignment.choice_TK.flatten(), {}, 8).to(at::kDouble)));
  const Tensor first_E = route(*router, RouteCase(x_TD.slice(0, 0, 7)).train()).deltas.at("load");
  const Tensor rest_E = route(*router, RouteCase(x_TD.slice(0, 7)).train()).deltas.at("load");
  CHECK((first_E + rest_E).equal(whole.deltas.at("load")));
  CHECK(route(*router, RouteCase(at::zeros({0, 5}, at::kDouble)).train()).deltas.at("load").equal(at::zeros({8}, at::kDouble)));
}

TEST_CASE("sigmoid_topk without bias_rate has no state to move") {
  const auto still = sigmoid_random({{"selection_bias", true}});
  CHECK(route(*still, RouteCase(random_tensor(2, {20, 5})).train()).deltas.empty());
  CHECK_FALSE(still->facts().stateful);
  CHECK(sigmoid_random({{"bias_rate", 0.1}})->facts().stateful);
}

TEST_CASE("the loss-free update evens a skewed load out") {
  const auto router = sigmoid_random({{"k", int64_t{2}}, {"selection_bias", true}, {"bias_rate", 0.01}});
  const Tensor x_TD = random_tensor(2, {200, 5}) + 1;
  const auto excess = [](const Tensor& load_E) { return (load_E.max() / load_E.mean()).item<double>(); };
  double first = 0, last = 0;
  for (int64_t step = 0; step < 150; ++step) {
    const RouteOutput out = route(*router, RouteCase(x_TD).train());
    last = excess(out.deltas.at("load"));
    if (step == 0) first = last;
    router->end_step(out.deltas, step);
  }
  CHECK(first > 1.5);
  CHECK(last < 1.3);
}

TEST_CASE("sigmoid_topk groups by hand: a group scores the sum of its two best biased scores (extended R23)") {
  const SigmoidOptions options{{"k", int64_t{2}}, {"groups", int64_t{2}}, {"groups_kept", int64_t{1}}, {"selection_bias", true}};
  const auto router = sigmoid_identity(6, options);
  const Tensor z_TE = logits_of({{.9, .1, .1, .5, .6, .4}});  // 1.0 against 1.1
  CHECK(route(*router, RouteCase(z_TE)).assignment.choice_TK.equal(longs_of({4, 3}).view({1, 2})));
  set_tensor(*router, "bias", at::tensor({0., .2, 0., 0., 0., 0.}, at::kDouble));  // 1.2 against 1.1
  CHECK(route(*router, RouteCase(z_TE)).assignment.choice_TK.equal(longs_of({0, 1}).view({1, 2})));
  const Tensor equal_TE = at::zeros({1, 6}, at::kDouble);
  set_tensor(*router, "bias", at::zeros({6}, at::kDouble));
  CHECK(route(*router, RouteCase(equal_TE)).assignment.choice_TK.equal(longs_of({0, 1}).view({1, 2})));
}

TEST_CASE("sigmoid_topk equals plain loops for every number of groups and kept groups") {
  const Tensor x_TD = random_tensor(2, {30, 5}), bias_E = random_tensor(3, {8}) * 0.3;
  const Rows z = slow_linear(x_TD, random_tensor(1, {8, 5}));
  for (const auto& [groups, kept, k] :
       std::vector<std::array<int64_t, 3>>{{1, 1, 3}, {2, 1, 4}, {4, 2, 3}, {4, 4, 8}, {8, 3, 2}}) {
    INFO(groups << " groups, " << kept << " kept, k = " << k);
    const auto router = sigmoid_random(
        {{"k", k}, {"groups", groups}, {"groups_kept", kept}, {"selection_bias", true}, {"scale", 1.5}});
    set_tensor(*router, "bias", bias_E);
    const RouteOutput out = route(*router, RouteCase(x_TD));
    for (int64_t t = 0; t < 30; ++t) {
      std::vector<double> biased;
      for (int64_t e = 0; e < 8; ++e) biased.push_back(slow_sigmoid(z[t][e]) + bias_E[e].item<double>());
      const std::vector<int64_t> choice = slow_grouped_choice(biased, groups, kept, k);
      for (int64_t rank = 0; rank < k; ++rank) {
        CHECK(out.assignment.choice_TK[t][rank].item<int64_t>() == choice[rank]);
        CHECK(std::abs(out.gate_TK[t][rank].item<double>() - 1.5 * slow_sigmoid(z[t][choice[rank]])) < 1e-12);
      }
    }
  }
}

TEST_CASE("with one group, or with all groups kept, sigmoid_topk is plain top-k (extended R23)") {
  const Tensor x_TD = random_tensor(2, {30, 5});
  const Tensor plain_TK = route(*sigmoid_random({}), RouteCase(x_TD)).assignment.choice_TK;
  CHECK(route(*sigmoid_random({{"groups", int64_t{4}}}), RouteCase(x_TD)).assignment.choice_TK.equal(plain_TK));
  CHECK(route(*sigmoid_random({{"groups_kept", int64_t{1}}}), RouteCase(x_TD)).assignment.choice_TK.equal(plain_TK));
}

TEST_CASE("sigmoid_topk refuses groups that do not fit, each in one line") {
  CHECK(sigmoid_refusal({{"groups", int64_t{3}}}) == "[moe.router] groups = 3 does not divide experts = 8");
  CHECK(sigmoid_refusal({{"groups", int64_t{2}}, {"groups_kept", int64_t{3}}}) ==
        "[moe.router] groups_kept = 3 is more than groups = 2");
  CHECK(sigmoid_refusal({{"k", int64_t{5}}, {"groups", int64_t{4}}, {"groups_kept", int64_t{2}}}) ==
        "[moe.router] k = 5 is more than the 4 experts of groups_kept = 2");
  CHECK(sigmoid_refusal({{"k", int64_t{9}}}) == "[moe.router] k = 9 is more than experts = 8");
}

TEST_CASE("experts that are not there yet never enter sigmoid_topk's choice, group scores or bias") {
  const SigmoidOptions options{{"k", int64_t{2}},         {"groups", int64_t{3}}, {"groups_kept", int64_t{2}},
                               {"selection_bias", true}, {"bias_rate", 0.5}};
  auto router = build_router({.name = "sigmoid_topk", .width = 4, .experts = 3, .max_experts = 6, .options = options});
  set_tensor(*router, "bias", at::tensor({0., 0., -3., 9., 9., 9.}, at::kDouble));
  const RouteOutput out = route(*router, RouteCase(random_tensor(2, {20, 4})).train());
  CHECK(out.assignment.choice_TK.max().item<int64_t>() == 1);
  CHECK(out.scores.loss_TE.slice(1, 3).abs().max().item<double>() == 0);
  router->end_step(out.deltas, 0);
  CHECK(find_tensor(*router, "bias").equal(at::tensor({-.5, -.5, -2.5, 9., 9., 9.}, at::kDouble)));
}

TEST_CASE("gradients of sigmoid_topk equal finite differences with the selection frozen, for each normalisation") {
  for (const char* renormalise : {"none", "before_drop", "after_drop"}) {
    INFO(renormalise);
    const auto router = sigmoid_random({{"k", int64_t{3}}, {"scale", 2.5}, {"groups", int64_t{4}}, {"groups_kept", int64_t{2}},
                                        {"renormalise", word(renormalise)}},
                                       {.mode = CapacityPolicy::Mode::kFactor, .factor = 2});
    CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(2, {11, 5})).train()) < 1e-7);
  }
}
