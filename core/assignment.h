// Balanced assignment of T rows to E experts: the largest Σ_t s[t, a_t] among assignments in which every expert gets ⌊T/E⌋ or
// ⌈T/E⌉ rows. Knows nothing of tensors: scores come as spans of float or double.
//
// Scores are rounded to a grid first. On the grid all arithmetic of the exact solver and of the certificate is on integers, so
// a gap of 0 proves that no assignment has a larger sum of rounded scores. A rounded score is off by at most step/2, hence the
// sum of the scores themselves is within T·step of the best.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace moelab {

// Scores in grid steps below the largest of their row (a row's shift changes no assignment). `step` is the power of two in
// (w/2^29, w/2^28], w = the largest spread within a row: scores that are multiples of it, as small integers are, keep their
// differences exactly.
struct GridScores {
  int64_t rows = 0;
  int64_t experts = 0;
  int64_t stride = 0;         // experts rounded up to whole vectors
  std::unique_ptr<int32_t[]> below_max;  // [rows, stride], -2^29 … 0; padding is 0 and never read as a score
  double step = 1;
  std::vector<double> max_T;  // largest score of each row
  double mean_spread = 0;     // largest minus smallest score of a row, in steps, on average

  const int32_t* row(int64_t t) const { return below_max.get() + t * stride; }
  double rounded(int64_t t, int64_t e) const { return max_T[static_cast<size_t>(t)] + row(t)[e] * step; }
};

// Every score must be finite.
GridScores grid_scores(std::span<const float> scores, int64_t rows, int64_t experts);
GridScores grid_scores(std::span<const double> scores, int64_t rows, int64_t experts);

// Which experts get ⌈T/E⌉ rows where T is not a multiple of E: those of the best total, the lowest indices, or the T mod E
// experts from `rotation` on, in a circle.
enum class ExtraSlots { kBest, kLowest, kRotate };

// How many rows each expert must get.
struct ExpertLoads {
  std::vector<int64_t> load_E;  // kBest: ⌊T/E⌋ each, without the extra slots
  int64_t free_extra = 0;       // extra slots that may go to any expert, one each
};
ExpertLoads expert_loads(int64_t rows, int64_t experts, ExtraSlots extra, int64_t rotation = 0);

struct BalancedAssignment {
  std::vector<int64_t> expert_T;
  std::vector<double> price_E;      // in the units of the scores; the lowest is 0
  double value = 0;                 // Σ of the chosen rounded scores
  int64_t gap_steps = 0;            // dual bound at these prices minus value, in grid steps; 0 = proven best
  double gap = 0;                   // the same in the units of the scores
  int64_t bids = 0;                 // work done: bids of the auction, paths of the repair
  int64_t paths = 0;
};

// Upper bound of every balanced assignment's value: Σ_t max_e(s - p_e) + the largest Σ_e load_e·p_e. In the units of the
// scores; finite prices only.
double dual_bound(const GridScores& scores, const ExpertLoads& loads, std::span<const double> price_E);

// Exact. `price_E` is where the search starts (empty = nowhere): those of a similar problem save most of the work.
BalancedAssignment assign_exactly(const GridScores& scores, const ExpertLoads& loads, std::span<const double> price_E);

// The approximate ones balance too, but prove nothing: their gap bounds what they lose. Extra slots that are free go to the
// experts that most rows score highest.

// Experts bid for rows, increments of 1/50 of the range of scores, at most 100 rounds; rows without a bidder then go greedily.
BalancedAssignment assign_by_auction(const GridScores& scores, const ExpertLoads& loads);

// Prices from Sinkhorn iterations in the log domain, the temperature falling to `temperature` times the typical difference;
// argmax under these prices; rows that do not fit then go greedily.
BalancedAssignment assign_by_sinkhorn(const GridScores& scores, const ExpertLoads& loads, double temperature = 0.02);

// Experts in their order, each takes the best of the rows left. The prices stay as given.
BalancedAssignment assign_greedily(const GridScores& scores, const ExpertLoads& loads, std::span<const double> price_E);

}  // namespace moelab
