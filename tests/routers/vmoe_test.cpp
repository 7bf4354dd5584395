#include "tests/routers/oracle.h"

#include "core/loss.h"
#include "core/moe_layer.h"

using namespace moelab;

namespace {

const Rows kVmoeNoise{{.5, -.3, .1}, {-1, .4, .9}, {.3, 1.2, -.7}, {0, .6, -.2}};

CapacityPolicy vmoe_priority(CapacityPolicy::Priority priority) {
  return {.mode = CapacityPolicy::Mode::kAbsolute, .value = 2, .scope = CapacityPolicy::Scope::kMicro, .priority = priority};
}

std::unique_ptr<Router> vmoe_random(int64_t k, const NoiseSpec& noise = {}) {
  auto router = build_router({.name = "vmoe", .width = 5, .experts = 6, .options = {{"k", k}}, .noise = noise});
  set_tensor(*router, "weight", random_tensor(1, {6, 5}));
  return router;
}

// 1 - Φ((bar - clean) / std), the bar being the k-th largest of all noisy logits.
double vmoe_slow_stays(double clean, const std::vector<double>& noisy, int64_t k, double std) {
  const double bar = noisy[slow_argmax(noisy, k - 1)];
  return 1 - 0.5 * std::erfc(-(bar - clean) / std / std::sqrt(2.0));
}

Tensor vmoe_kept_by(int64_t expert, CapacityPolicy::Priority priority) {
  const auto router = oracle_router({.name = "vmoe", .options = {{"k", int64_t{1}}}, .capacity = vmoe_priority(priority)});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  return dense_gates(sparse(out)).select(1, expert).nonzero().flatten();
}

}  // namespace

TEST_CASE("vmoe oracle (spec 2.5): batch priority serves rows 3, 0, 1, 2, so that with C = 2 expert 0 keeps rows 3 and 0") {
  CHECK(vmoe_kept_by(0, CapacityPolicy::Priority::kBatch).equal(longs_of({0, 3})));
  CHECK(vmoe_kept_by(0, CapacityPolicy::Priority::kPosition).equal(longs_of({0, 1})));
}

TEST_CASE("vmoe (spec 2.5): gates are the probabilities over all experts, not renormalised") {
  const auto router = oracle_router({.name = "vmoe"});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)));
  CHECK(printed_digits_agree(dense_gates(sparse(out)),
                             numbers({{.6652, .2447, 0}, {.5033, .4554, 0}, {.3672, .3322, 0}, {.7214, 0, .2654}})));
}

TEST_CASE("vmoe (spec 2.5): noise of standard deviation 1/E moves choice and gates, importance reads clean probabilities") {
  const auto router = oracle_router({.name = "vmoe"});
  const RouteOutput out = route(*router, RouteCase(numbers(kOracleLogits)).train().noise(numbers(kVmoeNoise)));
  const Tensor noisy_TE = numbers(kOracleLogits) + numbers(kVmoeNoise) / 3;
  CHECK(relative_error(out.scores.noisy_TE, noisy_TE) < 1e-14);
  CHECK(relative_error(out.scores.noise_std_TE, at::full({4, 3}, 1.0 / 3, at::kDouble)) < 1e-14);
  CHECK(relative_error(out.gate_TK, std::get<0>(noisy_TE.softmax(1).topk(2, 1))) < 1e-14);
  CHECK(printed_digits_agree(out.probes.at("importance") / 4, at::tensor({.5643, .2614, .1743}, at::kDouble)));
}

TEST_CASE("vmoe equals plain loops: noise, choice, gates, importance, and a load whose bar counts the expert itself") {
  const int64_t rows = 12, k = 3;
  const auto router = vmoe_random(k, {.std = 0.7, .std_given = true});
  const Tensor x_TD = random_tensor(3, {rows, 5}), draw_TE = random_tensor(4, {rows, 6});
  const RouteOutput out = route(*router, RouteCase(x_TD).train().noise(draw_TE));
  const Rows clean = slow_linear(x_TD, random_tensor(1, {6, 5}));
  std::vector<double> importance(6, 0), load(6, 0);
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<double> noisy = clean[t];
    for (int64_t e = 0; e < 6; ++e) noisy[e] += 0.7 * draw_TE[t][e].item<double>();
    for (int64_t rank = 0; rank < k; ++rank) {
      CHECK(out.assignment.choice_TK[t][rank].item<int64_t>() == slow_argmax(noisy, rank));
      CHECK(std::abs(out.gate_TK[t][rank].item<double>() - slow_softmax(noisy)[slow_argmax(noisy, rank)]) < 1e-12);
    }
    for (int64_t e = 0; e < 6; ++e) importance[e] += slow_softmax(clean[t])[e];
    for (int64_t e = 0; e < 6; ++e) load[e] += vmoe_slow_stays(clean[t][e], noisy, k, 0.7);
  }
  CHECK(relative_error(out.probes.at("importance"), at::tensor(importance, at::kDouble)) < 1e-12);
  CHECK(relative_error(out.probes.at("load"), at::tensor(load, at::kDouble)) < 1e-12);
}

TEST_CASE("vmoe (spec 1.2): the paper's capacity is ceil(T·k·1.05/E), up to a multiple of 4, at most T") {
  const CapacityPolicy& paper = Registry<RouterEntry>::instance().find("vmoe").paper_capacity;
  CHECK(paper.places(100, 8, 2) == 28);   // 26.25 → 27 → 28
  CHECK(paper.places(64, 8, 1) == 12);    // 8.4 → 9 → 12
  CHECK(paper.places(392, 32, 1) == 16);  // 12.8625 → 13 → 16
  CHECK(paper.places(3, 4, 1) == 3);
  CHECK(paper.places(0, 4, 1) == 0);
}

TEST_CASE("vmoe (spec 1.3): importance of clean probabilities and load with the expert's own noise, 0.005 each, 0 at balance") {
  const std::vector<PaperLoss>& losses = Registry<RouterEntry>::instance().find("vmoe").paper_losses;
  REQUIRE(losses.size() == 2);
  CHECK(losses[0].name == "importance");
  CHECK(std::get<std::string>(losses[0].options.at("of")) == "probabilities");
  CHECK(losses[1].name == "load");
  CHECK(std::get<std::string>(losses[1].options.at("threshold")) == "include_self");
  for (const PaperLoss& loss : losses) CHECK(loss.coefficient == 0.005);
}

TEST_CASE("losses named without options follow vmoe's paper: clean probabilities, and a bar that counts the expert itself") {
  const auto router = vmoe_random(2);
  const RouteCase input = RouteCase(random_tensor(3, {12, 5})).train();
  const RouteOutput out = route(*router, input);
  for (const char* name : {"importance", "load"}) {
    INFO(name);
    const LossEntry& entry = Registry<LossEntry>::instance().find(name);
    const auto loss = entry.make(Options(entry.options), router->entry());
    const Tensor rows_TE = loss->row_statistics({input.in, out, *router, 6})[0];
    CHECK(relative_error(rows_TE.sum(0), out.probes.at(name)) < 1e-14);
  }
}

TEST_CASE("vmoe in evaluation and at k = E counts rows for its load, and draws nothing in evaluation") {
  const Tensor x_TD = random_tensor(3, {12, 5});
  const RouteOutput evaluated = route(*vmoe_random(2), RouteCase(x_TD));
  CHECK(evaluated.probes.at("load").equal(sparse(evaluated).offsets_E1.diff().to(at::kDouble)));
  CHECK(evaluated.scores.noisy_TE.equal(evaluated.scores.clean_TE));
  CHECK(route(*vmoe_random(6), RouteCase(x_TD).train()).probes.at("load").equal(at::full({6}, 12, at::kDouble)));
}

TEST_CASE("vmoe's noise can be turned off, and normal noise without a size keeps 1/E") {
  const Tensor x_TD = random_tensor(3, {12, 5}), draw_TE = random_tensor(4, {12, 6});
  const auto quiet = vmoe_random(2, {.kind = NoiseSpec::Kind::kNone});
  CHECK_FALSE(quiet->facts().noisy_in_training);
  CHECK(route(*quiet, RouteCase(x_TD).train()).probes.at("load").sum().item<double>() == 24);
  const Scores scores = route(*vmoe_random(2, {.kind = NoiseSpec::Kind::kNormal}), RouteCase(x_TD).train().noise(draw_TE)).scores;
  CHECK(relative_error(scores.noisy_TE, scores.clean_TE + draw_TE / 6) < 1e-14);
}

TEST_CASE("vmoe with batch priority may not be used in a causal model, without a capacity it may (spec 2.5)") {
  const RouterEntry& vmoe = Registry<RouterEntry>::instance().find("vmoe");
  CHECK_FALSE(causality(vmoe.facts, vmoe.paper_capacity, Mode::kTrain, 2).causal);
  CHECK(causality(vmoe.facts, {}, Mode::kTrain, 2).causal);
}

TEST_CASE("gradients of vmoe equal finite differences with the selection frozen, those of its load included") {
  const auto router = vmoe_random(3);
  CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(3, {7, 5})).train()) < 1e-7);
  const RouteCase input = RouteCase(random_tensor(3, {7, 5})).train();
  const auto load = [&] {
    return load_rows(input.in, route(*router, input), 6, /*include_self=*/true).front().sum(0).square().sum();
  };
  CHECK(gradient_error(load, find_tensor(*router, "weight")) < 1e-6);
}

TEST_CASE("with k = 1 the task still moves vmoe's router (spec 0.3)") {
  const auto router = vmoe_random(1);
  sparse(route(*router, RouteCase(random_tensor(3, {7, 5})).train())).gate_N.mul(random_tensor(5, {7})).sum().backward();
  CHECK(find_tensor(*router, "weight").grad().abs().max().item<double>() > 1e-3);
}
