// The approximate solvers: an auction in which experts bid for rows, Sinkhorn, expert by expert.
#include "core/assignment_parts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

namespace moelab {
namespace {

constexpr int64_t kNobody = -1;

struct Partial {
  std::vector<int64_t> expert_T;
  std::vector<int64_t> room_E;

  Partial(int64_t rows, const ExpertLoads& loads) : expert_T(static_cast<size_t>(rows), kNobody), room_E(loads.load_E) {}
  bool free(int64_t t) const { return expert_T[static_cast<size_t>(t)] == kNobody; }
  void put(int64_t t, size_t e) {
    expert_T[static_cast<size_t>(t)] = static_cast<int64_t>(e);
    --room_E[e];
  }
};

// Rows without an expert go, best pair first, to experts with room.
void complete_greedily(const GridScores& scores, Partial& partial) {
  std::vector<std::tuple<int32_t, int64_t, size_t>> pairs;  // loss against the row's best, row, expert
  for (int64_t t = 0; t < scores.rows; ++t)
    for (size_t e = 0; partial.free(t) && e < partial.room_E.size(); ++e)
      if (partial.room_E[e] > 0) pairs.emplace_back(-scores.row(t)[e], t, e);
  std::sort(pairs.begin(), pairs.end());
  for (const auto& [loss, t, e] : pairs)
    if (partial.free(t) && partial.room_E[e] > 0) partial.put(t, e);
}

// Positions of the `count` largest, ties to the lowest position; in no particular order.
std::vector<int64_t> largest_of(const std::vector<double>& values, int64_t count) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int64_t a, int64_t b) {
    const double x = values[static_cast<size_t>(a)], y = values[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  if (count < static_cast<int64_t>(order.size())) std::nth_element(order.begin(), order.begin() + count, order.end(), before);
  order.resize(static_cast<size_t>(std::min<int64_t>(count, static_cast<int64_t>(order.size()))));
  return order;
}

// One state of the auction: what rows cost, and who holds them.
class RowAuction {
 public:
  RowAuction(const GridScores& scores, const ExpertLoads& loads)
      : scores_(scores), loads_(loads), cost_T_(scores.max_T.size(), 0), owner_T_(cost_T_.size(), kNobody),
        score_ET_(static_cast<size_t>(scores.experts), std::vector<double>(cost_T_.size())), worth_E_(score_ET_.size(), 0) {
    double least = std::numeric_limits<double>::infinity(), most = -least;
    for (size_t e = 0; e < score_ET_.size(); ++e)
      for (size_t t = 0; t < cost_T_.size(); ++t) {
        const double score = score_ET_[e][t] = scores.rounded(static_cast<int64_t>(t), static_cast<int64_t>(e));
        least = std::min(least, score), most = std::max(most, score);
      }
    most_ = most;
    increment_ = std::max((most - least) / 50, 1e-4);
  }

  // Every expert bids once; true = every row has a bidder.
  bool round() {
    std::vector<double> bid_T(cost_T_.size(), 0);
    std::vector<int64_t> bidder_T(cost_T_.size(), kNobody);
    for (size_t e = 0; e < score_ET_.size(); ++e) bid_for_rows(e, bid_T, bidder_T);
    for (size_t t = 0; t < cost_T_.size(); ++t) cost_T_[t] += bid_T[t];
    owner_T_ = std::move(bidder_T);
    return std::count(owner_T_.begin(), owner_T_.end(), kNobody) == 0;
  }

  const std::vector<int64_t>& owner_T() const { return owner_T_; }
  const std::vector<double>& worth_E() const { return worth_E_; }

 private:
  // The increments over the best row that it does not bid for; `increment_` alone for rows that it holds already.
  void bid_for_rows(size_t e, std::vector<double>& bid_T, std::vector<int64_t>& bidder_T) {
    const int64_t load = loads_.load_E[e];
    if (load == 0) return;
    std::vector<double> worth_T(cost_T_.size());
    for (size_t t = 0; t < worth_T.size(); ++t)
      worth_T[t] = owner_T_[t] == static_cast<int64_t>(e) ? most_ : score_ET_[e][t] - cost_T_[t];
    std::vector<int64_t> wanted = largest_of(worth_T, load + 1);
    const auto value = [&](int64_t t) { return worth_T[static_cast<size_t>(t)]; };
    const auto last = std::min_element(wanted.begin(), wanted.end(), [&](int64_t a, int64_t b) { return value(a) < value(b); });
    worth_E_[e] = value(*last);
    if (static_cast<int64_t>(wanted.size()) > load) wanted.erase(last);
    for (const int64_t row : wanted) {
      const auto t = static_cast<size_t>(row);
      const double bid = owner_T_[t] == static_cast<int64_t>(e) ? increment_ : worth_T[t] - worth_E_[e] + increment_;
      if (bid > bid_T[t]) bid_T[t] = bid, bidder_T[t] = static_cast<int64_t>(e);
    }
  }

  const GridScores& scores_;
  const ExpertLoads& loads_;
  std::vector<double> cost_T_;
  std::vector<int64_t> owner_T_;
  std::vector<std::vector<double>> score_ET_;
  std::vector<double> worth_E_;  // of the best row that an expert went without: its price
  double increment_ = 0, most_ = 0;
};

// One pass: prices move by temperature · ln(expected rows / load).
void sinkhorn_pass(const GridScores& scores, const ExpertLoads& loads, double temperature, std::vector<double>& price_E) {
  std::vector<double> expected_E(price_E.size(), 0), weight_E(price_E.size());
  for (int64_t t = 0; t < scores.rows; ++t) {
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (size_t e = 0; e < price_E.size(); ++e) most = std::max(most, weight_E[e] = (scores.row(t)[e] - price_E[e]) / temperature);
    for (double& weight : weight_E) sum += weight = std::exp(weight - most);
    for (size_t e = 0; e < price_E.size(); ++e) expected_E[e] += weight_E[e] / sum;
  }
  for (size_t e = 0; e < price_E.size(); ++e)
    if (loads.load_E[e] > 0 && expected_E[e] > 0)
      price_E[e] += temperature * std::log(expected_E[e] / static_cast<double>(loads.load_E[e]));
}

// Every expert keeps, of the rows that like it best at these prices, those that would lose most elsewhere.
void keep_best(const GridScores& scores, const std::vector<double>& price_E, Partial& partial) {
  std::vector<std::vector<std::pair<double, int64_t>>> wish_E(price_E.size());  // minus what the row would lose, row
  for (int64_t t = 0; t < scores.rows; ++t) {
    size_t first = 0;
    double best = -std::numeric_limits<double>::infinity(), second = best;
    for (size_t e = 0; e < price_E.size(); ++e) {
      const double value = partial.room_E[e] > 0 ? scores.row(t)[e] - price_E[e] : -std::numeric_limits<double>::infinity();
      second = std::max(second, std::min(best, value));
      if (value > best) best = value, first = e;
    }
    wish_E[first].emplace_back(second - best, t);
  }
  for (size_t e = 0; e < price_E.size(); ++e) {
    std::sort(wish_E[e].begin(), wish_E[e].end());
    for (const auto& [loss, t] : wish_E[e])
      if (partial.room_E[e] > 0) partial.put(t, e);
  }
}

}  // namespace

BalancedAssignment assign_by_auction(const GridScores& scores, const ExpertLoads& wanted) {
  constexpr int kMostRounds = 100;
  const ExpertLoads loads = settled_loads(scores, wanted);
  RowAuction auction(scores, loads);
  for (int round = 0; round < kMostRounds && !auction.round(); ++round) {}
  Partial partial(scores.rows, loads);
  for (int64_t t = 0; t < scores.rows; ++t)
    if (const int64_t owner = auction.owner_T()[static_cast<size_t>(t)]; owner != kNobody) partial.put(t, static_cast<size_t>(owner));
  complete_greedily(scores, partial);
  return certified(scores, wanted, grid_prices(scores, auction.worth_E()), std::move(partial.expert_T));
}

BalancedAssignment assign_by_sinkhorn(const GridScores& scores, const ExpertLoads& wanted, double temperature) {
  constexpr int kPasses = 14;
  const ExpertLoads loads = settled_loads(scores, wanted);
  const double typical = std::max(scores.mean_spread / 4.5, 1.0);
  std::vector<double> price_E(static_cast<size_t>(scores.experts), 0);
  for (int pass = 0; pass < kPasses; ++pass)
    sinkhorn_pass(scores, loads, typical * std::pow(temperature, pass / (kPasses - 1.0)), price_E);
  Partial partial(scores.rows, loads);
  keep_best(scores, price_E, partial);
  complete_greedily(scores, partial);
  for (double& price : price_E) price *= scores.step;
  return certified(scores, wanted, grid_prices(scores, price_E), std::move(partial.expert_T));
}

BalancedAssignment assign_greedily(const GridScores& scores, const ExpertLoads& wanted, std::span<const double> price_E) {
  const ExpertLoads loads = settled_loads(scores, wanted);
  Partial partial(scores.rows, loads);
  for (size_t e = 0; e < loads.load_E.size(); ++e) {
    std::vector<double> score_T(scores.max_T.size(), -std::numeric_limits<double>::infinity());
    for (int64_t t = 0; t < scores.rows; ++t)
      if (partial.free(t)) score_T[static_cast<size_t>(t)] = scores.rounded(t, static_cast<int64_t>(e));
    for (const int64_t t : largest_of(score_T, loads.load_E[e])) partial.put(t, e);
  }
  return certified(scores, wanted, grid_prices(scores, price_E), std::move(partial.expert_T));
}

}  // namespace moelab
