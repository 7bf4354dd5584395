// Balanced assignment (spec/routers.md 3.1 and 4): oracle, brute force, certificate, invariants, awkward inputs.
#include "core/assignment.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

using namespace moelab;

namespace {

using Matrix = std::vector<std::vector<double>>;

struct Problem {
  Matrix score_TE;
  int64_t experts;

  int64_t rows() const { return static_cast<int64_t>(score_TE.size()); }
  GridScores grid() const {
    std::vector<double> flat;
    for (const auto& row : score_TE) flat.insert(flat.end(), row.begin(), row.end());
    return grid_scores(std::span<const double>(flat), rows(), experts);
  }
  ExpertLoads loads(ExtraSlots extra = ExtraSlots::kBest, int64_t rotation = 0) const {
    return expert_loads(rows(), experts, extra, rotation);
  }
  double value_of(const std::vector<int64_t>& expert_T) const {
    double value = 0;
    for (size_t t = 0; t < expert_T.size(); ++t) value += score_TE[t][static_cast<size_t>(expert_T[t])];
    return value;
  }
};

const Problem kOracle{{{9, 8, 0}, {9, 7, 1}, {8, 7, 2}, {7, 3, 2}, {6, 5, 4}, {5, 1, 1}}, 3};  // spec 3.1

std::vector<int64_t> counts_of(const std::vector<int64_t>& expert_T, int64_t experts) {
  std::vector<int64_t> counts(static_cast<size_t>(experts), 0);
  for (const int64_t e : expert_T) ++counts[static_cast<size_t>(e)];
  return counts;
}

bool has_loads(std::vector<int64_t> counts, const ExpertLoads& loads) {
  int64_t extra = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    const int64_t over = counts[e] - loads.load_E[e];
    if (over < 0 || over > (loads.free_extra > 0 ? 1 : 0)) return false;
    extra += over;
  }
  return extra == loads.free_extra;
}

// The best value by trying every assignment.
double best_by_trying(const Problem& problem, const ExpertLoads& loads) {
  double best = -INFINITY;
  std::vector<int64_t> expert_T(problem.score_TE.size(), 0);
  for (;;) {
    if (has_loads(counts_of(expert_T, problem.experts), loads)) best = std::max(best, problem.value_of(expert_T));
    size_t t = 0;
    for (; t < expert_T.size() && ++expert_T[t] == problem.experts; ++t) expert_T[t] = 0;
    if (t == expert_T.size()) return best;
  }
}

using Draw = std::mt19937_64;
int64_t draw_below(Draw& draw, int64_t bound) { return static_cast<int64_t>(draw() % static_cast<uint64_t>(bound)); }

// Kinds: normal, small integers (many ties), repeated rows, all equal, huge and skewed, shifted far away, one score apart.
Problem random_problem(Draw& draw, int64_t rows, int64_t experts, int64_t kind) {
  std::normal_distribution<double> normal;
  Problem problem{Matrix(static_cast<size_t>(rows), std::vector<double>(static_cast<size_t>(experts))), experts};
  for (auto& row : problem.score_TE)
    for (size_t e = 0; e < row.size(); ++e) {
      row[e] = normal(draw);
      if (kind == 1) row[e] = static_cast<double>(draw_below(draw, 3));
      if (kind == 3) row[e] = 2;
      if (kind == 4) row[e] = (draw() % 2 == 0 ? 1e4 : -1e4) + static_cast<double>(e % 2) * 1e4;
      if (kind == 5) row[e] += 1e4;
      if (kind == 6) row[e] = e == 0 ? 5 : 0;
    }
  const int64_t repeated = std::min<int64_t>(rows, 3);
  if (kind == 2)
    for (auto& row : problem.score_TE) row = problem.score_TE[static_cast<size_t>(draw_below(draw, repeated))];
  if (kind == 6 && rows > 0) problem.score_TE.back()[static_cast<size_t>(draw_below(draw, experts))] += 1e-6;
  return problem;
}
constexpr int64_t kKinds = 7;

// No assignment with these loads has a larger sum of scores: Σ_t max_e(s - p_e) + the largest Σ_e c_e·p_e, by plain loops over
// the scores as they are.
double plain_dual_bound(const Problem& problem, const ExpertLoads& loads, std::vector<double> price_E) {
  double bound = 0;
  for (const auto& row : problem.score_TE) {
    double best = -INFINITY;
    for (size_t e = 0; e < row.size(); ++e) best = std::max(best, row[e] - price_E[e]);
    bound += best;
  }
  for (size_t e = 0; e < price_E.size(); ++e) bound += static_cast<double>(loads.load_E[e]) * price_E[e];
  std::sort(price_E.rbegin(), price_E.rend());
  for (int64_t i = 0; i < loads.free_extra; ++i) bound += price_E[static_cast<size_t>(i)];
  return bound;
}

// Rounding to the grid moves the bound and the value by T·step/2 each.
void check_certified(const Problem& problem, const ExpertLoads& loads, const BalancedAssignment& found) {
  const double bound = plain_dual_bound(problem, loads, found.price_E);
  const double allowed = static_cast<double>(problem.rows()) * problem.grid().step + 1e-12 * std::abs(bound);
  const bool proven = found.gap_steps == 0 && bound - problem.value_of(found.expert_T) <= allowed;
  if (!proven || !has_loads(counts_of(found.expert_T, problem.experts), loads))
    FAIL("T = " << problem.rows() << ", E = " << problem.experts << ": gap " << found.gap_steps << ", bound " << bound);
}

double balanced_random_value(const Problem& problem, Draw& draw) {
  std::vector<int64_t> expert_T(problem.score_TE.size());
  for (size_t t = 0; t < expert_T.size(); ++t) expert_T[t] = static_cast<int64_t>(t) % problem.experts;
  std::shuffle(expert_T.begin(), expert_T.end(), draw);
  return problem.value_of(expert_T);
}

}  // namespace

TEST_CASE("assignment oracle (spec 3.1): the unique optimum is 36 with [1,0,1,0,2,2], proven") {
  const BalancedAssignment found = assign_exactly(kOracle.grid(), kOracle.loads(), {});
  CHECK(found.expert_T == std::vector<int64_t>{1, 0, 1, 0, 2, 2});
  CHECK(found.value == 36);
  CHECK(found.gap_steps == 0);
  CHECK(found.gap == 0);
  CHECK(*std::min_element(found.price_E.begin(), found.price_E.end()) == 0);
  CHECK(dual_bound(kOracle.grid(), kOracle.loads(), found.price_E) == 36);
}

TEST_CASE("assignment oracle (spec 3.1): the four optimal dual prices are worth 36, others more") {
  const GridScores grid = kOracle.grid();
  for (const std::vector<double>& price_E : {std::vector<double>{4, 2, 0}, {4, 3, 0}, {5, 3, 0}, {5, 4, 0}}) {
    CHECK(dual_bound(grid, kOracle.loads(), price_E) == 36);
    CHECK(assign_exactly(grid, kOracle.loads(), price_E).expert_T == std::vector<int64_t>{1, 0, 1, 0, 2, 2});
  }
  CHECK(dual_bound(grid, kOracle.loads(), std::vector<double>{0, 0, 0}) == 9 + 9 + 8 + 7 + 6 + 5);
  CHECK(dual_bound(grid, kOracle.loads(), std::vector<double>{6, 4, 0}) > 36);
}

TEST_CASE("assignment oracle (spec 3.1): expert by expert gives 33, and its gap bounds what it loses") {
  const BalancedAssignment found = assign_greedily(kOracle.grid(), kOracle.loads(), std::vector<double>{4, 2, 0});
  CHECK(found.expert_T == std::vector<int64_t>{0, 0, 1, 2, 1, 2});
  CHECK(found.value == 33);
  CHECK(found.gap == 3);
}

TEST_CASE("the exact assignment equals brute force on small problems of every kind, with every rule for extra slots") {
  Draw draw(1);
  for (int i = 0; i < 4000; ++i) {
    const int64_t experts = 1 + draw_below(draw, 4), rows = draw_below(draw, experts == 4 ? 6 : 8);
    const Problem problem = random_problem(draw, rows, experts, i % kKinds);
    const auto extra = static_cast<ExtraSlots>(i % 3);
    const ExpertLoads loads = problem.loads(extra, i);
    std::vector<double> start_E;
    for (int64_t e = 0; i % 2 == 1 && e < experts; ++e) start_E.push_back(static_cast<double>(draw_below(draw, 9)) - 4);
    const GridScores grid = problem.grid();
    const BalancedAssignment found = assign_exactly(grid, loads, start_E);
    check_certified(problem, loads, found);
    const double best = best_by_trying(problem, loads);
    INFO("kind " << i % kKinds << ", T = " << rows << ", E = " << experts);
    const double allowed = static_cast<double>(rows) * grid.step + 1e-12 * std::abs(best);
    REQUIRE(std::abs(problem.value_of(found.expert_T) - best) <= allowed);
  }
}

TEST_CASE("10,000 random and adversarial problems end with a gap of 0 (spec 4.1), cold and warm") {
  Draw draw(2);
  for (int i = 0; i < 10000; ++i) {
    const int64_t experts = 1 + draw_below(draw, i % 10 == 0 ? 40 : 9), rows = draw_below(draw, i % 10 == 0 ? 600 : 60);
    const Problem problem = random_problem(draw, rows, experts, i % kKinds);
    const ExpertLoads loads = problem.loads(static_cast<ExtraSlots>(i / 7 % 3), i);
    const BalancedAssignment cold = assign_exactly(problem.grid(), loads, {});
    check_certified(problem, loads, cold);
    if (i % 4 > 0) continue;
    const BalancedAssignment warm = assign_exactly(problem.grid(), loads, cold.price_E);
    check_certified(problem, loads, warm);
    REQUIRE(warm.value == cold.value);
  }
}

TEST_CASE("shifting rows or columns leaves the assignment and shifts its value by Σ r_t + Σ c_e·b_e (spec 3.1)") {
  Draw draw(3);
  for (int i = 0; i < 50; ++i) {
    const Problem problem = random_problem(draw, 24, 4, 0);
    Problem shifted = problem;
    double shift = 0;
    for (size_t t = 0; t < 24; ++t)
      for (size_t e = 0; e < 4; ++e) {
        const double row = static_cast<double>(t % 5) - 2, column = 3 * static_cast<double>(e);
        shifted.score_TE[t][e] += row + column;
        shift += row / 4 + column / 4;
      }
    const BalancedAssignment one = assign_exactly(problem.grid(), problem.loads(), {});
    const BalancedAssignment other = assign_exactly(shifted.grid(), shifted.loads(), {});
    REQUIRE(one.expert_T == other.expert_T);
    REQUIRE(std::abs(other.value - one.value - shift) < 24 * shifted.grid().step);
  }
}

TEST_CASE("permuting rows or experts permutes the assignment, extra slots included") {
  Draw draw(4);
  for (int i = 0; i < 50; ++i) {
    const Problem problem = random_problem(draw, 23, 5, 0);
    std::vector<size_t> row(23), column(5);
    std::iota(row.begin(), row.end(), 0);
    std::iota(column.begin(), column.end(), 0);
    std::shuffle(row.begin(), row.end(), draw);
    std::shuffle(column.begin(), column.end(), draw);
    Problem mixed = problem;
    for (size_t t = 0; t < 23; ++t)
      for (size_t e = 0; e < 5; ++e) mixed.score_TE[t][e] = problem.score_TE[row[t]][column[e]];
    const BalancedAssignment one = assign_exactly(problem.grid(), problem.loads(), {});
    const BalancedAssignment other = assign_exactly(mixed.grid(), mixed.loads(), {});
    for (size_t t = 0; t < 23; ++t)
      REQUIRE(static_cast<int64_t>(column[static_cast<size_t>(other.expert_T[t])]) == one.expert_T[row[t]]);
  }
}

TEST_CASE("no random balanced assignment beats the exact one, and no approximate one does (spec 3.1)") {
  Draw draw(5);
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    const Problem problem = random_problem(draw, 64, 8, kind);
    const GridScores grid = problem.grid();
    const BalancedAssignment best = assign_exactly(grid, problem.loads(), {});
    const double slack = 64 * grid.step;
    for (int i = 0; i < 1000; ++i) REQUIRE(balanced_random_value(problem, draw) <= best.value + slack);
    for (const BalancedAssignment& other : {assign_by_auction(grid, problem.loads()), assign_by_sinkhorn(grid, problem.loads()),
                                            assign_greedily(grid, problem.loads(), {})})
      CHECK(other.value <= best.value + slack);
  }
}

TEST_CASE("approximate solvers balance and their gap is what they may lose at most, for every size and kind") {
  Draw draw(6);
  for (int i = 0; i < 400; ++i) {
    const Problem problem = random_problem(draw, draw_below(draw, 40), 1 + draw_below(draw, 7), i % kKinds);
    const ExpertLoads loads = problem.loads(static_cast<ExtraSlots>(i % 3), i);
    const GridScores grid = problem.grid();
    const BalancedAssignment best = assign_exactly(grid, loads, {});
    for (const BalancedAssignment& other :
         {assign_by_auction(grid, loads), assign_by_sinkhorn(grid, loads), assign_greedily(grid, loads, {})}) {
      REQUIRE(has_loads(counts_of(other.expert_T, problem.experts), loads));
      REQUIRE(other.gap_steps >= 0);
      REQUIRE(best.value - other.value <= other.gap + 1e-9 * (1 + std::abs(best.value)));
    }
  }
}

TEST_CASE("Sinkhorn at a lower temperature comes closer; the auction loses less than a tenth of optimum minus random") {
  Draw draw(7);
  const Problem problem = random_problem(draw, 1024, 16, 0);
  const GridScores grid = problem.grid();
  const double best = assign_exactly(grid, problem.loads(), {}).value, random = balanced_random_value(problem, draw);
  const auto loss = [&](const BalancedAssignment& found) { return (best - found.value) / (best - random); };
  CHECK(loss(assign_by_sinkhorn(grid, problem.loads(), 0.02)) < loss(assign_by_sinkhorn(grid, problem.loads(), 1)));
  CHECK(loss(assign_by_sinkhorn(grid, problem.loads())) < 0.01);
  CHECK(loss(assign_by_auction(grid, problem.loads())) < 0.1);
}

TEST_CASE("extra slots: the lowest indices, a rotating start, or those of the best total") {
  CHECK(expert_loads(11, 4, ExtraSlots::kLowest).load_E == std::vector<int64_t>{3, 3, 3, 2});
  CHECK(expert_loads(11, 4, ExtraSlots::kRotate, 7).load_E == std::vector<int64_t>{3, 3, 2, 3});
  CHECK(expert_loads(2, 4, ExtraSlots::kRotate, 3).load_E == std::vector<int64_t>{1, 0, 0, 1});
  CHECK(expert_loads(11, 4, ExtraSlots::kBest).free_extra == 3);
  const Problem wants_last{{{0, 0, 1}, {0, 0, 1}, {0, 0, 0}, {0, 0, 0}}, 3};
  CHECK(assign_exactly(wants_last.grid(), wants_last.loads(), {}).value == 2);
  CHECK(assign_exactly(wants_last.grid(), wants_last.loads(ExtraSlots::kLowest), {}).value == 1);
  CHECK(counts_of(assign_exactly(wants_last.grid(), wants_last.loads(), {}).expert_T, 3)[2] == 2);
}

TEST_CASE("no rows, one expert, fewer rows than experts, and one row") {
  const Problem few{{{1, 3, 3, 2}, {0, 9, 0, 8}}, 4};
  for (const Problem& problem : {Problem{{}, 3}, Problem{{{1}, {2}, {-1}}, 1}, few, Problem{{{0, 1}}, 2}}) {
    const BalancedAssignment found = assign_exactly(problem.grid(), problem.loads(), {});
    check_certified(problem, problem.loads(), found);
    CHECK(found.value == (problem.rows() == 0 ? 0 : best_by_trying(problem, problem.loads())));
  }
}

TEST_CASE("equal rows take experts in order, the lowest row first") {
  const Problem same{Matrix(6, {1, 1, 1}), 3};
  CHECK(assign_exactly(same.grid(), same.loads(), {}).expert_T == std::vector<int64_t>{0, 0, 1, 1, 2, 2});
}

TEST_CASE("prices from nowhere near, or not numbers, only cost time") {
  Draw draw(8);
  const Problem problem = random_problem(draw, 200, 6, 0);
  const double best = assign_exactly(problem.grid(), problem.loads(), {}).value;
  for (const std::vector<double>& start_E :
       {std::vector<double>{1e30, -1e30, 0, 0, 0, 0}, {NAN, 1, 2, 3, 4, 5}, {INFINITY, 0, 0, 0, 0, 0}, {50, 0, -50, 2, 7, 1e6}}) {
    const BalancedAssignment found = assign_exactly(problem.grid(), problem.loads(), start_E);
    check_certified(problem, problem.loads(), found);
    CHECK(found.value == best);
  }
}

TEST_CASE("float and double scores of the same values give the same assignment") {
  Draw draw(9);
  std::normal_distribution<float> normal;
  std::vector<float> scores(500 * 7);
  for (float& score : scores) score = normal(draw);
  const std::vector<double> wide(scores.begin(), scores.end());
  const ExpertLoads loads = expert_loads(500, 7, ExtraSlots::kBest);
  const BalancedAssignment one = assign_exactly(grid_scores(std::span<const float>(scores), 500, 7), loads, {});
  const BalancedAssignment other = assign_exactly(grid_scores(std::span<const double>(wide), 500, 7), loads, {});
  CHECK(one.expert_T == other.expert_T);
  CHECK(one.price_E == other.price_E);
}

TEST_CASE("the grid is the stated one: within 2^-28 of the largest spread of a row, and small integers stay exact") {
  const GridScores grid = Problem{{{5, 0, -3}, {100, 100, 99}}, 3}.grid();
  CHECK(grid.step == std::exp2(3 - 29));  // spread 8
  CHECK(grid.rounded(0, 2) == -3);
  CHECK(grid.rounded(1, 2) == 99);
  Draw draw(10);
  const Problem problem = random_problem(draw, 30, 5, 0);
  const GridScores rounded = problem.grid();
  for (int64_t t = 0; t < 30; ++t)
    for (int64_t e = 0; e < 5; ++e)
      CHECK(std::abs(rounded.rounded(t, e) - problem.score_TE[static_cast<size_t>(t)][static_cast<size_t>(e)]) <=
            0.5000001 * rounded.step);
}

TEST_CASE("large awkward problems end: equal rows, few kinds of rows, near ties, scores of ±1e4, everybody wants one expert") {
  Draw draw(11);
  for (int64_t kind = 0; kind <= kKinds; ++kind) {
    Problem problem = random_problem(draw, 3001, 32, kind % kKinds);
    if (kind == kKinds)  // one kind of row, apart by less than any increment of the auction
      for (auto& row : problem.score_TE)
        for (size_t e = 0; e < row.size(); ++e) row[e] = static_cast<double>(e % 3) + 1e-7 * row[e];
    check_certified(problem, problem.loads(), assign_exactly(problem.grid(), problem.loads(), {}));
  }
}
