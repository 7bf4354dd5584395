#include "tests/routers/oracle.h"

using namespace moelab;

namespace {

const CapacityPolicy kSwitchPaperCapacity{.mode = CapacityPolicy::Mode::kFactor, .factor = 1.25};

}  // namespace

TEST_CASE("switch oracle (spec 2.3): probabilities, choices, gates not renormalised") {
  const auto router = oracle_router({.name = "switch"});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  CHECK(printed_digits_agree(
      out.probes.at("probs"),
      numbers({{.6652, .2447, .0900}, {.5033, .4554, .0413}, {.3672, .3322, .3006}, {.7214, .0132, .2654}})));
  CHECK(out.assignment.choice_TK.equal(at::zeros({4, 1}, at::kLong)));
  CHECK(printed_digits_agree(out.gate_TK, numbers({{.6652}, {.5033}, {.3672}, {.7214}})));
  CHECK(printed_digits_agree(out.probes.at("probs").mean(0), at::tensor({.5643, .2614, .1743}, at::kDouble)));
}

TEST_CASE("switch oracle (spec 2.3): the balance loss of first choices is 1.6928") {
  const auto router = oracle_router({.name = "switch"});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  Rows probs;
  for (const auto& z : kOracleLogits) probs.push_back(slow_softmax(z));
  CHECK(std::abs(slow_balance(out, 1, probs) - 1.6928) < 5.1e-5);
}

TEST_CASE("switch oracle (spec 2.3): capacity ceil(4·1.25/3) = 2 keeps rows 0 and 1 and drops 2 and 3") {
  const CapacityPolicy paper = Registry<RouterEntry>::instance().find("switch").paper_capacity;
  CHECK(paper.places(4, 3, 1) == 2);
  const auto router = oracle_router({.name = "switch", .capacity = paper});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  CHECK(sparse(out).token_N.equal(longs_of({0, 1})));
  CHECK(sparse(out).dropped_token_M.equal(longs_of({2, 3})));
  CHECK(sparse(out).dropped_expert_M.equal(longs_of({0, 0})));
  CHECK(out.places == 6);
}

TEST_CASE("batch priority on switch keeps rows 3 and 0 (spec 2.5)") {
  CapacityPolicy by_batch = kSwitchPaperCapacity;
  by_batch.priority = CapacityPolicy::Priority::kBatch;
  const auto router = oracle_router({.name = "switch", .capacity = by_batch});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  CHECK(sparse(out).token_N.equal(longs_of({0, 3})));
  CHECK(sparse(out).dropped_token_M.equal(longs_of({1, 2})));
}

TEST_CASE("switch with a given jitter equals plain loops: choice and gate noisy, probe and losses clean") {
  const auto router = build_router({.name = "switch", .width = 5, .experts = 4, .noise = {.epsilon = 0.3}});
  set_tensor(*router, "weight", random_tensor(1, {4, 5}));
  const Tensor x_TD = random_tensor(2, {9, 5}), u_TD = at::rand({9, 5}, at::kDouble);
  const RouteOutput out = route(*router, RouteCase(x_TD).train().noise(u_TD));
  const Tensor weight_ED = find_tensor(*router, "weight");
  const Rows clean = slow_linear(x_TD, weight_ED), noisy = slow_linear(x_TD * (0.7 + 0.6 * u_TD), weight_ED);
  for (int64_t t = 0; t < 9; ++t) {
    const int64_t expert = slow_argmax(noisy[t]);
    CHECK(out.assignment.choice_TK[t][0].item<int64_t>() == expert);
    CHECK(std::abs(out.gate_TK[t][0].item<double>() - slow_softmax(noisy[t])[expert]) < 1e-12);
    CHECK(relative_error(out.probes.at("probs")[t], at::tensor(slow_softmax(clean[t]), at::kDouble)) < 1e-12);
  }
  CHECK(relative_error(out.probes.at("logits"), numbers(clean)) < 1e-12);
  CHECK(
      route(*router, RouteCase(x_TD).noise(u_TD)).gate_TK.equal(route(*router, RouteCase(x_TD)).gate_TK));  // none in evaluation
}

TEST_CASE("switch draws its jitter from the stream: within 1 ± epsilon, the same again, and other kinds override it") {
  const auto router = oracle_router({.name = "switch"});
  const Tensor x_TD = at::ones({50, 3}, at::kDouble);
  const Tensor noisy_TE = route(*router, RouteCase(x_TD).train()).scores.noisy_TE;
  CHECK((noisy_TE - 1).abs().max().item<double>() <= 0.01);
  CHECK((noisy_TE - 1).abs().max().item<double>() > 0.005);
  CHECK(route(*router, RouteCase(x_TD).train()).scores.noisy_TE.equal(noisy_TE));
  CHECK_FALSE(route(*router, RouteCase(x_TD).train().seed(1)).scores.noisy_TE.equal(noisy_TE));

  const auto quiet = oracle_router({.name = "switch", .noise = {.kind = NoiseSpec::Kind::kNone}});
  CHECK(route(*quiet, RouteCase(x_TD).train()).scores.noisy_TE.equal(x_TD));
  CHECK_FALSE(quiet->facts().noisy_in_training);
  const auto normal = oracle_router({.name = "switch", .noise = {.kind = NoiseSpec::Kind::kNormal, .std = 2}});
  const Tensor draw_TE = random_tensor(1, {50, 3});
  CHECK(relative_error(route(*normal, RouteCase(x_TD).train().noise(draw_TE)).scores.noisy_TE, x_TD + 2 * draw_TE) < 1e-14);
}

TEST_CASE("switch starts from a truncated normal of standard deviation sqrt(0.1/D)") {
  const auto router = build_router({.name = "switch", .width = 640, .experts = 64});
  const Tensor weight_ED = find_tensor(*router, "weight");
  const double sigma = std::sqrt(0.1 / 640);
  CHECK(weight_ED.abs().max().item<double>() <= 2 * sigma);
  CHECK(std::abs(weight_ED.std().item<double>() / (0.8796 * sigma) - 1) < 0.02);  // a normal cut at 2σ has std 0.8796 σ
}

TEST_CASE("gradients of switch equal finite differences with the selection frozen, with jitter and drops") {
  const auto router = build_router({.name = "switch", .width = 5, .experts = 4, .capacity = kSwitchPaperCapacity});
  set_tensor(*router, "weight", random_tensor(1, {4, 5}));
  CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(2, {11, 5})).train()) < 1e-7);
}
