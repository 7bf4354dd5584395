// Prices of experts by an auction in which rows bid (Bertsekas and Castañon's form for classes of equal objects): a row that
// holds no slot bids for the expert of the best score minus price, so high that it would be indifferent to its second choice,
// plus an increment. An expert keeps the highest bids that fit; its price is the lowest bid that it keeps.
#include "core/assignment_parts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace moelab {
namespace {

constexpr float kOutOfReach = std::numeric_limits<float>::infinity();

// Coarse increments find the level of the prices, and a sample of the rows is enough for that: every stride-th one, or fewer
// where these would be more than `enough` for each expert. The last phase takes all rows.
struct AuctionPhase {
  double increment;  // in standard deviations, about
  int64_t stride;
  int64_t enough;

  int64_t stride_for(int64_t rows, int64_t experts) const {
    const int64_t widest = std::max<int64_t>(1, rows / (4 * experts));
    return std::max(std::min(stride, widest), rows / (experts * enough));
  }
};
constexpr int64_t kAllRows = std::numeric_limits<int32_t>::max();
constexpr std::array<AuctionPhase, 5> kAuctionPhases{
    {{1, 16, 8}, {0.2, 16, 16}, {0.04, 4, 64}, {0.008, 1, 256}, {0.001, 1, kAllRows}}};

struct TopTwo {
  int32_t expert;
  float best, second;
};

MOELAB_INLINE void price_row(Floats& value, const int32_t* row, const float* price) {
  Ints score;
  Floats asked;
  load(score, row), load(asked, price);
  value = __builtin_convertvector(score, Floats) - asked;
}

MOELAB_LANES TopTwo top_two(const int32_t* row, const std::vector<float>& price) {
  TopLanes<Floats> top(-kOutOfReach);
  Floats value;
  for (size_t e = 0; e < price.size(); e += kLanes) {
    price_row(value, row + e, price.data() + e);
    top.add(value);
  }
  top.fold();
  FirstHit hit;
  for (size_t e = 0; e < price.size(); e += kLanes) {
    price_row(value, row + e, price.data() + e);
    hit.look(value == top.best);
  }
  return {hit.get(), top.best[0], top.second[0]};
}

struct Bid {
  float level;
  int32_t group;
  int32_t amount;
  bool operator<(const Bid& other) const { return level > other.level; }  // heaps keep the lowest level on top
};

class PriceAuction {
 public:
  PriceAuction(const GridScores& scores, const RowGroups& groups, const ExpertLoads& loads, const GridPrices& price_E)
      : scores_(scores), groups_(groups), loads_(loads), price_(price_E.begin(), price_E.end()) {
    price_.resize(static_cast<size_t>(scores.stride), kOutOfReach);
    held_E_.resize(price_E.size());
    kept_E_.resize(price_E.size());
  }

  // Every `stride`-th row bids anew, until all of these hold a slot or `most_bids` were made. True = all hold one.
  bool run(float increment, int64_t most_bids, int64_t stride = 1) {
    increment_ = increment;
    start_round(stride);
    for (int64_t left = most_bids; !queue_.empty() && left > 0; --left, ++bids_) {
      const int32_t group = queue_.back();
      queue_.pop_back();
      bid(group, std::exchange(waiting_G_[static_cast<size_t>(group)], 0));
    }
    return queue_.empty();
  }

  int64_t bids() const { return bids_; }
  float price(size_t expert) const { return price_[expert]; }

 private:
  void start_round(int64_t stride) {
    for (auto& kept : kept_E_) kept.clear();
    std::fill(held_E_.begin(), held_E_.end(), 0);
    queue_.clear();
    waiting_G_.assign(groups_.size_G.size(), 0);
    int64_t rows = 0;
    for (int64_t t = 0; t < scores_.rows; t += stride, ++rows) wait(groups_.group_T[static_cast<size_t>(t)], 1);
    std::reverse(queue_.begin(), queue_.end());
    const ExpertLoads sampled = expert_loads(rows, scores_.experts, ExtraSlots::kBest);
    share_places(stride == 1 ? loads_ : sampled);
  }

  // Extra slots go where the prices are highest.
  void share_places(const ExpertLoads& loads) {
    place_E_ = loads.load_E;
    std::vector<size_t> order(place_E_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return price_[a] > price_[b]; });
    for (int64_t i = 0; i < loads.free_extra; ++i) ++place_E_[order[static_cast<size_t>(i)]];
  }

  void wait(int32_t group, int32_t amount) {
    int32_t& waiting = waiting_G_[static_cast<size_t>(group)];
    if (waiting == 0) queue_.push_back(group);
    waiting += amount;
  }

  void bid(int32_t group, int32_t amount) {
    const TopTwo top = top_two(scores_.row(groups_.first_row_G[static_cast<size_t>(group)]), price_);
    const auto e = static_cast<size_t>(top.expert);
    std::vector<Bid>& kept = kept_E_[e];
    kept.push_back({price_[e] + (top.best - top.second) + increment_, group, amount});
    std::push_heap(kept.begin(), kept.end());
    held_E_[e] += amount;
    while (held_E_[e] > place_E_[e]) drop_lowest(e);
    if (held_E_[e] == place_E_[e]) price_[e] = kept.front().level;
  }

  void drop_lowest(size_t e) {
    std::vector<Bid>& kept = kept_E_[e];
    Bid& lowest = kept.front();
    const auto excess = static_cast<int32_t>(std::min<int64_t>(held_E_[e] - place_E_[e], lowest.amount));
    held_E_[e] -= excess;
    wait(lowest.group, excess);
    lowest.amount -= excess;
    if (lowest.amount > 0) return;
    std::pop_heap(kept.begin(), kept.end());
    kept.pop_back();
  }

  const GridScores& scores_;
  const RowGroups& groups_;
  const ExpertLoads& loads_;
  std::vector<float> price_;  // padded with infinity
  std::vector<int64_t> held_E_, place_E_;
  std::vector<std::vector<Bid>> kept_E_;
  std::vector<int32_t> waiting_G_, queue_;
  float increment_ = 0;
  int64_t bids_ = 0;
};

}  // namespace

int64_t improve_prices(const GridScores& scores, const RowGroups& groups, const ExpertLoads& loads, bool warm,
                       GridPrices& price_E) {
  if (scores.experts < 2 || scores.rows < kRowsForAuction * scores.experts) return 0;  // above, every load is positive
  PriceAuction auction(scores, groups, loads, price_E);
  // Increments below what a float of the size of the scores can tell apart would never raise a price.
  const double typical = scores.mean_spread / 4.5, finest = 0x1p29 * 0x1p-21;
  const int64_t most_bids = 64 + 8 * groups.count();
  const auto finished = [&](const AuctionPhase& phase) {
    const double increment = std::max(typical * phase.increment, finest);
    return auction.run(static_cast<float>(increment), most_bids, phase.stride_for(scores.rows, scores.experts));
  };
  if (!warm || !finished(kAuctionPhases.back())) (void)std::all_of(kAuctionPhases.begin(), kAuctionPhases.end(), finished);
  for (size_t e = 0; e < price_E.size(); ++e) price_E[e] = std::llround(auction.price(e));
  return auction.bids();
}

}  // namespace moelab
