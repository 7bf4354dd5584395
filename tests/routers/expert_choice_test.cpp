#include "tests/routers/expert_choice_support.h"

#include "core/comm.h"
#include "core/diagnostics.h"
#include "core/error.h"

using namespace moelab;

namespace {

std::vector<std::vector<int64_t>> rows_by(const Tensor& key_T) {
  std::map<int64_t, std::vector<int64_t>> rows;
  for (int64_t t = 0; t < key_T.numel(); ++t) rows[key_T[t].item<int64_t>()].push_back(t);
  std::vector<std::vector<int64_t>> groups;
  for (const auto& [key, group] : rows) groups.push_back(group);
  return groups;
}

std::string choice_complaint(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("expert choice oracle (spec 3.3): with C = 2 the experts take {3,0}, {1,2}, {2,3} with their probabilities") {
  for (const CapacityPolicy& two : {each_takes(2), share(1.5)}) {
    const RouteOutput out = route(*choosing(3, two), RouteCase(numbers(kOracleLogits)));
    CHECK(pairs_of(out) == Pairs{{0, 0}, {3, 0}, {1, 1}, {2, 1}, {2, 2}, {3, 2}});
    CHECK(printed_digits_agree(dense_gates(sparse(out)),
                               numbers({{.6652, 0, 0}, {0, .4554, 0}, {0, .3322, .3006}, {.7214, 0, .2654}})));
    CHECK(per_row(out, 4) == std::vector<int64_t>{1, 1, 2, 2});
    CHECK(out.places == 6);
    CHECK(sparse(out).dropped_token_M.numel() == 0);
  }
}

TEST_CASE("expert choice oracle (spec 3.3): with C = 1 the experts take 3, 1, 2, and row 0 is left behind") {
  const RouteCase input(numbers(kOracleLogits));
  const RouteOutput out = route(*choosing(3, each_takes(1)), input);
  CHECK(pairs_of(out) == Pairs{{3, 0}, {1, 1}, {2, 2}});
  const RoutingRecord record = record_of(input.in, out, 3);
  CHECK(record.left_behind == 1);
  CHECK(record.chosen_E == std::vector<int64_t>{1, 1, 1});
  CHECK(metrics_of(record).at("capacity_used") == 1);
}

TEST_CASE("every expert takes exactly C rows, E·C in all, by plain loops, in each sequence of its own (spec 3.3)") {
  std::vector<int64_t> sequence(29);
  for (size_t t = 0; t < sequence.size(); ++t) sequence[t] = (t * t) % 3;  // interleaved, uneven
  const Tensor z_TE = random_tensor(1, {29, 5});
  const Rows s = softmax_rows(z_TE);
  for (const double factor : {0.5, 1.0, 2.0}) {
    const RouteCase input = RouteCase(z_TE).sequences(sequence);
    Pairs expected;
    int64_t places = 0;
    for (const auto& group : rows_by(input.in.sequence_T)) {
      const auto c = static_cast<int64_t>(std::ceil(static_cast<double>(group.size()) * factor / 5));
      expected.merge(slow_choice(s, group, c));
      places += 5 * c;
    }
    for (const bool train : {false, true}) {
      const RouteOutput out = route(*choosing(5, share(factor)), train ? RouteCase(input).train() : input);
      CHECK(pairs_of(out) == expected);
      CHECK(out.places == places);
      CHECK(static_cast<int64_t>(expected.size()) == places);
      for (const auto& [t, e] : expected) CHECK(std::abs(dense_gates(sparse(out))[t][e].item<double>() - s[t][e]) < 1e-14);
    }
  }
}

TEST_CASE("a group is a sequence, the micro-batch, or the rows of equal position") {
  const RouteCase input = RouteCase(random_tensor(1, {12, 3})).sequences({0, 1, 0, 0, 1, 2, 2, 1, 0, 2, 1, 0});
  const Rows s = softmax_rows(input.in.x_TD);
  const auto expected = [&](const Tensor& key_T) {
    Pairs pairs;
    for (const auto& group : rows_by(key_T)) pairs.merge(slow_choice(s, group, (static_cast<int64_t>(group.size()) + 2) / 3));
    return pairs;
  };
  const auto found = [&](const char* group, CapacityPolicy::Scope scope = CapacityPolicy::Scope::kSequence) {
    CapacityPolicy policy = share(1);
    policy.scope = scope;
    return pairs_of(route(*choosing(3, policy, {{"group", word(group)}}), input));
  };
  CHECK(found("sequence") == expected(input.in.sequence_T));
  CHECK(found("micro") == expected(at::zeros({12}, at::kLong)));
  CHECK(found("time_step") == expected(input.in.position_T));
  CHECK(found("scope") == found("sequence"));
  CHECK(found("scope", CapacityPolicy::Scope::kMicro) == found("micro"));
  CHECK(found("scope", CapacityPolicy::Scope::kGlobal) == found("micro"));
}

TEST_CASE("a row's experts stand in the order of their scores, -1 behind them") {
  const RouteOutput out = route(*choosing(3, each_takes(2)), RouteCase(numbers(kOracleLogits)));
  CHECK(out.assignment.choice_TK.equal(longs_of({0, -1, 1, -1, 1, 2, 0, 2}).view({4, 2})));
  CHECK(out.k == 0);
}

TEST_CASE("adding a number to a whole row of logits changes nothing (spec 3.3)") {
  const Tensor z_TE = random_tensor(1, {20, 4}), shift_T1 = random_tensor(2, {20, 1}) * 5;
  const auto router = choosing(4, share(2));
  const RouteOutput out = route(*router, RouteCase(z_TE)), shifted = route(*router, RouteCase(z_TE + shift_T1));
  CHECK(pairs_of(out) == pairs_of(shifted));
  CHECK(relative_error(dense_gates(sparse(shifted)), dense_gates(sparse(out))) < 1e-12);
}

TEST_CASE("ties go to the lowest row") {
  const RouteOutput out = route(*choosing(3, each_takes(2)), RouteCase(at::zeros({7, 3}, at::kDouble)));
  CHECK(pairs_of(out) == Pairs{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {1, 1}, {1, 2}});
}

TEST_CASE("C lies in 1 … T: fewer rows than experts overlap, one expert with factor 1 takes all, no rows no pairs (spec 3.3)") {
  CHECK(per_row(route(*choosing(5, share(1)), RouteCase(random_tensor(1, {2, 5}))), 2).size() == 2);
  CHECK(pairs_of(route(*choosing(5, share(1)), RouteCase(random_tensor(1, {2, 5})))).size() == 5);
  CHECK(pairs_of(route(*choosing(5, share(0.01, CapacityPolicy::Round::kFloor)), RouteCase(random_tensor(1, {9, 5})))).size() ==
        5);
  const RouteOutput dense = route(*choosing(1, share(1)), RouteCase(random_tensor(1, {6, 1})));
  CHECK(dense_gates(sparse(dense)).equal(at::ones({6, 1}, at::kDouble)));
  CHECK(pairs_of(route(*choosing(3, share(9)), RouteCase(random_tensor(1, {4, 3})))).size() == 12);
  for (const char* norm : {"experts", "tokens"}) {
    const RouteOutput none = route(*choosing(3, share(1), {{"score_norm", word(norm)}}),
                                   RouteCase(at::zeros({0, 3}, at::kDouble)).train());
    CHECK((pairs_of(none).empty() && none.places == 0));
  }
}

TEST_CASE("C comes from the capacity table: factor 1 and evaluation as training unless told otherwise (contract 2)") {
  const Tensor z_TE = random_tensor(1, {10, 4});
  const auto taken = [&](CapacityPolicy train, CapacityPolicy eval, bool training) {
    RouterSpec spec = router_spec({.name = "expert_choice"});
    spec.train_capacity = train;
    spec.eval_capacity = eval;
    return route(*make_router("expert_choice", spec), training ? RouteCase(z_TE).train() : RouteCase(z_TE)).places / 4;
  };
  const CapacityPolicy none, paper = Registry<RouterEntry>::instance().find("expert_choice").paper_capacity;
  CHECK(taken(none, none, true) == 3);             // 10/4, up
  CHECK(taken({.factor = 2}, none, true) == 5);    // a factor without a mode counts
  CHECK(taken(share(2), none, false) == 5);        // evaluation without a table is as training
  CHECK(taken(share(2), share(1), false) == 3);
  CHECK(taken(paper, none, true) == 2);            // round(2.5) to even
  CHECK(taken({.mode = CapacityPolicy::Mode::kTokenFraction, .factor = 0.4}, none, true) == 4);
  CHECK(taken({.mode = CapacityPolicy::Mode::kFactor, .min = 7}, none, true) == 7);
}

TEST_CASE("score_norm = tokens: softmax over the group's rows, divided by the experts that took the row (spec 3.3)") {
  const RouteCase input = RouteCase(random_tensor(1, {11, 3})).sequences({0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1});
  const RouteOutput out = route(*choosing(3, share(1.5), {{"score_norm", word("tokens")}}), input);
  const Rows z = rows_of(input.in.x_TD);
  Rows s(11, std::vector<double>(3));
  Pairs expected;
  for (const auto& group : rows_by(input.in.sequence_T)) {
    for (int64_t e = 0; e < 3; ++e) {
      double sum = 0;
      for (const int64_t t : group) sum += std::exp(z[t][e]);
      for (const int64_t t : group) s[t][e] = std::exp(z[t][e]) / sum;
    }
    expected.merge(slow_choice(s, group, static_cast<int64_t>(std::ceil(static_cast<double>(group.size()) * 0.5))));
  }
  CHECK(pairs_of(out) == expected);
  const std::vector<int64_t> count = per_row(out, 11);
  for (const auto& [t, e] : expected)
    CHECK(std::abs(dense_gates(sparse(out))[t][e].item<double>() - s[t][e] / static_cast<double>(count[t])) < 1e-13);
}

TEST_CASE("training notes the smallest score that each expert took, additively; end_step moves the thresholds by the rate") {
  const RouteCase input =
      RouteCase(random_tensor(1, {16, 3})).train().sequences({0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1});
  const auto router = choosing(3, share(1), {{"threshold_rate", 0.25}});
  const RouteOutput out = route(*router, input);
  const Rows s = softmax_rows(input.in.x_TD);
  std::vector<double> expected(3, 0);
  for (const auto& group : rows_by(input.in.sequence_T)) {
    std::vector<double> least(3, 2);
    for (const auto& [t, e] : slow_choice(s, group, (static_cast<int64_t>(group.size()) + 2) / 3))
      least[e] = std::min(least[e], s[t][e]);
    for (int64_t e = 0; e < 3; ++e) expected[e] += least[e];
  }
  CHECK(relative_error(out.deltas.at("last_scores"), at::tensor(expected, at::kDouble)) < 1e-14);
  CHECK(out.deltas.at("groups").equal(at::full({3}, 2, at::kDouble)));
  CHECK(find_tensor(*router, "thresholds").equal(at::full({3}, 1.0 / 3, at::kDouble)));
  router->end_step(out.deltas, 0);
  CHECK(relative_error(find_tensor(*router, "thresholds"), 0.75 / 3 + 0.25 * at::tensor(expected, at::kDouble) / 2) < 1e-14);
  CHECK(route(*router, RouteCase(numbers(kOracleLogits))).deltas.empty());  // not in evaluation
  const Tensor before = find_tensor(*router, "thresholds").clone();
  router->end_step(route(*router, RouteCase(at::zeros({0, 3}, at::kDouble)).train()).deltas, 1);
  router->end_step({}, 2);
  CHECK(find_tensor(*router, "thresholds").equal(before));
}

TEST_CASE(
    "eval = thresholds: each row takes the experts whose threshold it reaches; learned from one batch they repeat its choice") {
  const Tensor z_TE = random_tensor(1, {30, 4});
  const auto router = choosing(4, share(1.5), {{"eval", word("thresholds")}, {"threshold_rate", 1.0}});
  const RouteOutput trained = route(*router, RouteCase(z_TE).train());
  router->end_step(trained.deltas, 0);
  const auto open = choosing(4, {}, {{"eval", word("thresholds")}});  // no capacity in evaluation
  set_tensor(*open, "thresholds", find_tensor(*router, "thresholds"));
  const RouteOutput evaluated = route(*open, RouteCase(z_TE));
  CHECK(pairs_of(evaluated) == pairs_of(trained));
  CHECK(sparse(evaluated).gate_N.equal(sparse(trained).gate_N));
  CHECK(evaluated.places == 0);
  const RouteOutput alone = route(*open, RouteCase(z_TE.slice(0, 7, 8)));
  CHECK(dense_gates(sparse(alone))[0].equal(dense_gates(sparse(evaluated))[7]));
  const RouteOutput dropped = route(*choosing(4, each_takes(1), {{"eval", word("thresholds")}}), RouteCase(z_TE));
  CHECK(sparse(dropped).dropped_token_M.numel() > 0);  // a capacity drops, as with any router
  CHECK(sparse(dropped).token_N.numel() == 4);
}

TEST_CASE("expert choice looks ahead, but not by thresholds, nor among rows of one time (spec 1.5)") {
  const auto causal = [](ChoiceOptions options, Mode mode) {
    return causality(choosing(4, {}, std::move(options))->facts(), {}, mode, 0).causal;
  };
  CHECK_FALSE(causal({}, Mode::kTrain));
  CHECK_FALSE(causal({}, Mode::kEval));
  CHECK_FALSE(causal({{"eval", word("thresholds")}}, Mode::kTrain));
  CHECK(causal({{"eval", word("thresholds")}}, Mode::kEval));
  CHECK(causal({{"group", word("time_step")}}, Mode::kTrain));
  CHECK(causal({{"group", word("time_step")}}, Mode::kEval));
  RouteCase input = RouteCase(random_tensor(1, {12, 4})).sequences({0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1});
  const auto gates_before = [&](const char* group, const Tensor& x_TD) {
    RouteCase changed = input;
    changed.in.x_TD = x_TD;
    return dense_gates(sparse(route(*choosing(4, share(1), {{"group", word(group)}}), changed))).slice(0, 0, 5).clone();
  };
  Tensor other = input.in.x_TD.clone();
  other[5].mul_(-9);
  CHECK_FALSE(gates_before("sequence", other).equal(gates_before("sequence", input.in.x_TD)));
  CHECK(gates_before("time_step", other).equal(gates_before("time_step", input.in.x_TD)));
}

TEST_CASE("noise: none by default, of standard deviation 1/E where asked for without a size, in training only (contract 4)") {
  const Tensor z_TE = random_tensor(1, {12, 4}), draw_TE = random_tensor(2, {12, 4});
  const NoiseSpec normal{.kind = NoiseSpec::Kind::kNormal}, wide{.kind = NoiseSpec::Kind::kNormal, .std = 2, .std_given = true};
  for (const auto& [noise, std] : {std::pair{NoiseSpec{}, 0.0}, std::pair{normal, 0.25}, std::pair{wide, 2.0}}) {
    const auto router = choosing(4, share(1), {}, noise);
    const RouteOutput out = route(*router, RouteCase(z_TE).train().noise(draw_TE));
    const Rows s = softmax_rows(z_TE + std * draw_TE);
    std::vector<int64_t> all(12);
    for (size_t t = 0; t < all.size(); ++t) all[t] = static_cast<int64_t>(t);
    CHECK(pairs_of(out) == slow_choice(s, all, 3));
    for (const auto& [t, e] : pairs_of(out)) CHECK(std::abs(dense_gates(sparse(out))[t][e].item<double>() - s[t][e]) < 1e-13);
    CHECK(relative_error(out.probes.at("logits"), z_TE) < 1e-14);
    CHECK(router->facts().noisy_in_training == (std > 0));
    CHECK(pairs_of(route(*router, RouteCase(z_TE))) == slow_choice(softmax_rows(z_TE), all, 3));
  }
  const auto roomy = build_router(
      {.name = "expert_choice", .experts = 3, .max_experts = 4, .noise = normal});  // E is max_experts
  CHECK(relative_error(route(*roomy, RouteCase(z_TE).train()).scores.noise_std_TE.slice(1, 0, 3),
                       at::full({12, 3}, 0.25, at::kDouble)) < 1e-15);
}

TEST_CASE("experts that are not there yet choose nothing, with a cap and by thresholds too") {
  for (const ChoiceOptions& options : {ChoiceOptions{}, {{"cap_per_token", int64_t{1}}}, {{"eval", word("thresholds")}}}) {
    const auto router = build_router(
        {.name = "expert_choice", .experts = 2, .max_experts = 5, .options = options, .capacity = share(1)});
    set_tensor(*router, "weight", random_tensor(1, {5, 4}));
    set_tensor(*router, "thresholds", at::zeros({5}, at::kDouble));
    for (const RouteCase& input : {RouteCase(random_tensor(2, {15, 4})), RouteCase(random_tensor(2, {15, 4})).train()}) {
      const RouteOutput out = route(*router, input);
      CHECK(sparse(out).offsets_E1[2].item<int64_t>() == sparse(out).token_N.numel());
      CHECK(sparse(out).token_N.numel() == 6);
      if (input.in.training()) CHECK(out.deltas.at("groups").equal(at::tensor({1., 1., 0., 0., 0.}, at::kDouble)));
    }
  }
}

TEST_CASE("gradients of expert choice equal finite differences with the selection frozen, for both normalisations") {
  for (const char* norm : {"experts", "tokens"}) {
    INFO(norm);
    const auto router = choosing(4, share(1.5), {{"score_norm", word(norm)}});
    set_tensor(*router, "weight", random_tensor(4, {4, 4}));
    CHECK(frozen_gradient_error(
              *router, RouteCase(random_tensor(2, {11, 4})).train().sequences({0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1})) < 1e-7);
  }
}

TEST_CASE("a forced selection is replayed, though other scores would choose otherwise") {
  const auto router = choosing(4, share(1), {{"cap_per_token", int64_t{2}}});
  const RouteCase input(random_tensor(2, {12, 4}));
  const RouteOutput first = route(*router, input);
  CHECK(sparse(route(*router, RouteCase(input).force(first.assignment))).gate_N.equal(sparse(first).gate_N));
  RouteCase other(random_tensor(3, {12, 4}));
  CHECK(pairs_of(route(*router, other.force(first.assignment))) == pairs_of(first));
}

TEST_CASE("what expert choice cannot do is refused") {
  CHECK(choice_complaint([] {
          choosing(3, {}, {{"eval", word("thresholds")}, {"score_norm", word("tokens")}});
        }).find("score_norm") != std::string::npos);
  CapacityPolicy global = share(1);
  global.scope = CapacityPolicy::Scope::kGlobal;
  const auto router = choosing(3, global);
  run_on_threads(2, [&](const std::shared_ptr<Comm>& comm) {
    RouteCase input(random_tensor(1, {4, 3}));
    input.in.comm = comm.get();
    std::string message;
    try {
      route(*router, input);
    } catch (const Error& error) {
      message = error.what();
    }
    if (message.find("several ranks") == std::string::npos) throw std::runtime_error("not refused");
  });
}
