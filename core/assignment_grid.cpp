// The grid, groups of equal rows, loads, and the certificate.
#include "core/assignment_parts.h"

#include "core/error.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace moelab {
namespace {

constexpr double kGridBits = 29;
constexpr double kPriceLimit = 0x1p44;  // times 2^9 of headroom, every sum below is exact in double and in int64
// More than any other price in a narrow search. A row's best score is 0, so its best value is above -kPadding.
constexpr int32_t kPadding = int32_t{1} << 30;

struct RowSpread {
  double largest = 0;  // largest minus smallest score of a row
  double sum = 0;
  std::vector<double> max_T;
};

template <class Score>
using ScoreLanes __attribute__((vector_size(kLanes * sizeof(Score)))) = Score;

// Calls use(e, scores e … e+kLanes-1 of a row); columns beyond the last repeat `fill`.
template <class Score, class Use>
MOELAB_INLINE void each_lanes(const Score* row, int64_t experts, Score fill, Use use) {
  ScoreLanes<Score> lanes;
  int64_t e = 0;
  for (; e + kLanes <= experts; e += kLanes) {
    load(lanes, row + e);
    use(e, lanes);
  }
  if (e == experts) return;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = e + lane < experts ? row[e + lane] : fill;
  use(e, lanes);
}

template <class Score>
MOELAB_LANES RowSpread spread_of(std::span<const Score> scores, int64_t rows, int64_t experts) {
  RowSpread spread{0, 0, std::vector<double>(static_cast<size_t>(rows))};
  for (int64_t t = 0; t < rows; ++t) {
    const Score* row = scores.data() + t * experts;
    ScoreLanes<Score> high = ScoreLanes<Score>{} + row[0], low = high;
    each_lanes(row, experts, row[0], [&](int64_t, const ScoreLanes<Score>& lanes) {
      keep_larger(high, lanes);
      keep_smaller(low, lanes);
    });
    const double top = largest(high), bottom = smallest(low);
    spread.max_T[static_cast<size_t>(t)] = top;
    spread.largest = std::max(spread.largest, top - bottom);
    spread.sum += top - bottom;
  }
  return spread;
}

// Rounds one row to the grid. To the nearest, ties to even: 1.5·2^52 leaves no room for a
// fraction.
template <class Score>
MOELAB_LANES void round_row(const Score* row, int64_t experts, double max, double per_step, int32_t* to) {
  constexpr double kNoFraction = 0x1.8p52;
  each_lanes(row, experts, static_cast<Score>(max), [&](int64_t e, const ScoreLanes<Score>& lanes) {
    const ScoreLanes<double> steps = (__builtin_convertvector(lanes, ScoreLanes<double>) - max) * per_step;
    const Ints rounded = __builtin_convertvector((steps + kNoFraction) - kNoFraction, Ints);
    store(to + e, rounded);
  });
}

template <class Score>
GridScores make_grid(std::span<const Score> scores, int64_t rows, int64_t experts) {
  check_invariant(experts > 0 && static_cast<int64_t>(scores.size()) == rows * experts, "scores are not [rows, experts]");
  RowSpread spread = spread_of(scores, rows, experts);
  check_invariant(std::isfinite(spread.largest), "scores of an assignment are finite");
  GridScores grid{rows, experts, (experts + kLanes - 1) / kLanes * kLanes, nullptr, 1, std::move(spread.max_T), 0};
  if (spread.largest > 0) grid.step = std::exp2(std::ceil(std::log2(spread.largest)) - kGridBits);
  grid.below_max = std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(rows * grid.stride));
  grid.mean_spread = spread.sum / grid.step / std::max<double>(1, static_cast<double>(rows));
  for (int64_t t = 0; t < rows; ++t) {
    const double max = grid.max_T[static_cast<size_t>(t)];
    round_row(scores.data() + t * experts, experts, max, 1 / grid.step, grid.below_max.get() + t * grid.stride);
  }
  return grid;
}

uint64_t hash_of_row(const int32_t* row, int64_t stride) {
  uint64_t lane[2] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu};
  for (int64_t e = 0; e < stride; e += 4) {
    uint64_t pair[2];
    std::memcpy(pair, row + e, sizeof pair);
    for (int i = 0; i < 2; ++i) lane[i] = std::rotl(lane[i] ^ pair[i], 29) * 0xff51afd7ed558ccdu;
  }
  const uint64_t both = (lane[0] ^ std::rotl(lane[1], 31)) * 0x9fb21c651e98df25u;
  return both ^ (both >> 32);
}

// The largest Σ_e load_e·p_e that the loads allow.
int64_t largest_payment(const ExpertLoads& loads, GridPrices price_E) {
  int64_t payment = 0;
  for (size_t e = 0; e < price_E.size(); ++e) payment += loads.load_E[e] * price_E[e];
  std::partial_sort(price_E.begin(), price_E.begin() + loads.free_extra, price_E.end(), std::greater<>());
  return std::accumulate(price_E.begin(), price_E.begin() + loads.free_extra, payment);
}

int64_t value_in_steps(const GridScores& scores, const std::vector<int64_t>& expert_T) {
  int64_t value = 0;
  for (int64_t t = 0; t < scores.rows; ++t) value += scores.row(t)[expert_T[static_cast<size_t>(t)]];
  return value;
}

double sum_of_maxima(const GridScores& scores) { return std::accumulate(scores.max_T.begin(), scores.max_T.end(), 0.0); }

}  // namespace

GridScores grid_scores(std::span<const float> scores, int64_t rows, int64_t experts) {
  return make_grid(scores, rows, experts);
}

GridScores grid_scores(std::span<const double> scores, int64_t rows, int64_t experts) {
  return make_grid(scores, rows, experts);
}

ExpertLoads expert_loads(int64_t rows, int64_t experts, ExtraSlots extra, int64_t rotation) {
  ExpertLoads loads{std::vector<int64_t>(static_cast<size_t>(experts), rows / experts), rows % experts};
  if (extra == ExtraSlots::kBest) return loads;
  const int64_t from = extra == ExtraSlots::kRotate ? rotation % experts : 0;
  for (int64_t i = 0; i < loads.free_extra; ++i) ++loads.load_E[static_cast<size_t>((from + i) % experts)];
  loads.free_extra = 0;
  return loads;
}

RowGroups group_equal_rows(const GridScores& scores) {
  RowGroups groups;
  groups.group_T.resize(static_cast<size_t>(scores.rows));
  size_t places = 16;
  while (places < 2 * static_cast<size_t>(scores.rows)) places *= 2;
  std::vector<int32_t> group_at(places, -1);
  std::vector<uint64_t> hash_G;
  const size_t bytes = static_cast<size_t>(scores.stride) * sizeof(int32_t);
  for (int64_t t = 0; t < scores.rows; ++t) {
    const uint64_t hash = hash_of_row(scores.row(t), scores.stride);
    size_t at = hash & (places - 1);
    const auto same = [&](int32_t g) {
      const auto i = static_cast<size_t>(g);
      return hash_G[i] == hash && std::memcmp(scores.row(groups.first_row_G[i]), scores.row(t), bytes) == 0;
    };
    while (group_at[at] >= 0 && !same(group_at[at])) at = (at + 1) & (places - 1);
    if (group_at[at] < 0) {
      group_at[at] = static_cast<int32_t>(groups.first_row_G.size());
      hash_G.push_back(hash);
      groups.first_row_G.push_back(static_cast<int32_t>(t));
      groups.size_G.push_back(0);
    }
    groups.group_T[static_cast<size_t>(t)] = group_at[at];
    ++groups.size_G[static_cast<size_t>(group_at[at])];
  }
  return groups;
}

BestFinder::BestFinder(const GridScores& scores, const GridPrices& price_E)
    : price_E_(price_E), lowest_(*std::min_element(price_E.begin(), price_E.end())) {
  if (*std::max_element(price_E.begin(), price_E.end()) - lowest_ >= kPadding) return;
  for (const int64_t price : price_E) narrow_.push_back(static_cast<int32_t>(price - lowest_));
  narrow_.resize(static_cast<size_t>(scores.stride), kPadding);
}

BestExpert BestFinder::wide(const int32_t* row) const {
  constexpr int64_t kNone = -(int64_t{1} << 61);
  BestExpert best{0, row[0] - price_E_[0]};
  int64_t second = kNone;
  for (size_t e = 1; e < price_E_.size(); ++e) {
    const int64_t value = row[e] - price_E_[e];
    second = std::max(second, std::min(value, best.value));
    if (value > best.value) best = {static_cast<int32_t>(e), value};
  }
  best.margin = best.value - second;
  return best;
}

// The padding may count as second best, and the margin be less than it is.
MOELAB_LANES BestExpert BestFinder::narrow(const int32_t* row) const {
  TopLanes<Ints> top(std::numeric_limits<int32_t>::min());
  Ints value, price;
  for (size_t e = 0; e < narrow_.size(); e += kLanes) {
    load(value, row + e), load(price, narrow_.data() + e);
    value -= price;
    top.add(value);
  }
  top.fold();
  FirstHit hit;
  for (size_t e = 0; e < narrow_.size(); e += kLanes) {
    load(value, row + e), load(price, narrow_.data() + e);
    hit.look(value - price == top.best);
  }
  return {hit.get(), top.best[0] - lowest_, int64_t{top.best[0]} - top.second[0]};
}

int64_t dual_gap(const GridScores& scores, const ExpertLoads& loads, const GridPrices& price_E,
                 const std::vector<int64_t>& expert_T) {
  const BestFinder best(scores, price_E);
  int64_t bound = largest_payment(loads, price_E);
  for (int64_t t = 0; t < scores.rows; ++t) bound += best(scores.row(t)).value;
  return bound - value_in_steps(scores, expert_T);
}

GridPrices grid_prices(const GridScores& scores, std::span<const double> price_E) {
  GridPrices prices(static_cast<size_t>(scores.experts), 0);
  for (size_t e = 0; e < price_E.size(); ++e) {
    const double steps = price_E[e] / scores.step;
    if (!std::isnan(steps)) prices[e] = std::llround(std::clamp(steps, -kPriceLimit, kPriceLimit));
  }
  return prices;
}

ExpertLoads settled_loads(const GridScores& scores, ExpertLoads loads) {
  if (loads.free_extra == 0) return loads;
  std::vector<int64_t> wanted_E(static_cast<size_t>(scores.experts), 0), order_E(wanted_E.size());
  const BestFinder best(scores, GridPrices(wanted_E.size(), 0));
  for (int64_t t = 0; t < scores.rows; ++t) ++wanted_E[static_cast<size_t>(best(scores.row(t)).expert)];
  std::iota(order_E.begin(), order_E.end(), 0);
  std::stable_sort(order_E.begin(), order_E.end(), [&](int64_t a, int64_t b) {
    return wanted_E[static_cast<size_t>(a)] > wanted_E[static_cast<size_t>(b)];
  });
  for (int64_t i = 0; i < loads.free_extra; ++i) ++loads.load_E[static_cast<size_t>(order_E[static_cast<size_t>(i)])];
  loads.free_extra = 0;
  return loads;
}

BalancedAssignment certified(const GridScores& scores, const ExpertLoads& loads, GridPrices price_E,
                             std::vector<int64_t> expert_T) {
  BalancedAssignment result;
  const int64_t lowest = *std::min_element(price_E.begin(), price_E.end());
  for (int64_t& price : price_E) result.price_E.push_back(static_cast<double>(price -= lowest) * scores.step);
  result.gap_steps = dual_gap(scores, loads, price_E, expert_T);
  result.gap = static_cast<double>(result.gap_steps) * scores.step;
  result.value = sum_of_maxima(scores) + static_cast<double>(value_in_steps(scores, expert_T)) * scores.step;
  result.expert_T = std::move(expert_T);
  return result;
}

double dual_bound(const GridScores& scores, const ExpertLoads& loads, std::span<const double> price_E) {
  const GridPrices prices = grid_prices(scores, price_E);
  const std::vector<int64_t> first_T(static_cast<size_t>(scores.rows), 0);
  const int64_t bound = dual_gap(scores, loads, prices, first_T) + value_in_steps(scores, first_T);
  return sum_of_maxima(scores) + static_cast<double>(bound) * scores.step;
}

BalancedAssignment assign_exactly(const GridScores& scores, const ExpertLoads& loads, std::span<const double> price_E) {
  GridPrices prices = grid_prices(scores, price_E);
  const bool warm = std::any_of(prices.begin(), prices.end(), [&](int64_t price) { return price != prices[0]; });
  const RowGroups groups = group_equal_rows(scores);
  const int64_t bids = improve_prices(scores, groups, loads, warm, prices);
  Repaired repaired = repair(scores, groups, loads, prices);
  BalancedAssignment result = certified(scores, loads, std::move(prices), std::move(repaired.expert_T));
  result.bids = bids;
  result.paths = repaired.paths;
  return result;
}

}  // namespace moelab
