// Successive shortest paths on the graph of experts. An edge i → j moves a row from i to j; its length is the least loss
// s[t,i] - s[t,j] over the rows of i, minus p_i, plus p_j, which is never negative at prices at which every row is with a best
// expert. Prices move with the distances, so it stays so; once no expert has too many rows, that is the proof of optimality.
//
// Where extra slots are free, i → j may also hand j's extra slot to i at no loss. That is never negative either, as the
// experts of the highest prices hold these slots.
//
// Few rows ever move: those that are nearly as well off elsewhere. Edges are formed from rows whose margin, at the prices of the
// last sorting, is within a reach; all others are longer than the reach less what prices have drifted apart since. A path that is
// no longer than that is the shortest of all; where there is none, the reach grows and the rows are sorted anew.
#include "core/assignment_parts.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace moelab {
namespace {

constexpr int32_t kNoRow = std::numeric_limits<int32_t>::max();
constexpr int64_t kFarAway = std::numeric_limits<int64_t>::max() / 4;
constexpr int32_t kSlotMoves = -1;  // in place of a group: the extra slot moves, not a row

struct Holding {
  int32_t group;
  int32_t amount;
};

struct ExpertShare {
  int32_t expert;
  int32_t amount;
};

struct PathEdge {
  int32_t from;
  int32_t to;
  int32_t group;
};

// What an expert holds: groups that may have to move come first.
struct Holdings {
  std::vector<Holding> all;
  size_t near = 0;

  void bring_near(size_t at) {
    if (at >= near) std::swap(all[at], all[near++]);
  }
  void remove_near(size_t at) {
    all[at] = all[--near];
    all[near] = all.back();
    all.pop_back();
  }
  // Position of a group among the first `count`, or `count`.
  size_t find(int32_t group, size_t count) const {
    size_t at = 0;
    while (at < count && all[at].group != group) ++at;
    return at;
  }
};

class PathRepair {
 public:
  PathRepair(const GridScores& scores, const RowGroups& groups, const ExpertLoads& loads, GridPrices& price_E)
      : scores_(scores), groups_(groups), price_E_(price_E), experts_(static_cast<size_t>(scores.experts)),
        stride_(static_cast<size_t>(scores.stride)), load_E_(loads.load_E), has_extra_E_(experts_, 0), rows_of_E_(experts_, 0),
        held_E_(experts_), stale_E_(experts_, 1), loss_EE_(experts_ * stride_, kNoRow), mover_EE_(experts_ * stride_, 0),
        distance_E_(experts_), done_E_(experts_), reached_by_E_(experts_),
        reach_(first_reach(scores)), sorted_at_E_(price_E) {
    hand_out_extra(loads.free_extra);
    for (size_t e = 0; e < experts_; ++e) held_E_[e].all.reserve(static_cast<size_t>(load_E_[e] + load_E_[e] / 8 + 4));
    const BestFinder best(scores, price_E);
    std::vector<int32_t> tied;
    for (int32_t g = 0; g < static_cast<int32_t>(groups.count()); ++g) {
      const BestExpert own = best(row(g));
      if (own.margin == 0) tied.push_back(g);
      else place(static_cast<size_t>(own.expert), g, own.margin);
    }
    for (const int32_t g : tied) place(roomiest_best(g, best(row(g)).value), g, 0);
  }

  int64_t run() {
    int64_t paths = 0;
    for (; any_surplus(); ++paths) {
      size_t target = nearest_deficit();
      for (; !is_within_reach(target); target = nearest_deficit()) look_further(target);
      move_along(shortest_path(target));
    }
    return paths;
  }

  // Rows of a group go to its experts in the order of both.
  std::vector<int64_t> expert_of_rows() const {
    std::vector<int32_t> share_G1(groups_.size_G.size() + 1, 0);  // where a group's shares begin
    for (const Holdings& held_by : held_E_)
      for (const Holding& held : held_by.all) ++share_G1[static_cast<size_t>(held.group) + 1];
    std::partial_sum(share_G1.begin(), share_G1.end(), share_G1.begin());
    std::vector<ExpertShare> shares(static_cast<size_t>(share_G1.back()));
    std::vector<int32_t> next_G(share_G1.begin(), share_G1.end() - 1);
    for (size_t e = 0; e < experts_; ++e)
      for (const Holding& held : held_E_[e].all)
        shares[static_cast<size_t>(next_G[static_cast<size_t>(held.group)]++)] = {static_cast<int32_t>(e), held.amount};
    std::vector<int64_t> expert_T;
    expert_T.reserve(groups_.group_T.size());
    for (const int32_t group : groups_.group_T) {
      int32_t& first = share_G1[static_cast<size_t>(group)];
      if (shares[static_cast<size_t>(first)].amount == 0) ++first;
      --shares[static_cast<size_t>(first)].amount;
      expert_T.push_back(shares[static_cast<size_t>(first)].expert);
    }
    return expert_T;
  }

 private:
  const int32_t* row(int32_t group) const { return scores_.row(groups_.first_row_G[static_cast<size_t>(group)]); }
  int64_t surplus(size_t e) const { return rows_of_E_[e] - load_E_[e] - has_extra_E_[e]; }

  bool any_surplus() const {
    for (size_t e = 0; e < experts_; ++e)
      if (surplus(e) > 0) return true;
    return false;
  }

  void place(size_t e, int32_t group, int64_t margin) {
    const int32_t size = groups_.size_G[static_cast<size_t>(group)];
    rows_of_E_[e] += size;
    held_E_[e].all.push_back({group, size});
    if (margin <= reach_) held_E_[e].bring_near(held_E_[e].all.size() - 1);
  }

  // Of the experts that are equally good, the lowest of those with the most room: with few different scores most rows tie.
  size_t roomiest_best(int32_t group, int64_t best) const {
    size_t roomiest = experts_;
    for (size_t e = 0; e < experts_; ++e)
      if (row(group)[e] - price_E_[e] == best && (roomiest == experts_ || surplus(e) < surplus(roomiest))) roomiest = e;
    return roomiest;
  }

  void hand_out_extra(int64_t count) {
    std::vector<size_t> order(experts_);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](size_t a, size_t b) { return price_E_[a] > price_E_[b]; });
    for (int64_t i = 0; i < count; ++i) has_extra_E_[order[static_cast<size_t>(i)]] = 1;
    extra_moves_ = count > 0;
  }

  // What has moved once may move on.
  void give(size_t e, int32_t group, int32_t amount) {
    rows_of_E_[e] += amount;
    Holdings& held = held_E_[e];
    const bool splits = groups_.size_G[static_cast<size_t>(group)] > 1;  // only such a group can be here already
    const size_t at = splits ? held.find(group, held.all.size()) : held.all.size();
    if (at == held.all.size()) held.all.push_back({group, 0});
    held.all[at].amount += amount;
    held.bring_near(at);
    if (!stale_E_[e]) note_losses(e, group);
  }

  void take(size_t e, int32_t group, int32_t amount) {
    rows_of_E_[e] -= amount;
    Holdings& held = held_E_[e];
    const size_t at = held.find(group, held.near);
    held.all[at].amount -= amount;
    if (held.all[at].amount > 0) return;
    held.remove_near(at);
    stale_E_[e] = 1;
  }

  int64_t amount_of(size_t e, int32_t group) const {
    const Holdings& held = held_E_[e];
    return held.all[held.find(group, held.near)].amount;
  }

  // Lowers the losses of e's edges to those of one more group.
  MOELAB_LANES void note_losses(size_t e, int32_t group) {
    const int32_t* score = row(group);
    const Ints own = Ints{} + score[e], mover = Ints{} + group;
    int32_t *loss = loss_EE_.data() + e * stride_, *movers = mover_EE_.data() + e * stride_;
    Ints now, then, who;
    for (size_t j = 0; j < stride_; j += kLanes) {
      load(now, score + j), load(then, loss + j), load(who, movers + j);
      now = own - now;
      who = now < then ? mover : who;
      keep_smaller(then, now);
      store(loss + j, then), store(movers + j, who);
    }
  }

  void refresh(size_t e) {
    std::fill_n(loss_EE_.begin() + static_cast<std::ptrdiff_t>(e * stride_), stride_, kNoRow);
    for (size_t i = 0; i < held_E_[e].near; ++i) note_losses(e, held_E_[e].all[i].group);
    stale_E_[e] = 0;
  }

  // After an auction some hundredths of a standard deviation, some times its last increment; without one prices may be anywhere.
  static int64_t first_reach(const GridScores& scores) {
    if (scores.rows < kRowsForAuction * scores.experts) return kFarAway;
    return std::llround(scores.mean_spread * 0.006);
  }

  // How far apart prices have drifted since rows were sorted.
  int64_t drift() const {
    int64_t most = std::numeric_limits<int64_t>::min(), least = std::numeric_limits<int64_t>::max();
    for (size_t e = 0; e < experts_; ++e) {
      most = std::max(most, price_E_[e] - sorted_at_E_[e]);
      least = std::min(least, price_E_[e] - sorted_at_E_[e]);
    }
    return most - least;
  }

  bool all_are_near() const {
    return std::all_of(held_E_.begin(), held_E_.end(), [](const Holdings& held) { return held.near == held.all.size(); });
  }

  bool is_within_reach(size_t target) const {
    if (target < experts_ && distance_E_[target] <= reach_ - drift()) return true;
    if (!all_are_near()) return false;
    check_invariant(target < experts_, "the loads of an assignment add up to its rows");
    return true;
  }

  void look_further(size_t target) {
    const int64_t wanted = target < experts_ ? distance_E_[target] + drift() : reach_;
    reach_ = std::min(kFarAway, 4 * std::max<int64_t>({reach_, wanted, 1}));
    sorted_at_E_ = price_E_;
    const BestFinder best(scores_, price_E_);
    for (Holdings& held : held_E_) {
      held.near = 0;
      for (size_t i = 0; i < held.all.size(); ++i)
        if (best(row(held.all[i].group)).margin <= reach_) held.bring_near(i);
    }
    std::fill(stale_E_.begin(), stale_E_.end(), 1);
  }

  // Dijkstra from all experts with too many rows to the nearest with too few; experts_ where none is reached.
  size_t nearest_deficit() {
    for (size_t e = 0; e < experts_; ++e) distance_E_[e] = surplus(e) > 0 ? 0 : kFarAway;
    std::fill(done_E_.begin(), done_E_.end(), 0);
    size_t at = nearest_open();
    for (; at < experts_ && surplus(at) >= 0; at = nearest_open()) {
      done_E_[at] = 1;
      relax(at);
    }
    return at;
  }

  // Prices move on the way.
  std::vector<PathEdge> shortest_path(size_t at) {
    const int64_t length = distance_E_[at];
    for (size_t e = 0; e < experts_; ++e) price_E_[e] += length - std::min(distance_E_[e], length);
    std::vector<PathEdge> path;
    for (; surplus(at) <= 0; at = static_cast<size_t>(path.back().from)) path.push_back(reached_by_E_[at]);
    return path;
  }

  size_t nearest_open() const {
    size_t nearest = experts_;
    int64_t least = kFarAway;
    for (size_t e = 0; e < experts_; ++e)
      if (!done_E_[e] && distance_E_[e] < least) least = distance_E_[e], nearest = e;
    return nearest;
  }

  void relax(size_t i) {
    if (stale_E_[i]) refresh(i);
    const int32_t *loss = loss_EE_.data() + i * stride_, *movers = mover_EE_.data() + i * stride_;
    const int64_t base = distance_E_[i] - price_E_[i];
    for (size_t j = 0; j < experts_; ++j) {
      if (loss[j] != kNoRow) try_edge(i, j, base + loss[j] + price_E_[j], movers[j]);
      if (extra_moves_ && !has_extra_E_[i] && has_extra_E_[j]) try_edge(i, j, base + price_E_[j], kSlotMoves);
    }
  }

  void try_edge(size_t i, size_t j, int64_t length, int32_t group) {
    if (length >= distance_E_[j]) return;
    distance_E_[j] = length;
    reached_by_E_[j] = {static_cast<int32_t>(i), static_cast<int32_t>(j), group};
  }

  // As many rows as the whole path lets through: several where rows are equal.
  void move_along(const std::vector<PathEdge>& path) {
    int64_t amount = std::min(surplus(static_cast<size_t>(path.back().from)), -surplus(static_cast<size_t>(path.front().to)));
    for (const PathEdge& edge : path)
      amount = std::min(amount, edge.group == kSlotMoves ? 1 : amount_of(static_cast<size_t>(edge.from), edge.group));
    for (const PathEdge& edge : path) {
      const auto from = static_cast<size_t>(edge.from), to = static_cast<size_t>(edge.to);
      if (edge.group == kSlotMoves) std::swap(has_extra_E_[from], has_extra_E_[to]);
      else take(from, edge.group, static_cast<int32_t>(amount));
    }
    for (const PathEdge& edge : path)
      if (edge.group != kSlotMoves) give(static_cast<size_t>(edge.to), edge.group, static_cast<int32_t>(amount));
  }

  const GridScores& scores_;
  const RowGroups& groups_;
  GridPrices& price_E_;
  size_t experts_, stride_;
  std::vector<int64_t> load_E_;
  std::vector<int8_t> has_extra_E_;
  std::vector<int64_t> rows_of_E_;
  std::vector<Holdings> held_E_;
  std::vector<int8_t> stale_E_;             // this row of loss_EE_ does not say what the near groups do
  std::vector<int32_t> loss_EE_, mover_EE_; // [E, stride] least loss of moving from e to j, and whose
  std::vector<int64_t> distance_E_;
  std::vector<int8_t> done_E_;
  std::vector<PathEdge> reached_by_E_;
  int64_t reach_;            // groups of a larger margin at the prices sorted_at_E_ are far
  GridPrices sorted_at_E_;
  bool extra_moves_ = false;
};

}  // namespace

Repaired repair(const GridScores& scores, const RowGroups& groups, const ExpertLoads& loads, GridPrices& price_E) {
  PathRepair repair(scores, groups, loads, price_E);
  const int64_t paths = repair.run();
  return {repair.expert_of_rows(), paths};
}

}  // namespace moelab
