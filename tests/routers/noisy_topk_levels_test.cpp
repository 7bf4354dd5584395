// noisy_topk's hierarchical form (spec/routers.md 2.1): a gate over groups of experts, a gate inside each group.
#include "tests/routers/oracle.h"

#include "core/error.h"
#include "core/loss.h"
#include "tests/support/decisions.h"

#include <set>

using namespace moelab;

namespace {

using Levels = std::map<std::string, OptionValue>;

Levels levels_of(int64_t groups, int64_t k_groups, int64_t k) { return {{"groups", groups}, {"k_groups", k_groups}, {"k", k}}; }

// x holds the logits of the groups, then those of the experts; both noise scales are softplus(0) = ln 2.
std::unique_ptr<Router> router_of_logits(int64_t groups, int64_t experts, const Levels& options) {
  auto router = build_router({.name = "noisy_topk", .width = groups + experts, .experts = experts, .options = options});
  const Tensor all = at::eye(groups + experts, at::kDouble);
  set_tensor(*router, "group_weight", all.slice(0, 0, groups));
  set_tensor(*router, "weight", all.slice(0, groups));
  return router;
}

std::unique_ptr<Router> random_levels(int64_t experts, const Levels& options, const NoiseSpec& noise = {}) {
  auto router = build_router({.name = "noisy_topk", .width = 5, .experts = experts, .options = options, .noise = noise});
  int64_t seed = 0;
  for (const NamedTensor& parameter : router->parameters())
    set_tensor(*router, parameter.name, random_tensor(++seed, parameter.tensor.sizes()));
  return router;
}

// Three rows, 2 groups of 2, one expert each; without drawn noise the choice is that of the largest logits.
const Rows kLevelRows{{1, 0, .5, 0, 0, 0}, {0, .2, 0, 0, 0, 1}, {1, 0, 0, 1, 0, 0}};

RouteOutput route_level_rows() {
  const auto router = router_of_logits(2, 4, levels_of(2, 1, 1));
  return route(*router, RouteCase(numbers(kLevelRows)).train().noise(at::zeros({3, 6}, at::kDouble)));
}

double level_value(const char* loss, const RouteCase& input, const RouteOutput& out, int64_t experts) {
  return test::value_of(*test::make_loss(loss), input.in, out, experts).item<double>();
}

std::string refusal_of_levels(int64_t experts, const Levels& options, int64_t max_experts = 0) {
  try {
    build_router({.name = "noisy_topk", .experts = experts, .max_experts = max_experts, .options = options});
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "";
}

bool says(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// What one gate of `count` logits from column `from` on makes of a row: H, its scale, the k best, best first.
struct SlowGate {
  std::vector<double> clean, noisy, std;
  std::vector<int64_t> best;
  double stays(int64_t i, int64_t k) const {
    std::vector<double> others = noisy;
    others[i] = -1e300;
    return 0.5 * std::erfc(-(clean[i] - others[slow_argmax(others, k - 1)]) / std[i] / std::sqrt(2.0));
  }
};

SlowGate slow_gate(const Tensor& x_D, const Tensor& weight, const Tensor& noise_weight, const Tensor& draw, int64_t k) {
  SlowGate gate;
  gate.clean = slow_linear(x_D.unsqueeze(0), weight)[0];
  gate.std = slow_linear(x_D.unsqueeze(0), noise_weight)[0];
  for (double& raw : gate.std) raw = std::log1p(std::exp(raw));
  for (size_t i = 0; i < gate.clean.size(); ++i)
    gate.noisy.push_back(gate.clean[i] + gate.std[i] * draw[static_cast<int64_t>(i)].item<double>());
  for (int64_t rank = 0; rank < k; ++rank) gate.best.push_back(slow_argmax(gate.noisy, rank));
  return gate;
}

std::vector<double> slow_gates(const SlowGate& gate) {
  std::vector<double> kept;
  for (const int64_t i : gate.best) kept.push_back(gate.noisy[i]);
  return slow_softmax(kept);
}

}  // namespace

TEST_CASE("two levels by hand: the gate is the group's softmax times that inside the group") {
  // Groups (1, 0): .7311, .2689. Of (2, 1, 0) the two best: .7311, .2689. Of (0, 1, 3): 3 with .8808, 1 with .1192.
  const auto router = router_of_logits(2, 6, levels_of(2, 2, 2));
  const RouteOutput out = route(*router, RouteCase(numbers({{1, 0, 2, 1, 0, 0, 1, 3}})));
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 1, 5, 4}).unsqueeze(0)));
  CHECK(printed_digits_agree(out.gate_TK, numbers({{.5344, .1966, .2369, .0321}})));
  CHECK(out.k == 4);
}

TEST_CASE("two levels by hand: load_ge = load_g · load_e / rows on g") {
  // Φ(1/ln 2) = .92545, Φ(.5/ln 2) = .76465, Φ(.2/ln 2) = .61353. Rows 0 and 2 are on group 0, row 1 on group 1.
  // load of group 0: .92545 + (1 - .61353) + .92545 = 2.23736; of group 1: 3 - 2.23736 = .76264.
  // Expert 0: (.76465 + .07455)·2.23736/2 = .93880; 1: (.23535 + .92545)·2.23736/2 = 1.29856; 2: .07455·.76264; 3: .92545·.76264.
  const RouteOutput out = route_level_rows();
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 3, 1}).unsqueeze(1)));
  CHECK(printed_digits_agree(out.probes.at("load"), at::tensor({.9388, 1.2986, .0569, .7058}, at::kDouble)));
  CHECK(out.probes.at("importance").equal(at::tensor({1.0, 1.0, 0.0, 1.0}, at::kDouble)));
  const RouteCase input = RouteCase(numbers(kLevelRows)).train();
  CHECK(std::abs(level_value("load", input, out, 4) - 0.3640) < 5.1e-5);
  CHECK(std::abs(level_value("importance", input, out, 4) - 1.0 / 3) < 1e-12);  // 1, 1, 0, 1: variance 3/16, mean 3/4
}

TEST_CASE("two levels equal plain loops: choices, gates, probabilities, importance and load, smooth or counted on each level") {
  struct Form { int64_t groups, k_groups, k; };
  for (const Form& form : {Form{3, 2, 2}, Form{3, 1, 3}, Form{3, 3, 4}, Form{2, 2, 3}, Form{12, 5, 1}}) {
    const int64_t rows = 9, experts = 12, size = experts / form.groups;
    const auto router = random_levels(experts, levels_of(form.groups, form.k_groups, form.k));
    const Tensor x_TD = random_tensor(31, {rows, 5}), draw = random_tensor(32, {rows, form.groups + experts});
    const RouteOutput out = route(*router, RouteCase(x_TD).train().noise(draw));
    std::vector<double> importance(experts, 0), group_load(form.groups, 0), inside_load(experts, 0), on(form.groups, 0);
    for (int64_t t = 0; t < rows; ++t) {
      const SlowGate primary = slow_gate(x_TD[t], find_tensor(*router, "group_weight"),
                                         find_tensor(*router, "group_noise_weight"), draw[t].slice(0, 0, form.groups),
                                         form.k_groups);
      const std::vector<double> outer = slow_gates(primary), outer_all = slow_softmax(primary.clean);
      for (int64_t g = 0; g < form.groups; ++g) {
        const auto own = [&](const char* name) { return find_tensor(*router, name).slice(0, g * size, (g + 1) * size); };
        const Tensor own_draw = draw[t].slice(0, form.groups + g * size, form.groups + (g + 1) * size);
        const SlowGate gate = slow_gate(x_TD[t], own("weight"), own("noise_weight"), own_draw, form.k);
        const std::vector<double> inner_all = slow_softmax(gate.clean);
        for (int64_t i = 0; i < size; ++i)
          CHECK(std::abs(out.scores.loss_TE[t][g * size + i].item<double>() - outer_all[g] * inner_all[i]) < 1e-12);
        const auto rank = std::find(primary.best.begin(), primary.best.end(), g) - primary.best.begin();
        const bool chosen = rank < form.k_groups;
        group_load[g] += form.k_groups == form.groups ? 1 : primary.stays(g, form.k_groups);
        if (!chosen) continue;
        ++on[g];
        for (int64_t i = 0; i < size; ++i) inside_load[g * size + i] += form.k == size ? 1 : gate.stays(i, form.k);
        for (int64_t j = 0; j < form.k; ++j) {
          const int64_t column = rank * form.k + j;
          const double expected = outer[rank] * slow_gates(gate)[j];
          CHECK(out.assignment.choice_TK[t][column].item<int64_t>() == g * size + gate.best[j]);
          CHECK(std::abs(out.gate_TK[t][column].item<double>() - expected) < 1e-12);
          importance[g * size + gate.best[j]] += expected;
        }
      }
    }
    std::vector<double> load;
    for (int64_t e = 0; e < experts; ++e)
      load.push_back(on[e / size] == 0 ? 0 : group_load[e / size] * inside_load[e] / on[e / size]);
    CHECK(relative_error(out.probes.at("importance"), at::tensor(importance, at::kDouble)) < 1e-12);
    CHECK(relative_error(out.probes.at("load"), at::tensor(load, at::kDouble)) < 1e-12);
  }
}

TEST_CASE("groups of one expert are the flat form with the primary gate's matrices, and so is one group") {
  const Tensor x_TD = random_tensor(41, {10, 5}), draw_TE = random_tensor(42, {10, 6});
  const auto flat = random_levels(6, {{"k", int64_t{3}}});
  const auto single = random_levels(6, levels_of(6, 3, 1));
  for (const char* name : {"weight", "noise_weight"}) set_tensor(*single, std::string("group_") + name, find_tensor(*flat, name));
  const RouteCase input = RouteCase(x_TD).train();
  const RouteOutput expected = route(*flat, RouteCase(input).noise(draw_TE));
  const RouteOutput found = route(*single, RouteCase(input).noise(at::cat({draw_TE, random_tensor(43, {10, 6})}, 1)));
  CHECK(found.assignment.choice_TK.equal(expected.assignment.choice_TK));
  CHECK(relative_error(found.gate_TK, expected.gate_TK) < 1e-13);
  CHECK(relative_error(found.scores.loss_TE, expected.scores.loss_TE) < 1e-13);
  for (const char* loss : {"importance", "load", "balance", "entropy", "z"})
    CHECK(std::abs(level_value(loss, input, found, 6) - level_value(loss, input, expected, 6)) < 1e-12);
  const auto one = random_levels(6, {{"k", int64_t{3}}, {"groups", int64_t{1}}});
  CHECK(one->parameters().size() == 2);
  CHECK(route(*one, RouteCase(input).noise(draw_TE)).gate_TK.equal(expected.gate_TK));
}

TEST_CASE("a row has k experts in each of k_groups groups, 2 in each of 2 unless told otherwise") {
  const auto router = random_levels(12, {{"groups", int64_t{3}}});
  const RouteOutput out = route(*router, RouteCase(random_tensor(3, {20, 5})).train());
  CHECK(router->facts().fixed_k == 4);
  REQUIRE(out.assignment.choice_TK.size(1) == 4);
  for (int64_t t = 0; t < 20; ++t) {
    std::map<int64_t, std::set<int64_t>> experts_of;
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t e = out.assignment.choice_TK[t][j].item<int64_t>();
      experts_of[e / 4].insert(e);
    }
    CHECK(experts_of.size() == 2);
    for (const auto& [group, experts] : experts_of) CHECK(experts.size() == 2);
  }
  CHECK(relative_error(out.gate_TK.sum(1), at::ones({20}, at::kDouble)) < 1e-14);
  CHECK(relative_error(out.scores.loss_TE.sum(1), at::ones({20}, at::kDouble)) < 1e-14);
}

TEST_CASE("two levels in evaluation count rows, and all groups with all their experts are counted in training too") {
  const Tensor x_TD = random_tensor(3, {12, 5});
  for (const bool train : {false, true}) {
    const auto router = random_levels(6, train ? levels_of(2, 2, 3) : levels_of(3, 2, 1));
    const RouteOutput out = route(*router, train ? RouteCase(x_TD).train() : RouteCase(x_TD));
    CHECK(out.probes.at("load").equal(sparse(out).offsets_E1.diff().to(at::kDouble)));
  }
}

TEST_CASE("matrices of zero give the lowest groups and the lowest experts inside them, and uniform probabilities") {
  const auto router = build_router({.name = "noisy_topk", .experts = 8, .options = levels_of(4, 2, 1)});
  const RouteOutput out = route(*router, RouteCase(random_tensor(1, {5, 4})));
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 2}).expand({5, 2})));
  CHECK(relative_error(out.probes.at("probs"), at::full({5, 8}, 0.125, at::kDouble)) < 1e-14);
  CHECK(out.gate_TK.equal(at::full({5, 2}, 0.5, at::kDouble)));
}

TEST_CASE("gradients of two levels equal finite differences with the selection frozen") {
  for (const Levels& options : {levels_of(2, 1, 2), levels_of(3, 2, 1), levels_of(2, 2, 3)}) {
    const auto router = random_levels(6, options);
    const RouteCase input = RouteCase(random_tensor(3, {7, 5})).train();
    CHECK(frozen_gradient_error(*router, input) < 1e-7);
    const auto load = [&] { return test::value_of(*test::make_loss("load"), input.in, route(*router, input), 6); };
    if (!load().requires_grad()) continue;  // all groups, all experts: counts
    for (const NamedTensor& parameter : router->trainable())
      CHECK(gradient_error(load, parameter.tensor) < 1e-6);
  }
}

TEST_CASE(
    "the load's gradient reaches the primary gate (Shazeer's reason for the product), and with k_groups = 1 the task's does "
    "not") {
  const auto router = random_levels(6, levels_of(3, 1, 1));
  const RouteCase input = RouteCase(random_tensor(3, {7, 5})).train();
  const RouteOutput out = route(*router, input);
  sparse(out).gate_N.mul(random_tensor(5, {7})).sum().backward({}, /*retain_graph=*/true);
  for (const NamedTensor& parameter : router->trainable()) CHECK(parameter.tensor.grad().abs().max().item<double>() == 0);
  test::value_of(*test::make_loss("load"), input.in, out, 6).backward();
  for (const NamedTensor& parameter : router->trainable()) CHECK(parameter.tensor.grad().abs().max().item<double>() > 1e-4);
}

TEST_CASE("a group that no row is on has load 0, with finite gradients") {
  const auto router = router_of_logits(2, 4, levels_of(2, 1, 1));
  RouteCase input = RouteCase(numbers({{30, 0, 1, 0, 0, 0}, {30, 0, 0, 1, 0, 0}})).train().noise(at::zeros({2, 6}, at::kDouble));
  const RouteOutput out = route(*router, input);
  CHECK(out.probes.at("load").slice(0, 2).equal(at::zeros({2}, at::kDouble)));
  test::value_of(*test::make_loss("load"), input.in, out, 4).backward();
  for (const NamedTensor& parameter : router->trainable()) CHECK(parameter.tensor.grad().isfinite().all().item<bool>());
}

TEST_CASE(
    "load in two levels is a function of sums over rows: parts of a batch add up, and rows on a group count over all parts") {
  const auto router = random_levels(6, levels_of(3, 1, 1));
  const Tensor x_TD = random_tensor(3, {11, 5}), draw = random_tensor(4, {11, 9});
  const auto loss = test::make_loss("load");
  const auto statistics = [&](int64_t from, int64_t to) {
    const RouteCase part = RouteCase(x_TD.slice(0, from, to)).train().noise(draw.slice(0, from, to));
    const RouteOutput out = route(*router, part);
    return collect_statistics(*loss, LossScope::kStep, {part.in, out, *router, 6}).front();
  };
  LossStatistics total = statistics(0, 4);
  for (const LossStatistics& part : {statistics(4, 4), statistics(4, 11)})
    for (size_t i = 0; i < total.sums.size(); ++i) total.sums[i] = total.sums[i] + part.sums[i];
  total.rows = 11;
  const LossStatistics whole = statistics(0, 11);
  CHECK(relative_error(loss->value(total, *router), loss->value(whole, *router)) < 1e-13);
}

TEST_CASE("other noise in two levels: normal on every logit, jitter on what both gates read") {
  const Tensor x_TD = random_tensor(3, {12, 5});
  const auto normal = random_levels(6, levels_of(2, 1, 2), {.kind = NoiseSpec::Kind::kNormal, .std = 0.5});
  const Tensor draw = random_tensor(4, {12, 8});
  const TwoLevels found = *route(*normal, RouteCase(x_TD).train().noise(draw)).levels;
  CHECK(relative_error(found.group.noisy_TE, found.group.clean_TE + 0.5 * draw.slice(1, 0, 2)) < 1e-14);
  CHECK(relative_error(found.expert.noisy_TE, found.expert.clean_TE + 0.5 * draw.slice(1, 2)) < 1e-14);
  const auto jitter = random_levels(6, levels_of(2, 1, 2), {.kind = NoiseSpec::Kind::kJitter, .epsilon = 0.1});
  const Tensor u_TD = at::rand({12, 5}, at::kDouble), shaken_TD = x_TD * (0.9 + 0.2 * u_TD);
  const TwoLevels shaken = *route(*jitter, RouteCase(x_TD).train().noise(u_TD)).levels;
  CHECK(relative_error(shaken.group.noisy_TE, shaken_TD.matmul(find_tensor(*jitter, "group_weight").t())) < 1e-13);
  CHECK(relative_error(shaken.expert.noisy_TE, shaken_TD.matmul(find_tensor(*jitter, "weight").t())) < 1e-13);
}

TEST_CASE("the draws of two levels belong to rows: a sequence alone draws what it draws beside others") {
  const auto router = random_levels(6, levels_of(2, 1, 2));
  const Tensor x_TD = random_tensor(3, {6, 5});
  const RouteOutput all = route(*router, RouteCase(x_TD).sequences({0, 0, 0, 1, 1, 1}).train());
  const RouteOutput first = route(*router, RouteCase(x_TD.slice(0, 0, 3)).train());
  CHECK(relative_error(first.levels->group.noisy_TE, all.levels->group.noisy_TE.slice(0, 0, 3)) < 1e-13);
  CHECK(relative_error(first.levels->expert.noisy_TE, all.levels->expert.noisy_TE.slice(0, 0, 3)) < 1e-13);
}

TEST_CASE("no rows, and rows that are not numbers, in two levels") {
  const auto router = random_levels(6, levels_of(2, 1, 2));
  const RouteCase none = RouteCase(at::zeros({0, 5}, at::kDouble)).train();
  const RouteOutput out = route(*router, none);
  CHECK(out.assignment.choice_TK.sizes() == at::IntArrayRef({0, 2}));
  CHECK(out.probes.at("load").equal(at::zeros({6}, at::kDouble)));
  CHECK(level_value("load", none, out, 6) == 0);
  Tensor bad_TD = random_tensor(3, {4, 5});
  bad_TD[2][1] = NAN;
  CHECK_THROWS_AS(route(*router, RouteCase(bad_TD).train()), Error);
}

TEST_CASE("two levels refuse what cannot be, naming the numbers") {
  CHECK(says(refusal_of_levels(6, {{"groups", int64_t{4}}}), "groups = 4 does not divide experts = 6"));
  CHECK(says(refusal_of_levels(6, {{"groups", int64_t{12}}}), "groups = 12 does not divide experts = 6"));
  CHECK(says(refusal_of_levels(6, levels_of(2, 3, 1)), "k_groups = 3 is more than groups = 2"));
  CHECK(says(refusal_of_levels(6, levels_of(3, 2, 3)), "k = 3 is more than the 2 experts of a group"));
  CHECK(says(refusal_of_levels(6, {{"k_groups", int64_t{2}}}), "give `groups` too"));
  CHECK(says(refusal_of_levels(4, levels_of(2, 1, 1), 8), "no room to grow"));
}

TEST_CASE("with one expert there is one group") {
  const auto router = build_router({.name = "noisy_topk", .experts = 1, .options = {{"k", int64_t{1}}, {"groups", int64_t{1}}}});
  CHECK(sparse(route(*router, RouteCase(random_tensor(1, {3, 4})).train())).gate_N.equal(at::ones({3}, at::kDouble)));
}
