#include "tests/routers/oracle.h"

#include "core/error.h"
#include "tests/core/comm_support.h"

#include <limits>

using namespace moelab;

namespace {

const Rows kBaseScores{{9, 8, 0}, {9, 7, 1}, {8, 7, 2}, {7, 3, 2}, {6, 5, 4}, {5, 1, 1}};  // spec 3.1, c = 2

std::unique_ptr<Router> base_oracle(std::map<std::string, OptionValue> options = {}) {
  return oracle_router({.name = "base", .options = std::move(options)});
}

std::unique_ptr<Router> base_router(int64_t experts, std::map<std::string, OptionValue> options = {}, int64_t max_experts = 0) {
  auto router = build_router(
      {.name = "base", .width = 5, .experts = experts, .max_experts = max_experts, .options = std::move(options)});
  set_tensor(*router, "weight", random_tensor(1, {std::max(experts, max_experts), 5}));
  return router;
}

Tensor base_choices(const Router& router, const RouteCase& input) {
  return route(router, input).assignment.choice_TK.select(1, 0);
}

Tensor base_loads(const RouteOutput& out, int64_t experts) {
  return at::bincount(out.assignment.choice_TK.reshape({-1}), {}, experts);
}

double base_gap(const RouteOutput& out) { return out.probes.at("gap").item<double>(); }

Tensor base_gathered(const Tensor& x_TD, const Router& router, const Tensor& choice_T) {
  return x_TD.matmul(find_tensor(router, "weight").t()).gather(1, choice_T.unsqueeze(1)).select(1, 0);
}

double base_dual_value(const Tensor& score_TE, const Tensor& price_E, double load) {
  return std::get<0>((score_TE - price_E).max(1)).sum().item<double>() + load * price_E.sum().item<double>();
}

void base_add_deltas(std::map<std::string, Tensor>& total, const std::map<std::string, Tensor>& more) {
  for (const auto& [name, delta] : more) total[name] = total.count(name) ? total[name] + delta : delta;
}

std::string message_of_base(const Router& router, const RouteCase& input) {
  return test::message_of([&] { route(router, input); });
}

}  // namespace

TEST_CASE("base oracle (spec 3.1): training takes [1,0,1,0,2,2] with gates σ(s), gap 0, no drops") {
  const auto router = base_oracle();
  const RouteOutput out = route(*router, RouteCase(numbers(kBaseScores)).train());
  CHECK(out.assignment.choice_TK.equal(longs_of({1, 0, 1, 0, 2, 2}).unsqueeze(1)));
  CHECK(relative_error(out.gate_TK.select(1, 0), at::tensor({8., 9., 7., 7., 4., 1.}, at::kDouble).sigmoid()) < 1e-15);
  CHECK(base_gap(out) == 0);
  CHECK(sparse(out).dropped_token_M.numel() == 0);
  CHECK(out.probes.at("logits").equal(numbers(kBaseScores)));
}

TEST_CASE("base oracle (spec 3.1): evaluation is greedy, loads [6,0,0], and solves nothing") {
  const RouteOutput out = route(*base_oracle(), RouteCase(numbers(kBaseScores)));
  CHECK(base_loads(out, 3).equal(longs_of({6, 0, 0})));
  CHECK(out.deltas.empty());
  CHECK(out.probes.count("gap") == 0);
}

TEST_CASE("base oracle (spec 3.1): solver = greedy goes expert by expert and gets 33") {
  const RouteOutput out = route(*base_oracle({{"solver", word("greedy")}}), RouteCase(numbers(kBaseScores)).train());
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 0, 1, 2, 1, 2}).unsqueeze(1)));
  CHECK(base_gap(out) == (9 + 9 + 8 + 7 + 6 + 5) - 33);  // prices of 0 bound the value by the sum of the rows' maxima
}

TEST_CASE("base: prices after a step are an optimal dual solution, worth 36 (spec 3.1)") {
  const auto router = base_oracle();
  const RouteOutput out = route(*router, RouteCase(numbers(kBaseScores)).train());
  router->end_step(out.deltas, 0);
  CHECK(std::abs(base_dual_value(numbers(kBaseScores), find_tensor(*router, "prices"), 2) - 36) < 1e-12);
  CHECK(find_tensor(*router, "prices").min().item<double>() == 0);
  CHECK(base_choices(*router, RouteCase(numbers(kBaseScores)).train()).equal(longs_of({1, 0, 1, 0, 2, 2})));
}

TEST_CASE("base: prices of micro-batches and ranks are averaged by their rows, and a step without rows keeps them") {
  const auto router = base_router(3);
  std::map<std::string, Tensor> total;
  Tensor expected_E = at::zeros({3}, at::kDouble);
  for (const int64_t rows : {30, 6}) {
    const RouteOutput out = route(*router, RouteCase(random_tensor(rows, {rows, 5})).train());
    const auto alone = base_router(3);
    alone->end_step(out.deltas, 0);
    expected_E += find_tensor(*alone, "prices") * (static_cast<double>(rows) / 36);
    base_add_deltas(total, out.deltas);
  }
  router->end_step(total, 0);
  CHECK(relative_error(find_tensor(*router, "prices"), expected_E) < 1e-14);
  router->end_step(route(*router, RouteCase(at::zeros({0, 5}, at::kDouble)).train()).deltas, 1);
  router->end_step({}, 2);
  CHECK(relative_error(find_tensor(*router, "prices"), expected_E) < 1e-14);
}

TEST_CASE("base: greedy_with_prices takes argmax(s - prices), ties to the lowest, and is nearly balanced") {
  const auto router = base_router(4, {{"eval", word("greedy_with_prices")}});
  const Tensor x_TD = random_tensor(2, {400, 5}) + 0.5;
  const RouteOutput before = route(*router, RouteCase(x_TD));
  router->end_step(route(*router, RouteCase(x_TD).train()).deltas, 0);
  const RouteOutput after = route(*router, RouteCase(x_TD));
  const Tensor price_E = find_tensor(*router, "prices");
  const Rows score = slow_linear(x_TD, find_tensor(*router, "weight"));
  for (int64_t t = 0; t < 400; ++t) {
    std::vector<double> value = score[static_cast<size_t>(t)];
    for (size_t e = 0; e < 4; ++e) value[e] -= price_E[static_cast<int64_t>(e)].item<double>();
    std::vector<double> sorted = value;
    std::sort(sorted.rbegin(), sorted.rend());
    if (sorted[0] - sorted[1] > 1e-6) CHECK(after.assignment.choice_TK[t][0].item<int64_t>() == slow_argmax(value));
  }
  CHECK(base_loads(after, 4).max().item<int64_t>() <= 104);
  CHECK(base_loads(before, 4).max().item<int64_t>() > 150);
}

TEST_CASE("base: training loads are exactly equal, or ⌊T/E⌋ and ⌈T/E⌉, for every solver (claim C-BASE-1)") {
  for (const char* solver : {"exact", "auction", "sinkhorn", "greedy"})
    for (const char* extra : {"best", "lowest", "rotate"})
      for (const int64_t experts : {1, 2, 5})
        for (const int64_t rows : {0, 1, 3, 20, 23}) {
          const auto router = base_router(experts, {{"solver", word(solver)}, {"extra_slots", word(extra)}});
          const RouteOutput out = route(*router, RouteCase(random_tensor(3, {rows, 5})).train());
          const Tensor load_E = base_loads(out, experts);
          INFO(solver << ' ' << extra << " E=" << experts << " T=" << rows);
          CHECK(load_E.sum().item<int64_t>() == rows);
          CHECK(load_E.min().item<int64_t>() == rows / experts);
          CHECK(load_E.max().item<int64_t>() == (rows + experts - 1) / experts);
          CHECK((base_gap(out) == 0 || std::string(solver) != "exact"));
          CHECK(base_gap(out) >= 0);
        }
}

TEST_CASE("base: extra slots go to the lowest experts, or rotate with the step") {
  const Tensor x_TD = random_tensor(3, {23, 5});
  const RouteOutput lowest = route(*base_router(5, {{"extra_slots", word("lowest")}}), RouteCase(x_TD).train());
  CHECK(base_loads(lowest, 5).equal(longs_of({5, 5, 5, 4, 4})));
  RouteCase later = RouteCase(x_TD).train();
  later.in.step = 13;  // 13 mod 5 = 3
  CHECK(base_loads(route(*base_router(5, {{"extra_slots", word("rotate")}}), later), 5).equal(longs_of({5, 4, 4, 5, 5})));
}

TEST_CASE("base: chance finds no larger sum, and a shift of a column changes nothing but evaluation (spec 3.1)") {
  const auto router = oracle_router({.name = "base"});
  const Tensor x_TD = random_tensor(4, {30, 3});
  const Tensor choice_T = base_choices(*router, RouteCase(x_TD).train());
  const double value = base_gathered(x_TD, *router, choice_T).sum().item<double>();
  for (int64_t i = 0; i < 1000; ++i) {
    const Tensor chance_T = at::arange(30, at::kLong).remainder(3).index_select(0, random_tensor(100 + i, {30}).argsort());
    CHECK(base_gathered(x_TD, *router, chance_T).sum().item<double>() <= value + 1e-6);
  }
  const Tensor shifted_TD = x_TD + at::tensor({5., 0., -1.}, at::kDouble) + random_tensor(5, {30, 1});
  CHECK(base_choices(*router, RouteCase(shifted_TD).train()).equal(choice_T));
  CHECK_FALSE(base_choices(*router, RouteCase(shifted_TD)).equal(base_choices(*router, RouteCase(x_TD))));
}

TEST_CASE("base: in evaluation a row's decision is its own; in training it is not (spec 3.1)") {
  const auto router = base_router(3);
  const Tensor x_TD = random_tensor(6, {12, 5});
  Tensor other_TD = x_TD.clone();
  other_TD.slice(0, 6) = random_tensor(7, {6, 5}) * 5;
  CHECK(base_choices(*router, RouteCase(x_TD)).slice(0, 0, 6).equal(base_choices(*router, RouteCase(other_TD)).slice(0, 0, 6)));
  const RouterFacts facts = router->facts();
  CHECK_FALSE(facts.batch_independent);
  CHECK(facts.batch_independent_eval);
  CHECK(facts.stateful);
  CHECK_FALSE(facts.needs_global_batch);
  CHECK(base_router(3, {{"scope", word("global")}})->facts().needs_global_batch);
  CHECK_FALSE(causality(facts, {}, Mode::kTrain, 1).causal);
  CHECK(causality(facts, {}, Mode::kEval, 1).causal);
}

TEST_CASE("gradients of base equal finite differences with the selection frozen: through σ of the chosen score alone") {
  const auto router = base_router(4);
  CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(8, {11, 5})).train()) < 1e-7);
  CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(8, {11, 5}))) < 1e-7);
  const auto fresh = base_router(4);
  const RouteOutput out = route(*fresh, RouteCase(at::zeros({0, 5}, at::kDouble)).train());
  sparse(out).gate_N.sum().backward();
  CHECK(find_tensor(*fresh, "weight").grad().equal(at::zeros({4, 5}, at::kDouble)));
}

TEST_CASE("base: the rows of a shuffle's permutation are served in its order, which decides ties and nothing else") {
  const std::map<std::string, OptionValue> shuffled{{"shuffle", true}};
  const Tensor order_T = longs_of({5, 0, 3, 1, 4, 2});
  const Tensor tied_TD = at::ones({6, 3}, at::kDouble);
  CHECK(base_choices(*base_oracle(shuffled), RouteCase(tied_TD).train().noise(order_T)).equal(longs_of({0, 1, 2, 1, 2, 0})));
  CHECK(base_choices(*base_oracle(), RouteCase(tied_TD).train()).equal(longs_of({0, 0, 1, 1, 2, 2})));
  const RouteCase untied = RouteCase(numbers(kBaseScores)).train().noise(order_T);
  CHECK(base_choices(*base_oracle(shuffled), untied).equal(longs_of({1, 0, 1, 0, 2, 2})));
  const Tensor wide_TD = at::ones({60, 3}, at::kDouble);
  const Tensor drawn_T = base_choices(*base_oracle(shuffled), RouteCase(wide_TD).train());
  CHECK(drawn_T.equal(base_choices(*base_oracle(shuffled), RouteCase(wide_TD).train())));
  CHECK_FALSE(drawn_T.equal(base_choices(*base_oracle(shuffled), RouteCase(wide_TD).train().seed(1))));
  CHECK(base_oracle(shuffled)->facts().noisy_in_training);
  for (const Tensor& wrong_T : {longs_of({0, 1, 2, 3, 4, 4}), longs_of({1, 2, 3, 4, 5, 6})})
    CHECK(message_of_base(*base_oracle(shuffled), RouteCase(tied_TD).train().noise(wrong_T)) ==
          "noise of the router 'base' is not a permutation of 0 … T-1");
}

TEST_CASE("base: scope = global on two ranks is one big batch, one rank may be empty; local is each alone") {
  for (const bool shuffle : {false, true})
    for (const int64_t first : {7, 0, 20}) {
      const std::map<std::string, OptionValue> options{{"scope", word("global")}, {"shuffle", shuffle}};
      const Tensor x_TD = random_tensor(9, {20, 5});
      const auto alone = base_router(3, options);
      const RouteOutput whole = route(*alone, RouteCase(x_TD).train());
      alone->end_step(whole.deltas, 0);
      run_on_threads(2, [&](test::CommPointer comm) {
        const auto router = base_router(3, options);
        RouteCase input = RouteCase(comm->rank() == 0 ? x_TD.slice(0, 0, first) : x_TD.slice(0, first)).train();
        input.in.comm = comm.get();
        const RouteOutput part = route(*router, input);
        const Tensor& all_TK = whole.assignment.choice_TK;
        const Tensor wanted = comm->rank() == 0 ? all_TK.slice(0, 0, first) : all_TK.slice(0, first);
        test::expect_equal(part.assignment.choice_TK, wanted, "choices");
        test::expect(base_gap(part) == 0, "gap");
        std::map<std::string, Tensor> sums = part.deltas;
        for (auto& [name, delta] : sums) comm->all_reduce(delta);
        router->end_step(sums, 0);
        const double error = relative_error(find_tensor(*router, "prices"), find_tensor(*alone, "prices"));
        test::expect(shuffle || error < 1e-14, "prices");
      });
    }
  run_on_threads(2, [](test::CommPointer comm) {
    const auto router = base_router(3);
    RouteCase input = RouteCase(random_tensor(comm->rank(), {9, 5})).train();
    const Tensor alone = route(*router, input).assignment.choice_TK;
    input.in.comm = comm.get();
    test::expect_equal(route(*router, input).assignment.choice_TK, alone, "a local problem");
  });
}

TEST_CASE("base: with scope = local a shuffle deals the rows of all ranks out, each rank solving its share of them") {
  const std::map<std::string, OptionValue> dealt{{"shuffle", true}};
  CHECK(base_router(3, dealt)->facts().mixes_ranks);
  CHECK_FALSE(base_router(3)->facts().mixes_ranks);
  CHECK_FALSE(base_router(3, {{"shuffle", true}, {"scope", word("global")}})->facts().mixes_ranks);
  const Tensor x_TD = random_tensor(14, {14, 5});  // rank 0 has 5 rows, rank 1 has 9
  const Tensor own_0 = longs_of({4, 3, 2, 1, 0}), own_1 = longs_of({0, 1, 2, 3, 4, 5, 6, 7, 8});
  // Places taken in turns, rank 0's first: its row 4, rank 1's row 0 (5 of all), its row 3, 6, … Seven rows to each rank.
  const Tensor order_N = longs_of({4, 5, 3, 6, 2, 7, 1, 8, 0, 9, 10, 11, 12, 13});
  const auto plain = base_router(3);
  Tensor expected_T = at::zeros({14}, at::kLong), prices_E = at::zeros({3}, at::kDouble);
  for (const int64_t half : {0, 7}) {
    const Tensor rows = order_N.slice(0, half, half + 7);
    const RouteOutput out = route(*plain, RouteCase(x_TD.index_select(0, rows)).train());
    expected_T.index_copy_(0, rows, out.assignment.choice_TK.select(1, 0));
    prices_E = prices_E + out.deltas.at("rows_times_price") / 14;
  }
  run_on_threads(2, [&](test::CommPointer comm) {
    const auto router = base_router(3, dealt);
    const bool first = comm->rank() == 0;
    RouteCase input = RouteCase(first ? x_TD.slice(0, 0, 5) : x_TD.slice(0, 5)).train().noise(first ? own_0 : own_1);
    input.in.comm = comm.get();
    const RouteOutput part = route(*router, input);
    test::expect_equal(part.assignment.choice_TK.select(1, 0), first ? expected_T.slice(0, 0, 5) : expected_T.slice(0, 5),
                       "choices");
    test::expect(base_gap(part) == 0, "gap");
    std::map<std::string, Tensor> sums = part.deltas;
    for (auto& [name, delta] : sums) comm->all_reduce(delta);
    router->end_step(sums, 0);
    test::expect(relative_error(find_tensor(*router, "prices"), prices_E) < 1e-14, "prices");
  });
}

TEST_CASE("base: a dealt out shuffle works with a rank that has no rows, and draws anew with the step") {
  const Tensor x_TD = random_tensor(15, {40, 5});
  std::vector<Tensor> choices(2);
  run_on_threads(2, [&](test::CommPointer comm) {
    const auto router = base_router(4, {{"shuffle", true}});
    for (const int64_t step : {0, 1}) {
      RouteCase input = RouteCase(comm->rank() == 0 ? x_TD : x_TD.slice(0, 0, 0)).train().seed(step);
      input.in.comm = comm.get();
      const RouteOutput out = route(*router, input);
      if (comm->rank() == 0) choices[static_cast<size_t>(step)] = out.assignment.choice_TK.select(1, 0);
    }
  });
  for (const Tensor& choice_T : choices) CHECK(at::bincount(choice_T, {}, 4).equal(longs_of({10, 10, 10, 10})));
  CHECK_FALSE(choices[0].equal(choices[1]));
}

TEST_CASE("base: experts that are not there yet take no part, and the others are as without them") {
  for (const char* solver : {"exact", "auction", "sinkhorn", "greedy"}) {
    const auto roomy = base_router(3, {{"solver", word(solver)}}, 6), small = base_router(3, {{"solver", word(solver)}});
    set_tensor(*small, "weight", find_tensor(*roomy, "weight").slice(0, 0, 3));
    const Tensor x_TD = random_tensor(10, {22, 5});
    const RouteOutput with = route(*roomy, RouteCase(x_TD).train()), without = route(*small, RouteCase(x_TD).train());
    INFO(solver);
    CHECK(with.assignment.choice_TK.equal(without.assignment.choice_TK));
    CHECK(relative_error(with.gate_TK, without.gate_TK) < 1e-15);
    CHECK(base_choices(*roomy, RouteCase(x_TD)).equal(base_choices(*small, RouteCase(x_TD))));
    roomy->end_step(with.deltas, 0);
    CHECK(find_tensor(*roomy, "prices").slice(0, 3).equal(at::zeros({3}, at::kDouble)));
  }
}

TEST_CASE("base: ties, repeated rows and scores of ±1e4 stay balanced with gap 0, in fp32 too") {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble})
    for (const Tensor& wide_TD : {at::zeros({50, 5}, at::kDouble), random_tensor(11, {1, 5}).expand({50, 5}),
                                  random_tensor(12, {50, 5}) * 1e4, random_tensor(13, {50, 5}).round()}) {
      const auto router = build_router({.name = "base", .width = 5, .experts = 4, .dtype = dtype});
      const RouteOutput out = route(*router, RouteCase(wide_TD.to(dtype)).train());
      CHECK(base_gap(out) == 0);
      CHECK(base_loads(out, 4).min().item<int64_t>() == 12);
      CHECK(out.gate_TK.isfinite().all().item<bool>());
    }
}

TEST_CASE("base: a NaN in x is an error that names it, the layer and the step") {
  RouteCase input = RouteCase(random_tensor(1, {3, 5})).train();
  input.in.x_TD[1][2] = std::numeric_limits<double>::quiet_NaN();
  CHECK(message_of_base(*base_router(3), input) == "non-finite x in the router of layer 0 at step 0");
}

TEST_CASE("base starts from orthogonal centroids of norm 0.1, orthogonal columns where E > D, and prices of 0") {
  const auto fat = build_router({.name = "base", .width = 16, .experts = 4});
  const Tensor weight_ED = find_tensor(*fat, "weight");
  CHECK(relative_error(weight_ED.matmul(weight_ED.t()), at::eye(4, at::kDouble) * 0.01) < 1e-12);
  const auto tall = build_router({.name = "base", .width = 4, .experts = 16});
  const Tensor columns_ED = find_tensor(*tall, "weight");
  CHECK(relative_error(columns_ED.t().matmul(columns_ED), at::eye(4, at::kDouble) * 0.01) < 1e-12);
  CHECK(find_tensor(*fat, "prices").equal(at::zeros({4}, at::kDouble)));
  CHECK_FALSE(find_tensor(*build_router({.name = "base", .width = 16, .experts = 4, .seed = 1}), "weight").equal(weight_ED));
}

TEST_CASE("base: noise on the logits counts in assignment and gate, not in probes") {
  const NoiseSpec normal{.kind = NoiseSpec::Kind::kNormal, .std = 2};
  const auto router = build_router({.name = "base", .width = 5, .experts = 3, .noise = normal});
  const Tensor x_TD = random_tensor(14, {12, 5}), draw_TE = random_tensor(15, {12, 3});
  const RouteOutput out = route(*router, RouteCase(x_TD).train().noise(draw_TE));
  const Tensor clean_TE = x_TD.matmul(find_tensor(*router, "weight").t()), noisy_TE = clean_TE + 2 * draw_TE;
  CHECK(relative_error(out.gate_TK, noisy_TE.sigmoid().gather(1, out.assignment.choice_TK)) < 1e-14);
  CHECK(relative_error(out.probes.at("logits"), clean_TE) < 1e-14);
}
