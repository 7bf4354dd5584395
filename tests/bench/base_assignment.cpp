// Balanced assignment of T rows to E experts: the exact solver, cold and from the prices of the scores before 5 % noise,
// against the auction of at most 100 rounds and, where LEMON is installed, its network simplex on the graph of all T·E pairs. All
// of them in one thread, in turns, on the same scores: Gaussian with a Gaussian bias per expert.
#include "core/assignment.h"
#include "core/error.h"
#include "core/memory.h"

#include <benchmark/benchmark.h>

#if __has_include(<lemon/network_simplex.h>)
#define MOELAB_HAS_LEMON
#include <lemon/network_simplex.h>
#include <lemon/static_graph.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace moelab;

constexpr int64_t kExperts = 64, kRows = 8192;
const std::vector<int64_t> kGrowth{2048, 4096, 8192, 16384, 32768, 65536};

struct Scores {
  int64_t rows;
  std::vector<float> first, second;  // [T,E], and with 5 % noise
  std::vector<double> price_E;       // of the first

  GridScores grid(const std::vector<float>& scores) const {
    return grid_scores(std::span<const float>(scores), rows, kExperts);
  }
  ExpertLoads loads() const { return expert_loads(rows, kExperts, ExtraSlots::kBest); }
  BalancedAssignment cold() const { return assign_exactly(grid(first), loads(), {}); }
  BalancedAssignment warm() const { return assign_exactly(grid(second), loads(), price_E); }
};

Scores make_scores(int64_t rows) {
  std::mt19937_64 draw(static_cast<uint64_t>(rows));
  std::normal_distribution<float> normal;
  std::vector<float> bias(kExperts);
  for (float& value : bias) value = normal(draw);
  Scores scores{rows, std::vector<float>(static_cast<size_t>(rows * kExperts)), {}, {}};
  for (size_t i = 0; i < scores.first.size(); ++i) scores.first[i] = normal(draw) + bias[i % kExperts];
  for (const float score : scores.first) scores.second.push_back(score + 0.05f * normal(draw));
  scores.price_E = scores.cold().price_E;
  return scores;
}

const Scores& scores_of(int64_t rows) {
  static std::map<int64_t, Scores> made;
  const auto found = made.find(rows);
  return found != made.end() ? found->second : made.emplace(rows, make_scores(rows)).first->second;
}

#ifdef MOELAB_HAS_LEMON
// The value of the best assignment, in grid steps below the sum of the rows' maxima.
int64_t simplex_value(const Scores& scores) {
  const GridScores grid = scores.grid(scores.first);
  const auto rows = static_cast<int>(grid.rows), experts = static_cast<int>(grid.experts);
  std::vector<std::pair<int, int>> arcs;
  for (int t = 0; t < rows; ++t)
    for (int e = 0; e < experts; ++e) arcs.emplace_back(t, rows + e);
  lemon::StaticDigraph graph;
  graph.build(rows + experts, arcs.begin(), arcs.end());
  lemon::StaticDigraph::ArcMap<int64_t> cost(graph);
  for (int64_t a = 0; a < graph.arcNum(); ++a)
    cost[graph.arc(static_cast<int>(a))] = -grid.row(a / kExperts)[a % kExperts];
  lemon::StaticDigraph::NodeMap<int> supply(graph, 1);
  for (int e = 0; e < experts; ++e) supply[graph.node(rows + e)] = -rows / experts;
  lemon::NetworkSimplex<lemon::StaticDigraph, int, int64_t> simplex(graph);
  check_invariant(simplex.costMap(cost).supplyMap(supply).run() == simplex.OPTIMAL, "the network simplex finds an optimum");
  return simplex.totalCost<int64_t>();
}
#endif

// Each line shows once that it computes what it says.
void check_answers() {
  const Scores& scores = scores_of(kRows);
  const BalancedAssignment cold = scores.cold(), warm = scores.warm();
  check_invariant(cold.gap_steps == 0 && warm.gap_steps == 0, "an exact assignment is proven");
  const GridScores grid = scores.grid(scores.first);
  const double loss = cold.value - assign_by_auction(grid, scores.loads()).value;
  std::printf("100-round auction: %.3f below the optimum of %.1f\n", loss, cold.value);
#ifdef MOELAB_HAS_LEMON
  int64_t steps = 0;
  for (int64_t t = 0; t < kRows; ++t) steps -= grid.row(t)[cold.expert_T[static_cast<size_t>(t)]];
  check_invariant(simplex_value(scores) == steps, "the network simplex finds the same value");
#endif
}

template <class Work>
void add_line(const std::string& name, int64_t repetitions, Work work) {
  benchmark::RegisterBenchmark(name.c_str(), [work](benchmark::State& state) { for (auto _ : state) work(); })
      ->Unit(benchmark::kMillisecond)->Iterations(1)->Repetitions(static_cast<int>(repetitions))->ReportAggregatesOnly(false);
}

void register_lines() {
  for (const int64_t rows : kGrowth) {
    const std::string size = "/" + std::to_string(rows);
    add_line("cold" + size, 15, [rows] { benchmark::DoNotOptimize(scores_of(rows).cold()); });
    add_line("warm" + size, 15, [rows] { benchmark::DoNotOptimize(scores_of(rows).warm()); });
  }
  add_line("auction", 5, [] {
    const Scores& scores = scores_of(kRows);
    benchmark::DoNotOptimize(assign_by_auction(scores.grid(scores.first), scores.loads()));
  });
#ifdef MOELAB_HAS_LEMON
  add_line("simplex", 3, [] { benchmark::DoNotOptimize(simplex_value(scores_of(kRows))); });
#endif
}

// Prints as usual, and keeps the processor time of every repetition.
class AssignmentReporter : public benchmark::ConsoleReporter {
 public:
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs)
      if (run.run_type == Run::RT_Iteration) times_[run.run_name.function_name].push_back(run.GetAdjustedCPUTime());
    ConsoleReporter::ReportRuns(runs);
  }

  void print_ratios() const {
    std::printf("T = %ld, E = %ld, median processor time:  cold %.2f ms (bar 12)   warm %.2f ms (bar 3)\n", kRows, kExperts,
                median("cold/8192"), median("warm/8192"));
    for (const char* other : {"auction", "simplex"})
      std::printf("%-8s %8.1f ms   %.1f times cold (bar 8)\n", other, median(other), median(other) / median("cold/8192"));
    for (const char* start : {"cold", "warm"})
      std::printf("%s grows from T = %ld to %ld as T^%.2f (bar 1.2)\n", start, kGrowth.front(), kGrowth.back(),
                  exponent(start));
  }

 private:
  double median(const std::string& name) const {
    const auto found = times_.find(name);
    if (found == times_.end()) return std::nan("");  // filtered out, or LEMON is not installed
    std::vector<double> sorted = found->second;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
  double exponent(const std::string& start) const {
    const auto at = [&](int64_t rows) { return std::log(median(start + "/" + std::to_string(rows))); };
    const double ratio = static_cast<double>(kGrowth.back()) / static_cast<double>(kGrowth.front());
    return (at(kGrowth.back()) - at(kGrowth.front())) / std::log(ratio);
  }
  std::map<std::string, std::vector<double>> times_;
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true";
  arguments.insert(arguments.begin() + 1, interleave);
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  keep_freed_memory();  // as the program does
  check_answers();
  register_lines();
  AssignmentReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  reporter.print_ratios();
  return 0;
}
