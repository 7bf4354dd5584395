// The worked numbers of the research notes (routers.md 2.1, 2.3–2.5), printed there with four digits, and beside each the
// same sum by plain loops.
#include "tests/losses/plain_losses.h"

#include <ATen/ops/full_like.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <numbers>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;

namespace {

constexpr double kPrinted = 5e-5;  // four digits
constexpr double kExact = 1e-12;

const Rows kLogits = {{2, 1, 0}, {1.5, 1.4, -1}, {.2, .1, 0}, {3, -1, 2}};
const Rows kDraws = {{.5, -.3, .1}, {-1, .4, .9}, {.3, 1.2, -.7}, {0, .6, -.2}};

// Section 2.1: E = 3, k = 2, std = softplus(0) = ln 2.
RouteOutput shazeer_decision() {
  const Tensor clean_TE = tensor_of(kLogits);
  return noisy_topk_decision(clean_TE, at::full_like(clean_TE, std::numbers::ln2), tensor_of(kDraws), 2);
}

// Sections 2.2–2.4: the same logits without noise.
RouteOutput quiet_decision(int64_t k) { return noisy_topk_decision(tensor_of(kLogits), {}, {}, k); }

double value_for(const Loss& loss, const RouteOutput& out) { return value_of(loss, input_of(4), out, 3).item<double>(); }

void check_rows(const Tensor& rows, const Rows& printed) {
  const Rows got = rows_of(rows);
  for (size_t t = 0; t < printed.size(); ++t)
    for (size_t e = 0; e < printed[t].size(); ++e) CHECK_THAT(got[t][e], WithinAbs(printed[t][e], kPrinted));
}

const Choices kFirstTwo = {{0, 1}, {0, 1}, {0, 1}, {0, 2}};  // section 2.2

}  // namespace

TEST_CASE("2.1 importance of gates has CV² 0.3863 with population and 0.5795 with sample variance") {
  const Rows gates = {{.8256, .1744, 0}, {.2952, .7048, 0}, {.3720, .6280, 0}, {.7574, 0, .2426}};
  const RouteOutput out = shazeer_decision();
  const auto population = make_loss("importance");
  const auto sample = make_loss("importance", {{"variance", std::string("sample")}});
  const BareRouter router;
  check_rows(population->row_statistics({input_of(4), out, router, 3}).front(), gates);
  CHECK_THAT(value_for(*population, out), WithinAbs(0.3863, kPrinted));
  CHECK_THAT(value_for(*sample, out), WithinAbs(0.5795, kPrinted));
}

TEST_CASE("2.1 importance equals plain loops over the softmax of the two largest noisy logits") {
  std::vector<double> importance(3);
  for (size_t t = 0; t < 4; ++t) {
    std::vector<double> noisy(3);
    for (size_t e = 0; e < 3; ++e) noisy[e] = kLogits[t][e] + kDraws[t][e] * std::numbers::ln2;
    const double bar = plain_threshold(noisy, 0, 2, true);
    double total = 0;
    for (double h : noisy) total += h >= bar ? std::exp(h) : 0;
    for (size_t e = 0; e < 3; ++e) importance[e] += noisy[e] >= bar ? std::exp(noisy[e]) / total : 0;
  }
  CHECK_THAT(importance[0], WithinAbs(2.2501, kPrinted));
  CHECK_THAT(value_for(*make_loss("importance"), shazeer_decision()), WithinRel(plain_cv2(importance), kExact));
}

TEST_CASE("2.1 load without the expert itself has the printed probabilities, sums and CV² 0.1397") {
  const Rows printed = {{.9973, .9103, .1266}, {.9966, .9948, .0046}, {.8386, .8007, .2781}, {1, 0, .9999}};
  const RouteOutput out = shazeer_decision();
  const Tensor load_TE = load_probability(out.scores, 2, /*include_self=*/false);
  check_rows(load_TE, printed);
  check_rows(load_TE.sum(0, true), {{3.8325, 2.7059, 1.4091}});
  CHECK_THAT(value_for(*make_loss("load"), out), WithinAbs(0.1397, kPrinted));
}

TEST_CASE("2.1 and 2.5 load equals plain loops under both threshold conventions and both variances") {
  const RouteOutput out = shazeer_decision();
  for (const bool include_self : {false, true}) {
    const Rows load = plain_load(kLogits, rows_of(out.scores.noisy_TE), rows_of(out.scores.noise_std_TE), 2, include_self);
    CHECK(relative_error(load_probability(out.scores, 2, include_self), tensor_of(load)) < kExact);
    for (const std::string variance : {"population", "sample"}) {
      const std::string threshold = include_self ? "include_self" : "exclude_self";
      const auto loss = make_loss("load", {{"threshold", threshold}, {"variance", variance}});
      CHECK_THAT(value_for(*loss, out), WithinRel(plain_cv2(plain_column_sums(load), variance == "sample"), kExact));
    }
  }
}

TEST_CASE("2.5 V-MoE's threshold counts the expert itself: only the chosen experts differ from Shazeer's") {
  const RouteOutput out = shazeer_decision();
  const Tensor exclude_TE = load_probability(out.scores, 2, false), include_TE = load_probability(out.scores, 2, true);
  const Rows differs = rows_of(exclude_TE.sub(include_TE).abs());
  const Rows chosen = {{1, 1, 0}, {1, 1, 0}, {1, 1, 0}, {1, 0, 1}};
  for (size_t t = 0; t < 4; ++t)
    for (size_t e = 0; e < 3; ++e) CHECK((differs[t][e] > 1e-9) == (chosen[t][e] == 1));
  // Row 0: noisy (2.3466, .7921, .0693), the bar is .7921 for every expert; Φ((1 - .7921)/.6931) = Φ(.3) = .6179.
  CHECK_THAT(include_TE.select(0, 0).select(0, 1).item<double>(), WithinAbs(0.6179, kPrinted));
}

TEST_CASE("2.5 V-MoE's importance reads the clean probabilities") {
  const RouteOutput out = shazeer_decision();
  const auto loss = make_loss("importance", {{"of", std::string("probabilities")}});
  CHECK_THAT(value_for(*loss, out), WithinRel(plain_cv2(plain_column_sums(plain_softmax(kLogits))), kExact));
}

TEST_CASE("2.3 Switch balance: first choices give 1.6928, top-2 flaxformer 2.4117") {
  const Rows probabilities = plain_softmax(kLogits);
  const auto first = make_loss("balance");
  const auto any = make_loss("balance", {{"counts", std::string("any_choice")}});
  CHECK_THAT(value_for(*first, quiet_decision(1)), WithinAbs(1.6928, kPrinted));
  CHECK_THAT(value_for(*first, quiet_decision(2)), WithinRel(plain_balance(kFirstTwo, probabilities, 1), kExact));
  CHECK_THAT(value_for(*any, quiet_decision(2)), WithinAbs(2.4117, kPrinted));
  CHECK_THAT(value_for(*any, quiet_decision(2)), WithinRel(plain_balance(kFirstTwo, probabilities, 2), kExact));
}

TEST_CASE("2.5 V-MoE's GShard loss reads the softmax of the noisy logits") {
  const RouteOutput out = shazeer_decision();
  const auto loss = make_loss("balance", {{"probabilities", std::string("noisy")}});
  const Choices firsts = {{0}, {1}, {1}, {0}};  // largest of each row of H in section 2.1
  CHECK_THAT(value_for(*loss, out), WithinRel(plain_balance(firsts, plain_softmax(rows_of(out.scores.noisy_TE)), 1), kExact));
}

TEST_CASE("2.4 z-loss is the mean of the squared logsumexp, 5.7721, per row as printed") {
  const RouteOutput out = quiet_decision(1);
  const auto loss = make_loss("z");
  const BareRouter router;
  check_rows(loss->row_statistics({input_of(4), out, router, 3}).front().t(), {{5.7966, 4.7812, 1.4447, 11.0660}});
  CHECK_THAT(value_for(*loss, out), WithinAbs(5.7721, kPrinted));
  CHECK_THAT(value_for(*loss, out), WithinRel(plain_z(kLogits), kExact));
}

TEST_CASE("2.4 the gradient of the z-loss is 2·logsumexp·p/T") {
  const Tensor logits_TE = tensor_of(kLogits).requires_grad_(true);
  value_of(*make_loss("z"), input_of(4), noisy_topk_decision(logits_TE, {}, {}, 1), 3).backward();
  Rows expected = plain_softmax(kLogits);
  for (size_t t = 0; t < 4; ++t)
    for (double& p : expected[t]) p *= 2 * std::sqrt(plain_z({kLogits[t]})) / 4;
  CHECK(relative_error(logits_TE.grad(), tensor_of(expected)) < kExact);
}

TEST_CASE("1.3 entropy is the mean of -Σ p ln p") {
  CHECK_THAT(value_for(*make_loss("entropy"), quiet_decision(2)), WithinRel(plain_entropy(plain_softmax(kLogits)), kExact));
}
