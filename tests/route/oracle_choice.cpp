// Expert choice: each expert's rows of a group by comparison, or, with a cap per row, by trying every selection.
#include "oracle_parts.h"

#include <algorithm>
#include <limits>

namespace moelab::oracle {
namespace {

using Group = std::vector<size_t>;
using Chosen = std::vector<std::vector<bool>>;  // [T,E]

// Rows that compete.
std::vector<Group> groups_of(const Layer& layer, const Rows& rows) {
  std::string by = layer.option("group", "scope");
  if (by == "scope") by = layer.capacity.scope;
  std::map<int64_t, Group> groups;
  for (size_t t = 0; t < rows.count(); ++t)
    groups[by == "sequence" ? rows.sequence[t] : by == "time_step" ? rows.position[t] : 0].push_back(t);
  std::vector<Group> all;
  for (const auto& entry : groups) all.push_back(entry.second);
  return all;
}

int64_t rows_per_expert(const Layer& layer, const Group& group) {
  const auto rows = static_cast<int64_t>(group.size());
  return std::clamp<int64_t>(places(layer, rows, 1), 1, rows);
}

// S: softmax over experts, or over the group's rows.
Mat shares(const Layer& layer, const Decision& d, const std::vector<Group>& groups) {
  if (layer.option("score_norm", "experts") == "experts") return d.noisy_probability;
  Mat s = d.noisy;
  for (const Group& group : groups)
    for (size_t e = 0; e < static_cast<size_t>(layer.experts); ++e) {
      Vec column;
      for (const size_t t : group) column.push_back(d.noisy[t][e]);
      column = softmax(column);
      for (size_t i = 0; i < group.size(); ++i) s[group[i]][e] = column[i];
    }
  return s;
}

// A row belongs to the `count` best of an expert if fewer than `count` come before it.
void take_best(const Mat& s, const Group& group, int64_t count, Chosen& chosen) {
  for (size_t e = 0; e < s[0].size(); ++e)
    for (const size_t t : group) {
      int64_t before = 0;
      for (const size_t o : group) before += s[o][e].v > s[t][e].v || (s[o][e].v == s[t][e].v && o < t);
      chosen[t][e] = before < count;
    }
}

// The selection of `count` rows for each expert with the largest Σ S in which no row has more than `cap` experts: what the
// paper's regularised program tends to as the entropy's weight goes to 0.
class EverySelection {
 public:
  EverySelection(const Mat& s, const Group& group, int64_t count, int64_t cap)
      : s_(s), group_(group), count_(count), cap_(cap), taken_(group.size(), std::vector<bool>(s[0].size())) {
    try_expert(0, 0, 0, 0);
  }
  void write(Chosen& chosen) const {
    for (size_t i = 0; i < group_.size(); ++i) chosen[group_[i]] = best_[i];
  }

 private:
  void try_expert(size_t e, size_t i, int64_t have, double value) {
    if (have == count_) return e + 1 == s_[0].size() ? keep(value) : try_expert(e + 1, 0, 0, value);
    if (i == group_.size()) return;
    if (std::count(taken_[i].begin(), taken_[i].end(), true) < cap_) {
      taken_[i][e] = true;
      try_expert(e, i + 1, have + 1, value + s_[group_[i]][e].v);
      taken_[i][e] = false;
    }
    try_expert(e, i + 1, have, value);
  }
  void keep(double value) {
    if (value > most_) most_ = value, best_ = taken_;
  }

  const Mat& s_;
  const Group& group_;
  int64_t count_, cap_;
  Chosen taken_, best_;
  double most_ = -std::numeric_limits<double>::infinity();
};

Chosen chosen_rows(const Layer& layer, const Inputs& in, const Mat& s, const std::vector<Group>& groups) {
  Chosen chosen(s.size(), std::vector<bool>(layer.experts));
  const auto cap = static_cast<int64_t>(layer.number("cap_per_token", 0));
  if (!layer.train && layer.option("eval", "choice") == "thresholds") {
    const Vec threshold = in.vector("router.thresholds");
    for (size_t t = 0; t < s.size(); ++t)
      for (size_t e = 0; e < threshold.size(); ++e) chosen[t][e] = s[t][e].v >= threshold[e].v;
    return chosen;
  }
  for (const Group& group : groups) {
    if (cap == 0) take_best(s, group, rows_per_expert(layer, group), chosen);
    else EverySelection(s, group, rows_per_expert(layer, group), cap).write(chosen);
  }
  return chosen;
}

// A row's experts by falling score.
std::vector<int64_t> experts_of(const Vec& s, const std::vector<bool>& chosen) {
  std::vector<int64_t> experts;
  for (const int64_t e : top(s, static_cast<int64_t>(s.size())))
    if (chosen[e]) experts.push_back(e);
  return experts;
}

}  // namespace

Decision decide_expert_choice(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d = scored(layer, in, rows);
  const std::vector<Group> groups = groups_of(layer, rows);
  const Mat s = shares(layer, d, groups);
  const Chosen chosen = chosen_rows(layer, in, s, groups);
  const bool over_tokens = layer.option("score_norm", "experts") == "tokens";
  for (size_t t = 0; t < rows.count(); ++t) {
    const std::vector<int64_t> experts = experts_of(s[t], chosen[t]);
    Vec gate;
    for (const int64_t e : experts) gate.push_back(s[t][e] / Dual(over_tokens ? static_cast<double>(experts.size()) : 1));
    add_choice(layer, d, experts, gate);
  }
  d.capacity_is_choice = layer.train || layer.option("eval", "choice") == "choice";
  return d;
}

// Mean over groups of the smallest score that each expert chose, for the running thresholds.
Vec last_chosen_scores(const Layer& layer, const Inputs& in, const Rows& rows) {
  const Decision d = scored(layer, in, rows);
  const std::vector<Group> groups = groups_of(layer, rows);
  const Mat s = shares(layer, d, groups);
  const Chosen chosen = chosen_rows(layer, in, s, groups);
  Vec mean(layer.experts);
  for (const Group& group : groups)
    for (size_t e = 0; e < mean.size(); ++e) {
      double least = std::numeric_limits<double>::infinity();
      for (const size_t t : group)
        if (chosen[t][e]) least = std::min(least, s[t][e].v);
      mean[e] += Dual(least / static_cast<double>(groups.size()));
    }
  return mean;
}

}  // namespace moelab::oracle
