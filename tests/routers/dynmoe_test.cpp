#include "tests/routers/oracle.h"

#include "core/error.h"

namespace moelab::dynmoe_test {
namespace {

using Options = std::map<std::string, OptionValue>;

double slow_sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

double at_of(const Tensor& matrix, int64_t row, int64_t column) { return matrix[row][column].item<double>(); }

// u of plain loops: σ(τ·cos)·mask - σ(τ·G).
Rows slow_margins(const Tensor& x_TD, const Router& router, double temperature = 1) {
  const Tensor weight_ED = find_tensor(router, "weight").detach();
  Rows margin = slow_linear(x_TD.detach(), weight_ED);
  const auto length = [](const Tensor& row) { return std::max(std::sqrt(row.square().sum().item<double>()), 1e-300); };
  for (size_t t = 0; t < margin.size(); ++t)
    for (size_t e = 0; e < margin[t].size(); ++e) {
      const double cosine = margin[t][e] / length(x_TD[t].detach()) / length(weight_ED[e]);
      const double bar = find_tensor(router, "thresholds")[e].item<double>();
      const double mask = find_tensor(router, "mask")[e].item<double>();
      margin[t][e] = slow_sigmoid(temperature * cosine) * mask - slow_sigmoid(temperature * bar);
    }
  return margin;
}

double positive(const std::vector<double>& row) {
  return static_cast<double>(std::count_if(row.begin(), row.end(), [](double u) { return u > 0; }));
}

Tensor mask_of(const Router& router) { return find_tensor(router, "mask"); }

// Random everything, thresholds on both sides of 0; expert `max - 1` is room to grow.
std::unique_ptr<Router> dynmoe_anywhere(Options options = {}) {
  auto router = build_router({.name = "dynmoe", .width = 5, .experts = 6, .max_experts = 7, .options = std::move(options)});
  set_tensor(*router, "weight", random_tensor(1, {7, 5}));
  set_tensor(*router, "thresholds", random_tensor(2, {7}).mul(0.5));
  return router;
}

std::unique_ptr<Router> dynmoe_oracle(Options options = {}) {
  auto router = build_router({.name = "dynmoe", .width = 2, .options = std::move(options)});
  set_tensor(*router, "weight", numbers({{1, 0}, {0, 1}, {-1, 0}, {.6, .8}}));
  return router;
}

// x = (.8, .6) is below both thresholds; expert 0 has the larger score, expert 1 the larger margin.
std::unique_ptr<Router> dynmoe_without_takers(const char* fallback) {
  auto router = build_router({.name = "dynmoe", .width = 2, .experts = 2, .options = {{"eval_fallback", word(fallback)}}});
  set_tensor(*router, "weight", at::eye(2, at::kDouble));
  set_tensor(*router, "thresholds", at::tensor({1.5, .7}, at::kDouble));
  return router;
}

const std::vector<double> kBelowBoth{.8, .6};

int64_t only_expert(const RouteOutput& out) {
  REQUIRE(sparse(out).expert_N.numel() == 1);
  CHECK(sparse(out).gate_N.item<double>() == 1);
  return sparse(out).expert_N.item<int64_t>();
}

// d f / d leaf by central differences; f reads the leaf's data.
Tensor slow_gradient(const std::function<double()>& f, const Tensor& leaf, double h = 1e-6) {
  const at::NoGradGuard no_grad;
  Tensor gradient = at::zeros_like(leaf);
  auto* entry = leaf.mutable_data_ptr<double>();
  for (int64_t i = 0; i < leaf.numel(); ++i) {
    const double kept = entry[i];
    entry[i] = kept + h;
    const double above = f();
    entry[i] = kept - h;
    gradient.mutable_data_ptr<double>()[i] = (above - f()) / (2 * h);
    entry[i] = kept;
  }
  return gradient;
}

constexpr int64_t kWindowStart = 1, kWindowUpdate = 3, kWindowPeriod = 4;
const Options kShortWindow{{"window_start", kWindowStart}, {"window_update", kWindowUpdate}, {"window_period", kWindowPeriod}};

std::map<std::string, Tensor> record_of(const std::vector<int64_t>& activations, const std::vector<double>& unrouted) {
  return {{"activations", longs_of(activations)}, {"unrouted", at::tensor(unrouted, at::kDouble)}};
}

// "add 3", "remove 0": in the order in which they happened.
using Changes = std::vector<std::string>;

Changes changes_of(const std::vector<Event>& events) {
  Changes all;
  for (const Event& event : events)
    all.push_back((event.kind == Event::Kind::kExpertAdded ? "add " : "remove ") + std::to_string(event.expert));
  return all;
}

// One window with the same record in each of its steps.
Changes changes_after(Router& router, const std::map<std::string, Tensor>& record) {
  CHECK(router.end_step(record, kWindowStart).empty());
  return changes_of(router.end_step(record, kWindowUpdate - 1));
}

std::unique_ptr<Router> growing_router(int64_t experts, int64_t max_experts) {
  return build_router({.name = "dynmoe", .width = 2, .experts = experts, .max_experts = max_experts, .options = kShortWindow});
}

Tensor doubles_of(const std::vector<double>& values) { return at::tensor(values, at::kDouble); }

}  // namespace

TEST_CASE("dynmoe oracle (spec 3.10): experts 0 and 3 take half a gate each, expert 1 lies exactly at its threshold") {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    RouteCase input(numbers({{1, 0}}));
    input.in.mode = mode;
    const RouteOutput out = route(*dynmoe_oracle(), input);
    CHECK(printed_digits_agree(out.probes.at("probs"), numbers({{.7311, .5, .2689, .6457}})));
    CHECK(at_of(out.probes.at("margin"), 0, 1) == 0);
    CHECK(out.assignment.choice_TK.equal(longs_of({0, 3, -1, -1}).view({1, 4})));
    CHECK(dense_gates(sparse(out)).equal(numbers({{.5, 0, 0, .5}})));
    CHECK(out.k == 0);
  }
}

TEST_CASE("dynmoe (spec 3.10): active where σ(τ cos)·mask exceeds σ(τ G), gates 1/K, by plain loops") {
  const Tensor x_TD = random_tensor(3, {40, 5});
  for (const double temperature : {1.0, 3.0}) {
    const auto router = dynmoe_anywhere({{"temperature", temperature}});
    const RouteOutput out = route(*router, RouteCase(x_TD).train());
    const Rows margin = slow_margins(x_TD, *router, temperature);
    const Tensor gates_TE = dense_gates(sparse(out));
    for (int64_t t = 0; t < 40; ++t) {
      const double active = positive(margin[t]);
      for (int64_t e = 0; e < 7; ++e) {
        CHECK(std::abs(at_of(out.probes.at("margin"), t, e) - margin[t][e]) < 1e-14);
        CHECK(at_of(gates_TE, t, e) == (margin[t][e] > 0 ? 1 / active : 0));
        CHECK(at_of(out.statistics.at("indicator"), t, e) == (margin[t][e] > 0));
      }
      for (int64_t rank = 0; rank < static_cast<int64_t>(active); ++rank)
        CHECK(out.assignment.choice_TK[t][rank].item<int64_t>() == slow_argmax(margin[t], rank));
    }
    CHECK(gates_TE.slice(1, 6).abs().max().item<double>() == 0);
    CHECK(out.scores.loss_TE.slice(1, 6).abs().max().item<double>() == 0);
    CHECK(relative_error(out.scores.loss_TE.sum(1), at::ones({40}, at::kDouble)) < 1e-14);
  }
}

TEST_CASE("dynmoe (spec 3.10): the gradient by u is ⟨∂L/∂y, f_e⟩/K for active experts and 0 for the others, by plain loops") {
  const int64_t rows = 12;
  const auto router = dynmoe_anywhere();
  const Tensor x_TD = random_tensor(3, {rows, 5}).requires_grad_(true);
  const Tensor f_TED = random_tensor(4, {rows, 7, 5}), grad_y_TD = random_tensor(5, {rows, 5});
  const RouteOutput out = route(*router, RouteCase(x_TD).train());
  const SparsePlan& plan = sparse(out);
  const Tensor gain_N = f_TED.index({plan.token_N, plan.expert_N}).mul(grad_y_TD.index_select(0, plan.token_N)).sum(1);
  plan.gate_N.mul(gain_N).sum().backward();  // Σ y·grad_y with y_t = Σ gate·f
  Rows slope = slow_margins(x_TD, *router);  // ∂L/∂u
  for (int64_t t = 0; t < rows; ++t) {
    const double active = positive(slope[t]);
    for (int64_t e = 0; e < 7; ++e) slope[t][e] = slope[t][e] > 0 ? f_TED[t][e].dot(grad_y_TD[t]).item<double>() / active : 0;
  }
  const auto surrogate = [&] {
    const Rows margin = slow_margins(x_TD, *router);
    double value = 0;
    for (size_t t = 0; t < margin.size(); ++t)
      for (size_t e = 0; e < margin[t].size(); ++e) value += slope[t][e] * margin[t][e];
    return value;
  };
  for (const Tensor& leaf : {x_TD, find_tensor(*router, "weight"), find_tensor(*router, "thresholds")})
    CHECK(relative_error(leaf.grad(), slow_gradient(surrogate, leaf)) < 1e-8);
  double of_threshold = 0;  // the same without differences: ∂u/∂G = -σ(G)(1 - σ(G))
  const double bar = slow_sigmoid(find_tensor(*router, "thresholds")[2].item<double>());
  for (int64_t t = 0; t < rows; ++t) of_threshold -= slope[t][2] * bar * (1 - bar);
  CHECK(std::abs(find_tensor(*router, "thresholds").grad()[2].item<double>() - of_threshold) < 1e-13);
}

TEST_CASE("dynmoe (spec 3.10): a row above no threshold gets nothing in training") {
  const RouteOutput out = route(*dynmoe_without_takers("score"), RouteCase(numbers({kBelowBoth, {0, 0}})).train());
  CHECK(sparse(out).token_N.numel() == 0);
  CHECK(out.assignment.choice_TK.eq(-1).all().item<bool>());
  CHECK(out.deltas.at("activations").equal(longs_of({0, 0})));
  CHECK(out.deltas.at("unrouted").equal(doubles_of(kBelowBoth)));
}

TEST_CASE("dynmoe (spec 3.10): in evaluation it takes the largest score or margin, with weight 1 and no gradient") {
  for (const auto& [name, expected] : {std::pair{"score", 0}, std::pair{"margin", 1}}) {
    const auto router = dynmoe_without_takers(name);
    const RouteOutput out = route(*router, RouteCase(numbers({kBelowBoth})));
    CHECK(only_expert(out) == expected);
    CHECK(out.statistics.at("indicator").abs().max().item<double>() == 0);
    sparse(out).gate_N.sum().backward();
    CHECK(find_tensor(*router, "weight").grad().abs().max().item<double>() == 0);
    CHECK(out.deltas.empty());
  }
}

TEST_CASE("dynmoe never falls back to a masked expert, whatever its margin, and to none where all are masked") {
  for (const char* name : {"score", "margin"}) {
    INFO(name);
    const auto router = dynmoe_without_takers(name);
    set_tensor(*router, "thresholds", doubles_of({1.5, -3}));  // u of the masked expert 1 is the larger one
    set_tensor(*router, "mask", doubles_of({1, 0}));
    CHECK(only_expert(route(*router, RouteCase(numbers({kBelowBoth})))) == 0);
    CHECK(router->active_experts_E().equal(mask_of(*router).ne(0)));
    set_tensor(*router, "mask", doubles_of({0, 0}));
    CHECK(sparse(route(*router, RouteCase(numbers({kBelowBoth})))).token_N.numel() == 0);
  }
}

TEST_CASE("dynmoe (spec 1.6): ties go to the lowest index, one expert and no rows work, NaN is refused") {
  auto twins = build_router({.name = "dynmoe", .width = 2, .experts = 3});
  set_tensor(*twins, "weight", numbers({{0, -1}, {1, 1}, {1, 1}}));
  CHECK(route(*twins, RouteCase(numbers({{1, 1}}))).assignment.choice_TK.equal(longs_of({1, 2, -1}).view({1, 3})));
  set_tensor(*twins, "thresholds", doubles_of({2, 2, 2}));
  CHECK(only_expert(route(*twins, RouteCase(numbers({{1, 1}})))) == 1);
  const auto alone = build_router({.name = "dynmoe", .width = 2, .experts = 1});
  CHECK(sparse(route(*alone, RouteCase(random_tensor(1, {9, 2})))).token_N.numel() == 9);
  const RouteOutput nobody = route(*alone, RouteCase(at::zeros({0, 2}, at::kDouble)).train());
  CHECK(nobody.deltas.at("unrouted").equal(at::zeros({2}, at::kDouble)));
  CHECK_THROWS_AS(route(*alone, RouteCase(numbers({{std::nan(""), 0}}))), Error);
}

TEST_CASE("dynmoe: lengths do not matter, not even those whose squares overflow") {
  auto router = build_router({.name = "dynmoe", .width = 2, .experts = 2, .dtype = at::kFloat});
  set_tensor(*router, "weight", numbers({{1, 0}, {0, 1e-20}}));
  const RouteOutput out = route(*router, RouteCase(numbers({{3e30, 4e30}, {3e-30, 4e-30}}).to(at::kFloat)));
  CHECK(relative_error(out.probes.at("logits"), numbers({{.6, .8}, {.6, .8}}).to(at::kFloat)) < 1e-6);
}

TEST_CASE("dynmoe starts with orthogonal directions, thresholds of 0 and the first experts active") {
  for (const auto& [width, experts] : {std::pair{8, 3}, std::pair{3, 8}}) {
    const auto router = build_router({.name = "dynmoe", .width = width, .experts = 2, .max_experts = experts});
    const Tensor weight_ED = find_tensor(*router, "weight").detach();
    const Tensor gram = experts <= width ? weight_ED.matmul(weight_ED.t()) : weight_ED.t().matmul(weight_ED);
    CHECK(relative_error(gram, at::eye(3, at::kDouble)) < 1e-14);
    CHECK(find_tensor(*router, "thresholds").abs().max().item<double>() == 0);
    CHECK(mask_of(*router).slice(0, 0, 2).eq(1).all().item<bool>());
    CHECK(mask_of(*router).slice(0, 2).eq(0).all().item<bool>());
  }
}

TEST_CASE("dynmoe's record counts rows per expert and sums the rows that no expert took, and parts of a batch add up") {
  const Tensor x_TD = random_tensor(3, {40, 5});
  const auto router = dynmoe_anywhere();
  const Rows margin = slow_margins(x_TD, *router);
  std::vector<int64_t> rows_of_expert(7, 0);
  Tensor unrouted_D = at::zeros({5}, at::kDouble);
  for (int64_t t = 0; t < 40; ++t) {
    for (size_t e = 0; e < 7; ++e) rows_of_expert[e] += margin[t][e] > 0;
    if (positive(margin[t]) == 0) unrouted_D += x_TD[t];
  }
  REQUIRE(unrouted_D.abs().max().item<double>() > 0);
  const auto whole = route(*router, RouteCase(x_TD).train()).deltas;
  const auto first = route(*router, RouteCase(x_TD.slice(0, 0, 13)).train()).deltas;
  const auto rest = route(*router, RouteCase(x_TD.slice(0, 13)).train()).deltas;
  CHECK(whole.at("activations").equal(longs_of(rows_of_expert)));
  CHECK(relative_error(whole.at("unrouted"), unrouted_D) < 1e-13);
  CHECK((first.at("activations") + rest.at("activations")).equal(whole.at("activations")));
  CHECK(relative_error(first.at("unrouted") + rest.at("unrouted"), whole.at("unrouted")) < 1e-13);
}

TEST_CASE("dynmoe (spec 3.10, C-DYN-2): experts without a row go, the first inactive one comes for unrouted rows") {
  auto router = growing_router(3, 5);
  set_tensor(*router, "thresholds", doubles_of({1, 2, 3, 4, 5}));
  CHECK(changes_after(*router, record_of({4, 2, 7, 0, 0}, {3, 4})) == Changes{"add 3"});
  CHECK(mask_of(*router).equal(doubles_of({1, 1, 1, 1, 0})));
  CHECK(relative_error(find_tensor(*router, "weight")[3], doubles_of({.6, .8})) < 1e-15);
  CHECK(find_tensor(*router, "thresholds").equal(doubles_of({1, 2, 3, 0, 5})));

  CHECK(changes_after(*router, record_of({4, 2, 0, 0, 0}, {0, 0})) == Changes{"remove 2", "remove 3"});
  CHECK(mask_of(*router).equal(doubles_of({1, 1, 0, 0, 0})));

  CHECK(changes_after(*router, record_of({0, 2, 0, 0, 0}, {-1, 0})) == Changes{"remove 0", "add 0"});
  CHECK(find_tensor(*router, "weight")[0].equal(doubles_of({-1, 0})));
  CHECK(find_tensor(*router, "activations").eq(0).all().item<bool>());
  CHECK(find_tensor(*router, "unrouted").eq(0).all().item<bool>());
}

TEST_CASE("dynmoe keeps its experts where nothing was recorded, and adds none where all are active") {
  auto router = growing_router(3, 3);
  CHECK(changes_after(*router, record_of({0, 0, 0}, {0, 0})).empty());
  CHECK(changes_after(*router, {}).empty());
  CHECK(changes_after(*router, record_of({1, 1, 1}, {1, 2})).empty());
  CHECK(mask_of(*router).equal(doubles_of({1, 1, 1})));
}

TEST_CASE("dynmoe's window: only its steps are recorded, it repeats every period, and the note names the steps") {
  auto router = growing_router(2, 2);
  for (const int64_t first : {int64_t{0}, kWindowPeriod}) {
    CHECK(router->end_step(record_of({1, 1}, {0, 0}), first).empty());
    CHECK(find_tensor(*router, "activations").equal(longs_of({0, 0})));
    CHECK(router->end_step(record_of({1, 0}, {0, 0}), first + 1).empty());
    CHECK(find_tensor(*router, "activations").equal(longs_of({1, 0})));
    const std::vector<Event> events = router->end_step(record_of({2, 0}, {1, 0}), first + 2);
    CHECK(changes_of(events) == Changes{"remove 1", "add 1"});
    CHECK(events[0].note.find(first == 0 ? "steps 2 to 3" : "steps 6 to 7") != std::string::npos);
    CHECK(events[1].source == 1);
    CHECK(router->end_step(record_of({0, 9}, {1, 0}), first + 3).empty());
  }
}

TEST_CASE("dynmoe with window_period = 0 never changes, and a window that cannot be is refused") {
  auto router = build_router({.name = "dynmoe", .width = 2, .experts = 2, .options = {{"window_period", int64_t{0}}}});
  CHECK_FALSE(router->facts().stateful);
  for (int64_t step = 0; step < 400; ++step) CHECK(router->end_step(record_of({1, 0}, {1, 0}), step).empty());
  CHECK_THROWS_AS(build_router({.name = "dynmoe", .options = {{"window_start", int64_t{200}}}}), Error);
  CHECK_THROWS_AS(build_router({.name = "dynmoe", .options = {{"window_update", int64_t{301}}}}), Error);
}

TEST_CASE("dynmoe obeys a replayed selection, and its surgery knows the rows of an expert") {
  const auto router = dynmoe_anywhere();
  const Assignment taken = route(*router, RouteCase(random_tensor(3, {9, 5})).train()).assignment;
  const RouteOutput out = route(*router, RouteCase(random_tensor(6, {9, 5})).train().force(taken));
  CHECK(out.assignment.choice_TK.equal(taken.choice_TK));
  CHECK(dense_gates(sparse(out)).sum(1).equal(taken.choice_TK.ge(0).any(1).to(at::kDouble)));
  for (const Tensor& rows : router->per_expert_tensors()) CHECK(rows.size(0) == 7);
  CHECK(router->per_expert_tensors().size() == 4);
}

}  // namespace moelab::dynmoe_test
