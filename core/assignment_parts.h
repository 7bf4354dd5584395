// What the solvers of assignment.h share: vectors, groups of equal rows, the certificate. Grid units throughout.
#pragma once

#include "core/assignment.h"
#include "core/assignment_lanes.h"

namespace moelab {

// Rows that are equal on the grid, so that collapsed or repeated inputs are solved once. Groups are numbered by first row.
struct RowGroups {
  std::vector<int32_t> first_row_G;
  std::vector<int32_t> size_G;
  std::vector<int32_t> group_T;
  int64_t count() const { return static_cast<int64_t>(first_row_G.size()); }
};
RowGroups group_equal_rows(const GridScores& scores);

using GridPrices = std::vector<int64_t>;

// The best expert at these prices, ties to the lowest, its score minus its price, and by how much at least that exceeds every
// other expert's. Exact.
struct BestExpert {
  int32_t expert = 0;
  int64_t value = 0;
  int64_t margin = 0;
};
class BestFinder {
 public:
  BestFinder(const GridScores& scores, const GridPrices& price_E);
  BestExpert operator()(const int32_t* row) const { return narrow_.empty() ? wide(row) : narrow(row); }

 private:
  BestExpert wide(const int32_t* row) const;
  BestExpert narrow(const int32_t* row) const;

  GridPrices price_E_;
  int64_t lowest_;
  std::vector<int32_t> narrow_;  // above the lowest, padded; empty where they do not fit
};

// Σ_t max_e(s - p_e) + max Σ_e load_e·p_e - Σ_t s[t, a_t], in steps.
int64_t dual_gap(const GridScores& scores, const ExpertLoads& loads, const GridPrices& price_E,
                 const std::vector<int64_t>& expert_T);

// Prices in steps; what is missing or not finite is 0, what is absurdly far out is brought near.
GridPrices grid_prices(const GridScores& scores, std::span<const double> price_E);

// Loads with every extra slot given away: free ones to the experts that most rows score highest.
ExpertLoads settled_loads(const GridScores& scores, ExpertLoads loads);

// Shifts the prices to a lowest of 0 and fills in everything else.
BalancedAssignment certified(const GridScores& scores, const ExpertLoads& loads, GridPrices price_E,
                             std::vector<int64_t> expert_T);

// With fewer rows per expert there is no auction: there are few paths to repair.
inline constexpr int64_t kRowsForAuction = 2;

// Step 1 of the exact solver: an auction in which rows bid for experts, Gauss-Seidel, with falling increments; it moves
// `price_E` near the optimum. Returns the bids made; it gives up rather than fight over tiny increments.
int64_t improve_prices(const GridScores& scores, const RowGroups& groups, const ExpertLoads& loads, bool warm,
                       GridPrices& price_E);

// Step 2: from the best experts at these prices to the optimum, along shortest paths from experts with too many rows to
// experts with too few. `price_E` ends as an optimal dual solution.
struct Repaired {
  std::vector<int64_t> expert_T;
  int64_t paths = 0;
};
Repaired repair(const GridScores& scores, const RowGroups& groups, const ExpertLoads& loads, GridPrices& price_E);

}  // namespace moelab
