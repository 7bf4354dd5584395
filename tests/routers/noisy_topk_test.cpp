#include "tests/routers/oracle.h"

#include "core/loss.h"

using namespace moelab;

namespace {

const Rows kOracleNoise{{.5, -.3, .1}, {-1, .4, .9}, {.3, 1.2, -.7}, {0, .6, -.2}};

RouteOutput noisy_oracle() {
  const auto router = oracle_router({.name = "noisy_topk", .options = {{"k", int64_t{2}}}});
  return route(*router, RouteCase(numbers(kOracleLogits)).train().noise(numbers(kOracleNoise)));
}

double squared_cv(const Tensor& value_E) {
  double mean = 0, variance = 0;
  const int64_t n = value_E.numel();
  for (int64_t e = 0; e < n; ++e) mean += value_E[e].item<double>() / n;
  for (int64_t e = 0; e < n; ++e) variance += std::pow(value_E[e].item<double>() - mean, 2) / n;
  return variance / (mean * mean);
}

double slow_softplus(double value) { return std::log1p(std::exp(value)); }

// P(e stays chosen): Φ((clean - k-th largest of the other noisy logits) / std).
double slow_stays(const std::vector<double>& clean, std::vector<double> noisy, const std::vector<double>& std, int64_t k,
                  int64_t e) {
  noisy[e] = -1e300;
  const double bar = noisy[slow_argmax(noisy, k - 1)];
  return 0.5 * std::erfc(-(clean[e] - bar) / std[e] / std::sqrt(2.0));
}

std::unique_ptr<Router> noisy_random(int64_t k, const NoiseSpec& noise = {}) {
  auto router = build_router({.name = "noisy_topk", .width = 5, .experts = 6, .options = {{"k", k}}, .noise = noise});
  set_tensor(*router, "weight", random_tensor(1, {6, 5}));
  set_tensor(*router, "noise_weight", random_tensor(2, {6, 5}));
  return router;
}

}  // namespace

TEST_CASE("noisy_topk oracle (spec 2.1): noisy logits H") {
  CHECK(printed_digits_agree(
      noisy_oracle().scores.noisy_TE,
      numbers({{2.3466, .7921, .0693}, {.8069, 1.6773, -.3762}, {.4079, .9318, -.4852}, {3, -.5841, 1.8614}})));
}

TEST_CASE("noisy_topk oracle (spec 2.1): gates G, softmax over the two kept noisy logits") {
  CHECK(printed_digits_agree(dense_gates(sparse(noisy_oracle())),
                             numbers({{.8256, .1744, 0}, {.2952, .7048, 0}, {.3720, .6280, 0}, {.7574, 0, .2426}})));
}

TEST_CASE("noisy_topk oracle (spec 2.1): P(t,e), the threshold leaving e out") {
  const Tensor stays_TE = load_probability(noisy_oracle().scores, 2, /*include_self=*/false);
  CHECK(printed_digits_agree(stays_TE,
                             numbers({{.9973, .9103, .1266}, {.9966, .9948, .0046}, {.8386, .8007, .2781}, {1, 0, .9999}})));
}

TEST_CASE("noisy_topk oracle (spec 2.1): importance and its CV² with population variance") {
  const Tensor importance_E = noisy_oracle().probes.at("importance");
  CHECK(printed_digits_agree(importance_E, at::tensor({2.2501, 1.5073, .2426}, at::kDouble)));
  CHECK(std::abs(squared_cv(importance_E) - 0.3863) < 5.1e-5);
  CHECK(std::abs(squared_cv(importance_E) * 3 / 2 - 0.5795) < 5.1e-5);  // sample variance
}

TEST_CASE("noisy_topk oracle (spec 2.1): load and its CV²") {
  const Tensor load_E = noisy_oracle().probes.at("load");
  CHECK(printed_digits_agree(load_E, at::tensor({3.8325, 2.7059, 1.4091}, at::kDouble)));
  CHECK(std::abs(squared_cv(load_E) - 0.1397) < 5.1e-5);
}

TEST_CASE("noisy_topk invariants (spec 2.1): rows of G sum to 1 with exactly k nonzeros; those of P need not sum to k") {
  for (const int64_t k : {1, 3, 6}) {
    const auto router = noisy_random(k);
    const RouteOutput out = route(*router, RouteCase(random_tensor(3, {12, 5})).train().noise(random_tensor(4, {12, 6})));
    const Tensor gates_TE = dense_gates(sparse(out));
    CHECK(relative_error(gates_TE.sum(1), at::ones({12}, at::kDouble)) < 1e-14);
    CHECK(gates_TE.ne(0).sum(1).eq(k).all().item<bool>());
    if (k < 6) CHECK((load_probability(out.scores, k, false).sum(1) - k).abs().max().item<double>() > 0.05);
  }
}

TEST_CASE("noisy_topk equals plain loops: noise scale, choice, gates, probes") {
  const int64_t rows = 12, k = 3;
  const auto router = noisy_random(k, {.epsilon = 0.05, .epsilon_given = true});
  const Tensor x_TD = random_tensor(3, {rows, 5}), n_TE = random_tensor(4, {rows, 6});
  const RouteOutput out = route(*router, RouteCase(x_TD).train().noise(n_TE));
  const Rows clean = slow_linear(x_TD, random_tensor(1, {6, 5})), raw = slow_linear(x_TD, random_tensor(2, {6, 5}));
  std::vector<double> importance(6, 0), load(6, 0);
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<double> noisy(6), std(6), kept;
    for (int64_t e = 0; e < 6; ++e) {
      std[e] = slow_softplus(raw[t][e]) + 0.05;
      noisy[e] = clean[t][e] + n_TE[t][e].item<double>() * std[e];
    }
    for (int64_t rank = 0; rank < k; ++rank) kept.push_back(noisy[slow_argmax(noisy, rank)]);
    for (int64_t rank = 0; rank < k; ++rank) {
      const int64_t expert = slow_argmax(noisy, rank);
      CHECK(out.assignment.choice_TK[t][rank].item<int64_t>() == expert);
      CHECK(std::abs(out.gate_TK[t][rank].item<double>() - slow_softmax(kept)[rank]) < 1e-12);
      importance[expert] += slow_softmax(kept)[rank];
    }
    for (int64_t e = 0; e < 6; ++e) load[e] += slow_stays(clean[t], noisy, std, k, e);
  }
  CHECK(relative_error(out.probes.at("logits"), numbers(clean)) < 1e-12);
  CHECK(relative_error(out.probes.at("importance"), at::tensor(importance, at::kDouble)) < 1e-12);
  CHECK(relative_error(out.probes.at("load"), at::tensor(load, at::kDouble)) < 1e-12);
}

TEST_CASE("noisy_topk starts at zero: uniform probabilities, ties to the first k experts, pure noise in training") {
  const auto router = build_router({.name = "noisy_topk", .experts = 5, .options = {{"k", int64_t{2}}}});
  const Tensor x_TD = random_tensor(1, {6, 4});
  const RouteOutput out = route(*router, RouteCase(x_TD));
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 1}).expand({6, 2})));
  CHECK(relative_error(out.probes.at("probs"), at::full({6, 5}, 0.2, at::kDouble)) < 1e-14);
  const Tensor draw_TE = random_tensor(2, {6, 5});
  CHECK(relative_error(route(*router, RouteCase(x_TD).train().noise(draw_TE)).scores.noisy_TE, draw_TE * std::log(2.0)) < 1e-14);
}

TEST_CASE("noisy_topk in evaluation and at k = E counts rows for its load") {
  const Tensor x_TD = random_tensor(3, {12, 5});
  const RouteOutput evaluated = route(*noisy_random(2), RouteCase(x_TD));
  const Tensor counts_E = sparse(evaluated).offsets_E1.diff().to(at::kDouble);
  CHECK(evaluated.probes.at("load").equal(counts_E));
  CHECK(evaluated.scores.noisy_TE.equal(evaluated.scores.clean_TE));
  CHECK(route(*noisy_random(6), RouteCase(x_TD).train()).probes.at("load").equal(at::full({6}, 12, at::kDouble)));
}

TEST_CASE("other kinds of noise override noisy_topk's own") {
  const Tensor x_TD = random_tensor(3, {12, 5}), draw_TE = random_tensor(4, {12, 6});
  const auto normal = noisy_random(2, {.kind = NoiseSpec::Kind::kNormal, .std = 0.5});
  const Scores scores = route(*normal, RouteCase(x_TD).train().noise(draw_TE)).scores;
  CHECK(relative_error(scores.noisy_TE, scores.clean_TE + 0.5 * draw_TE) < 1e-14);
  const auto quiet = noisy_random(2, {.kind = NoiseSpec::Kind::kNone});
  const RouteOutput out = route(*quiet, RouteCase(x_TD).train());
  CHECK(out.scores.noisy_TE.equal(out.scores.clean_TE));
  CHECK_FALSE(quiet->facts().noisy_in_training);
}

TEST_CASE("gradients of noisy_topk equal finite differences with the selection frozen, through gates and noise scale") {
  CHECK(frozen_gradient_error(*noisy_random(3), RouteCase(random_tensor(3, {7, 5})).train()) < 1e-7);
}

TEST_CASE("with k = 1 the task gives noisy_topk's matrices no gradient, its load does") {
  const auto router = noisy_random(1);
  const RouteOutput out = route(*router, RouteCase(random_tensor(3, {7, 5})).train());
  sparse(out).gate_N.mul(random_tensor(5, {7})).sum().backward({}, /*retain_graph=*/true);
  CHECK(find_tensor(*router, "weight").grad().abs().max().item<double>() == 0);
  load_probability(out.scores, 1, false).square().sum().backward();
  CHECK(find_tensor(*router, "weight").grad().abs().max().item<double>() > 1e-3);
  CHECK(find_tensor(*router, "noise_weight").grad().abs().max().item<double>() > 1e-3);
}
