// BASE: every balanced assignment is tried.
#include "oracle_parts.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace moelab::oracle {
namespace {

// What each expert must get, and how many rows more may go to any expert, one each.
struct Loads {
  std::vector<int64_t> least;
  int64_t free = 0;
};

Loads loads_of(const Layer& layer, int64_t rows) {
  const int64_t extra = rows % layer.experts;
  Loads loads{std::vector<int64_t>(layer.experts, rows / layer.experts), 0};
  const std::string rule = layer.option("extra_slots", "best");
  for (int64_t i = 0; rule != "best" && i < extra; ++i)
    ++loads.least[((rule == "rotate" ? layer.step : 0) + i) % layer.experts];
  if (rule == "best") loads.free = extra;
  return loads;
}

class EveryAssignment {
 public:
  EveryAssignment(const Mat& score, const Loads& loads)
      : score_(score), loads_(loads), count_(loads.least.size(), 0), choice_(score.size()) {
    try_row(0, 0);
  }
  const std::vector<int64_t>& best() const { return best_; }

 private:
  void try_row(size_t t, double value) {
    if (t == score_.size()) {
      if (value > most_) most_ = value, best_ = choice_;
      return;
    }
    for (size_t e = 0; e < count_.size(); ++e) {
      const bool over = count_[e] >= loads_.least[e];
      if (over && (extra_ == loads_.free || count_[e] > loads_.least[e])) continue;
      ++count_[e], extra_ += over;
      choice_[t] = static_cast<int64_t>(e);
      try_row(t + 1, value + score_[t][e].v);
      --count_[e], extra_ -= over;
    }
  }

  const Mat& score_;
  const Loads& loads_;
  std::vector<int64_t> count_, choice_, best_;
  int64_t extra_ = 0;
  double most_ = -std::numeric_limits<double>::infinity();
};

// Expert by expert, each takes the best of the rows left.
std::vector<int64_t> greedy_assignment(const Mat& score, const Loads& loads) {
  std::vector<int64_t> choice(score.size(), -1);
  for (size_t e = 0; e < loads.least.size(); ++e)
    for (int64_t i = 0; i < loads.least[e]; ++i) {
      size_t best = score.size();
      for (size_t t = 0; t < score.size(); ++t)
        if (choice[t] < 0 && (best == score.size() || score[t][e].v > score[best][e].v)) best = t;
      choice[best] = static_cast<int64_t>(e);
    }
  return choice;
}

// Dual bound at these prices minus the assignment's value, for loads without free extra rows.
double gap_of(const Mat& score, const Loads& loads, const Vec& price, const std::vector<int64_t>& choice) {
  double gap = 0;
  for (size_t e = 0; e < price.size(); ++e) gap += static_cast<double>(loads.least[e]) * price[e].v;
  for (size_t t = 0; t < score.size(); ++t) {
    double best = -std::numeric_limits<double>::infinity();
    for (size_t e = 0; e < price.size(); ++e) best = std::max(best, score[t][e].v - price[e].v);
    gap += best - score[t][choice[t]].v;
  }
  return gap;
}

// Routed rows in the order in which a given permutation of IN's rows names them.
std::vector<size_t> shuffled_rows(const Layer& layer, const Inputs& in, const Rows& rows) {
  std::vector<size_t> order(rows.count());
  std::iota(order.begin(), order.end(), 0);
  if (layer.option("shuffle", "false") == "false") return order;
  order.clear();
  for (size_t place = 0; place < in.arrays.at("noise").value.size(); ++place)
    for (size_t t = 0; t < rows.count(); ++t)
      if (rows.file_row[t] == static_cast<int64_t>(in.at("noise", place).v)) order.push_back(t);
  return order;
}

std::vector<int64_t> training_choice(const Layer& layer, const Inputs& in, const Rows& rows, Decision& d) {
  const std::vector<size_t> order = shuffled_rows(layer, in, rows);
  const Loads loads = loads_of(layer, static_cast<int64_t>(rows.count()));
  const bool greedy = layer.option("solver", "exact") == "greedy";
  Mat score;
  for (const size_t t : order) score.push_back(d.noisy[t]);
  const std::vector<int64_t> placed = greedy ? greedy_assignment(score, loads) : EveryAssignment(score, loads).best();
  d.probe["gap"] = {{greedy ? gap_of(score, loads, in.vector("router.prices"), placed) : 0.0}};
  std::vector<int64_t> choice(order.size());
  for (size_t i = 0; i < order.size(); ++i) choice[order[i]] = placed[i];
  return choice;
}

std::vector<int64_t> evaluation_choice(const Layer& layer, const Inputs& in, const Decision& d) {
  const Vec price = in.vector("router.prices");
  std::vector<int64_t> choice;
  for (Vec score : d.noisy) {
    for (size_t e = 0; layer.option("eval", "greedy") == "greedy_with_prices" && e < score.size(); ++e)
      score[e] = score[e] - price[e];
    choice.push_back(best_of(score, {}));
  }
  return choice;
}

}  // namespace

Decision decide_base(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d = scored(layer, in, rows);
  std::vector<int64_t> choice = layer.given_choice;
  if (choice.empty()) choice = layer.train ? training_choice(layer, in, rows, d) : evaluation_choice(layer, in, d);
  for (size_t t = 0; t < rows.count(); ++t) add_choice(layer, d, {choice[t]}, {sigmoid(d.noisy[t][choice[t]])});
  return d;
}

}  // namespace moelab::oracle
