// THOR, spec/routers.md 3.7: who draws what, which rows share a draw, and what evaluation does instead.
#include "tests/routers/oracle.h"
#include "tests/support/sparse_cases.h"

#include "core/config.h"
#include "core/error.h"
#include "core/execute.h"
#include "core/moe_layer.h"

#include <catch2/generators/catch_generators.hpp>

#include <limits>
#include <map>
#include <set>

using namespace moelab;
using namespace moelab::testing;

namespace {

std::unique_ptr<Router> thor(std::map<std::string, OptionValue> options = {}, int64_t experts = 8) {
  return build_router({.name = "thor", .experts = experts, .options = std::move(options)});
}

// Pass p of the step that `seed` stands for.
RouteCase pass_of(RouteCase input, int64_t seed, int64_t pass) {
  input.train().seed(seed);
  input.in.pass = pass;
  input.in.random = input.in.random.in_pass(pass);
  return input;
}

Tensor experts_of(const Router& router, const RouteCase& input) { return route(router, input).assignment.choice_TK.squeeze(1); }

RouteCase rows_of(const std::vector<int64_t>& sequences) {
  return RouteCase(random_tensor(1, {static_cast<int64_t>(sequences.size()), 4})).sequences(sequences);
}

std::vector<int64_t> counted(int64_t n) {
  std::vector<int64_t> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[static_cast<size_t>(i)] = i;
  return all;
}

double chi_squared(const std::vector<int64_t>& counts) {
  double total = 0, sum = 0;
  for (const int64_t count : counts) total += static_cast<double>(count);
  const double expected = total / static_cast<double>(counts.size());
  for (const int64_t count : counts) sum += std::pow(static_cast<double>(count) - expected, 2) / expected;
  return sum;
}

std::vector<int64_t> expert_counts(const Tensor& experts_T) {
  const Tensor counts_E = at::bincount(experts_T, {}, 8);
  return {counts_E.const_data_ptr<int64_t>(), counts_E.const_data_ptr<int64_t>() + 8};
}

constexpr double kChi7 = 29.88;   // the 1 - 1e-4 quantile with 7 degrees of freedom
constexpr double kChi55 = 101.8;  // with 55

}  // namespace

TEST_CASE("3.7 oracle: expert frequencies over rows, positions and sequences lie within the chi-squared bound") {
  constexpr int64_t draws = 4000;
  const std::string pair = GENERATE("independent", "distinct");
  const int64_t pass = GENERATE(0, 1);
  const auto frequencies = [&](const char* granularity, const std::vector<int64_t>& sequences) {
    const auto router = thor({{"granularity", word(granularity)}, {"pair", pair}});
    return chi_squared(expert_counts(experts_of(*router, pass_of(rows_of(sequences), 5, pass))));
  };
  CAPTURE(pair, pass);
  CHECK(frequencies("token", std::vector<int64_t>(draws, 0)) < kChi7);
  CHECK(frequencies("position", std::vector<int64_t>(draws, 0)) < kChi7);
  CHECK(frequencies("sequence", counted(draws)) < kChi7);
}

TEST_CASE("3.7 oracle: over steps the batch's expert is uniform, and so is a distinct pair among the pairs that differ") {
  const auto one = thor(), two = thor({{"pair", word("distinct")}});
  std::vector<int64_t> counts(8, 0), pairs(56, 0);
  int64_t agreed = 0;
  for (int64_t seed = 0; seed < 4000; ++seed) {
    const auto expert = [&](const Router& router, int64_t pass) {
      return experts_of(router, pass_of(rows_of({0}), seed, pass)).item<int64_t>();
    };
    const int64_t first = expert(*one, 0), a = expert(*two, 0), b = expert(*two, 1);
    ++counts[static_cast<size_t>(first)];
    agreed += first == expert(*one, 1);
    REQUIRE(a != b);
    ++pairs[static_cast<size_t>(a * 7 + (b > a ? b - 1 : b))];
  }
  CHECK(chi_squared(counts) < kChi7);
  CHECK(chi_squared(pairs) < kChi55);
  CHECK(std::abs(static_cast<double>(agreed) - 500) < 5 * std::sqrt(4000 * 7 / 64.0));  // with replacement: 1/E of the steps
}

TEST_CASE("3.7 rows share a draw by batch, sequence, position or not at all") {
  const std::vector<int64_t> sequences{0, 0, 1, 1, 2, 2, 0, 1, 2, 3};
  const auto values = [&](const char* granularity) {
    std::vector<std::vector<int64_t>> by_row(sequences.size());  // over 40 steps
    const auto router = thor({{"granularity", word(granularity)}});
    for (int64_t seed = 0; seed < 40; ++seed) {
      const Tensor experts_T = experts_of(*router, pass_of(rows_of(sequences), seed, 0));
      for (size_t t = 0; t < sequences.size(); ++t) by_row[t].push_back(experts_T[static_cast<int64_t>(t)].item<int64_t>());
    }
    return std::pair(by_row, std::set(by_row.begin(), by_row.end()).size());
  };
  CHECK(values("batch").second == 1);
  const auto [by_sequence, sequence_draws] = values("sequence");
  CHECK(sequence_draws == 4);
  CHECK(by_sequence[0] == by_sequence[6]);
  const auto [by_position, position_draws] = values("position");
  CHECK(position_draws == 3);  // positions 0, 1, 2
  CHECK(by_position[0] == by_position[9]);
  CHECK(values("token").second == sequences.size());
}

TEST_CASE("3.7 distinct passes walk through all experts; E = 1 has one for every pass") {
  const std::string granularity = GENERATE("batch", "sequence", "position", "token");
  const auto router = thor({{"granularity", granularity}, {"pair", word("distinct")}}, 5);
  std::vector<Tensor> passes;
  for (int64_t pass = 0; pass < 6; ++pass) passes.push_back(experts_of(*router, pass_of(rows_of({0, 0, 1, 2, 2}), 9, pass)));
  const Tensor sorted_TE = std::get<0>(at::stack(at::TensorList(passes).slice(0, 5), 1).sort(1));
  CHECK(sorted_TE.equal(at::arange(5, at::kLong).expand({5, 5})));
  CHECK(passes[5].equal(passes[0]));
  const auto alone = thor({{"granularity", granularity}, {"pair", word("distinct")}}, 1);
  for (const int64_t pass : {0, 1, 2}) CHECK(experts_of(*alone, pass_of(rows_of({0, 1}), 9, pass)).equal(longs_of({0, 0})));
}

TEST_CASE("3.7 a row's draw is that of its sequence and position, in any micro-batch and order of rows") {
  const std::string granularity = GENERATE("batch", "sequence", "position", "token");
  const std::string pair = GENERATE("independent", "distinct");
  const auto router = thor({{"granularity", granularity}, {"pair", pair}});
  const RouteCase whole = pass_of(rows_of({0, 0, 0, 1, 1, 2, 2, 2}), 3, 1);
  const Tensor experts_T = experts_of(*router, whole);
  RouteCase part = whole;
  const Tensor kept = longs_of({7, 3, 5, 4});
  part.in.x_TD = whole.in.x_TD.index_select(0, kept);
  part.in.sequence_key_T = whole.in.sequence_key_T.index_select(0, kept);
  part.in.position_T = whole.in.position_T.index_select(0, kept);
  part.in.sequence_T = longs_of({1, 0, 1, 0});
  part.in.sequences = 2;
  CHECK(experts_of(*router, part).equal(experts_T.index_select(0, kept)));
}

TEST_CASE("thor takes the experts that noise names, per batch, sequence, position or row, and refuses other shapes") {
  const RouteCase rows = rows_of({0, 0, 1, 1, 1, 0}).train();
  const auto found = [&](const char* granularity, const std::vector<int64_t>& noise) {
    return experts_of(*thor({{"granularity", word(granularity)}}), RouteCase(rows).noise(longs_of(noise)));
  };
  CHECK(found("batch", {6}).equal(longs_of({6, 6, 6, 6, 6, 6})));
  CHECK(found("sequence", {2, 5}).equal(longs_of({2, 2, 5, 5, 5, 2})));
  CHECK(found("position", {1, 0, 7}).equal(longs_of({1, 0, 1, 0, 7, 7})));
  CHECK(found("token", {1, 2, 3, 4, 5, 6}).equal(longs_of({1, 2, 3, 4, 5, 6})));
  CHECK_THROWS_AS(found("batch", {6, 6}), Error);
  CHECK_THROWS_AS(found("token", {6, 6}), Error);
  CHECK_THROWS_AS(found("sequence", {6, 8}), Error);
  CHECK_THROWS_AS(found("sequence", {-1, 0}), Error);
  CHECK_THROWS_AS(experts_of(*thor(), RouteCase(rows).noise(at::zeros({1}, at::kDouble))), Error);
}

TEST_CASE("3.7 evaluation draws per token, position or sequence under its own options, the same every time") {
  const RouteCase rows = rows_of(std::vector<int64_t>(200, 0));
  const auto distinct_values = [](const Tensor& experts_T) { return std::get<0>(at::_unique(experts_T)).numel(); };
  CHECK(distinct_values(experts_of(*thor(), rows)) == 8);
  CHECK(distinct_values(experts_of(*thor({{"inference_granularity", word("sequence")}}), rows)) == 1);
  CHECK(experts_of(*thor(), rows).equal(experts_of(*thor(), rows)));
  CHECK(experts_of(*thor({{"inference", word("fixed")}, {"fixed_expert", int64_t{3}}}), rows).eq(3).all().item<bool>());
  CHECK_THROWS_AS(thor({{"fixed_expert", int64_t{8}}}), Error);
}

TEST_CASE("3.7 ensemble is the mean of all experts' outputs, averaged the expert of mean parameters; both leave training alone") {
  const auto bank = ffn_bank(4, 3, 5, "gelu", true, at::kDouble);
  const RouteCase rows(random_tensor(4, {6, 4}));
  const auto output = [&](const char* inference, RouteCase input) {
    const RouteOutput out = route(*thor({{"inference", word(inference)}}, 3), input);
    return execute(out.plan, *bank, {.x_TD = input.in.x_TD});
  };
  Tensor mean_TD = at::zeros({6, 4}, at::kDouble);
  std::vector<Tensor> mean_parameters;
  for (int64_t e = 0; e < 3; ++e) mean_TD = mean_TD + bank->forward_with(bank->parameters_of(e), rows.in.x_TD) / 3;
  for (const NamedTensor& parameter : bank->parameters()) mean_parameters.push_back(parameter.tensor.mean(0));
  CHECK(relative_error(output("ensemble", rows), mean_TD) < 1e-10);
  CHECK(relative_error(output("averaged", rows), bank->forward_with(mean_parameters, rows.in.x_TD)) < 1e-10);
  const Tensor trained_TD = output("random", pass_of(rows, 2, 0));
  for (const char* inference : {"ensemble", "averaged", "fixed"})
    CHECK(output(inference, pass_of(rows, 2, 0)).equal(trained_TD));
}

TEST_CASE("thor never uses an expert beyond `experts`, and works without rows and with one expert") {
  for (const char* inference : {"random", "ensemble", "fixed", "averaged"}) {
    const auto growing =
        build_router({.name = "thor", .experts = 2, .max_experts = 5, .options = {{"inference", word(inference)}}});
    const RouteOutput out = route(*growing, RouteCase(random_tensor(1, {40, 4})));
    if (const auto* merged = std::get_if<MergePlan>(&out.plan)) CHECK(merged->alpha_GE.equal(numbers({{.5, .5, 0, 0, 0}})));
    else CHECK(dense_gates(sparse(out)).slice(1, 2).eq(0).all().item<bool>());
    CHECK_NOTHROW(route(*growing, RouteCase(random_tensor(1, {0, 4}))));
    CHECK_NOTHROW(route(*growing, RouteCase(random_tensor(1, {0, 4})).train()));
    CHECK_NOTHROW(route(*thor({{"inference", word(inference)}}, 1), RouteCase(random_tensor(1, {3, 4}))));
  }
  CHECK_THROWS_AS(route(*thor(), RouteCase(at::full({2, 4}, std::numeric_limits<double>::quiet_NaN(), at::kDouble))), Error);
}

TEST_CASE("thor's facts follow how it evaluates, and losses that count choices are refused where evaluation merges") {
  CHECK(thor()->facts().random_in_eval);
  CHECK_FALSE(thor({{"inference", word("fixed")}})->facts().random_in_eval);
  CHECK(thor({{"inference", word("ensemble")}})->facts().in_evaluation == InEvaluation::kAllExperts);
  const RouterFacts averaged = thor({{"inference", word("averaged")}})->facts();
  CHECK(averaged.plan_in(Mode::kTrain) == PlanForm::kSparse);
  CHECK(averaged.plan_in(Mode::kEval) == PlanForm::kMerge);
  const auto layer = [](const char* inference) {
    const std::string text = std::string("[moe.router]\nname = \"thor\"\ninference = \"") + inference +
                             "\"\n[[loss]]\nname = \"importance\"\n";
    return read_layer(parse_config(text, "thor.toml"), 4, 0, 0, at::kDouble, random_key(0, "test"));
  };
  CHECK(layer("ensemble").losses.size() == 1);
  CHECK_THROWS_AS(layer("averaged"), Error);
}
