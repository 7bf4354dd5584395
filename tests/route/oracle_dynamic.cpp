// Routers with a varying number of experts per row: top-p and DynMoE.
#include "oracle_parts.h"

#include <algorithm>

namespace moelab::oracle {
namespace {

double length_of(const Vec& row) { return std::sqrt(dot(row, row).v); }

Dual cosine(const Vec& a, const Vec& b) { return dot(a, b) / (square_root(dot(a, a)) * square_root(dot(b, b))); }

// 1 where u > 0, backward straight through; else 0.
Dual straight_through(Dual margin) { return margin.v > 0 ? Dual(1, margin.d) : Dual(0); }

// A row's scores and margins.
struct Margins {
  Vec logit, score, margin;
};

Margins margins_of(const Layer& layer, const Inputs& in, const Vec& x, const std::vector<bool>& active) {
  const Mat weight = in.matrix("router.weight");
  const Vec threshold = in.vector("router.thresholds");
  const Dual temperature = layer.number("temperature", 1);
  Margins m;
  for (size_t e = 0; e < weight.size(); ++e) {
    m.logit.push_back(temperature * cosine(x, weight[e]));
    m.score.push_back(active[e] ? sigmoid(m.logit[e]) : Dual(0));
    m.margin.push_back(m.score[e] - sigmoid(temperature * threshold[e]));
  }
  return m;
}

Vec shares_of(Vec values) {
  Dual sum;
  for (const Dual& one : values) sum += one;
  for (Dual& one : values) one = one / sum;
  return values;
}

// Lowest index of the largest among the active.
int64_t best_active(const Vec& by, const std::vector<bool>& active) {
  std::vector<int64_t> absent;
  for (size_t e = 0; e < active.size(); ++e)
    if (!active[e]) absent.push_back(static_cast<int64_t>(e));
  return best_of(by, absent);
}

void choose_above_thresholds(const Layer& layer, const Margins& m, Decision& d) {
  std::vector<int64_t> choice;
  for (const int64_t e : top(m.margin, layer.experts))
    if (m.margin[e].v > 0) choice.push_back(e);
  const Dual count = static_cast<double>(choice.size());  // a constant of the surrogate
  Vec gate, priority;
  for (const int64_t e : choice) gate.push_back(straight_through(m.margin[e]) / count);
  if (choice.empty() && !layer.train) {
    choice = {best_active(layer.option("eval_fallback", "score") == "score" ? m.score : m.margin, d.active)};
    gate = {1};
  }
  for (const int64_t e : choice) priority.push_back(m.score[e]);
  add_choice(layer, d, choice, gate);
  d.probability.back() = priority;
}

}  // namespace

Decision decide_top_p(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d = scored(layer, in, rows);
  const double p = layer.number("p", 0.4);
  const auto most = static_cast<size_t>(layer.number("k_max", 0));
  for (size_t t = 0; t < rows.count(); ++t) {
    const Vec& probability = d.noisy_probability[t];
    std::vector<int64_t> choice;
    Vec gate;
    double sum = 0;
    for (const int64_t e : top(d.noisy[t], layer.experts)) {
      if (!choice.empty() && (sum > p || choice.size() == most)) break;
      choice.push_back(e);
      gate.push_back(probability[e]);
      sum += probability[e].v;
    }
    d.probe["k"].push_back({static_cast<double>(choice.size())});
    add_choice(layer, d, choice, gate);
  }
  return d;
}

Decision decide_dynmoe(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d;
  d.direction = in.matrix("router.weight");
  for (const Dual& one : in.vector("router.mask")) d.active.push_back(one.v != 0);
  const Mat x = in.matrix("x");
  for (const int64_t row : rows.file_row) {
    const Margins m = margins_of(layer, in, x[row], d.active);
    d.clean.push_back(m.logit);
    d.clean_probability.push_back(shares_of(m.score));
    d.indicator.emplace_back();
    for (const Dual& one : m.margin) d.indicator.back().push_back(straight_through(one));
    d.probe["margin"].push_back(m.margin);
    d.probe["probs"].push_back(m.score);
    choose_above_thresholds(layer, m, d);
  }
  d.noisy = d.clean;
  return d;
}

// The tensors after a window of one step: experts without a row go, one comes for the rows that no expert took.
Arrays dynmoe_after_window(const Layer& layer, const Inputs& in, const Rows& rows) {
  const Decision d = decide_dynmoe(layer, in, rows);
  std::vector<int64_t> activations(layer.experts, 0);
  Vec unrouted(in.arrays.at("x").shape[1]);
  for (size_t t = 0; t < rows.count(); ++t) {
    for (const int64_t e : d.choice[t]) ++activations[e];
    for (size_t i = 0; d.choice[t].empty() && i < unrouted.size(); ++i) unrouted[i] += in.matrix("x")[rows.file_row[t]][i];
  }
  Arrays after{{"router.weight", in.arrays.at("router.weight")},
               {"router.thresholds", in.arrays.at("router.thresholds")},
               {"router.mask", in.arrays.at("router.mask")}};
  std::vector<double>& mask = after["router.mask"].value;
  for (size_t e = 0; e < mask.size(); ++e)
    if (activations[e] == 0) mask[e] = 0;
  const auto added = static_cast<size_t>(std::find(mask.begin(), mask.end(), 0.0) - mask.begin());
  if (length_of(unrouted) == 0 || added == mask.size()) return after;
  mask[added] = 1;
  after["router.thresholds"].value[added] = 0;
  for (size_t i = 0; i < unrouted.size(); ++i)
    after["router.weight"].value[added * unrouted.size() + i] = unrouted[i].v / length_of(unrouted);
  return after;
}

}  // namespace moelab::oracle
