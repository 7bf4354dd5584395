// Scores, choices, gates and the drop order of the oracle.
#include "oracle_parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moelab::oracle {

Vec products(const Mat& weight, const Vec& x) {
  Vec z;
  for (const Vec& row : weight) z.push_back(dot(row, x));
  return z;
}

Vec noise_row(const Inputs& in, int64_t file_row) {
  const auto& shape = in.arrays.at("noise").shape;
  const size_t columns = shape.size() == 1 ? 1 : shape[1];
  Vec row;
  for (size_t j = 0; j < columns; ++j) row.push_back(in.at("noise", file_row * columns + j).v);
  return row;
}

namespace {

// Standard deviation of the noise on the logits that the layer asks for; 0 = none.
double normal_std(const Layer& layer) {
  const bool always_one_over_e = layer.router == "vmoe" && layer.noise == "paper";
  if (always_one_over_e || (layer.noise == "normal" && layer.noise_std < 0)) return 1.0 / static_cast<double>(layer.experts);
  return layer.noise == "normal" ? layer.noise_std : 0;
}

void score_row(const Layer& layer, const Inputs& in, const Mat& weight, const Vec& x, int64_t file_row, Decision& d) {
  const Vec clean = products(weight, x);
  Vec noisy = clean, std;
  const bool jitter = layer.noise == "jitter" || (layer.noise == "paper" && layer.router == "switch");
  const bool learned = layer.noise == "paper" && layer.router == "noisy_topk";
  if (layer.train && jitter) {
    const double epsilon = layer.noise_epsilon < 0 ? 0.01 : layer.noise_epsilon;
    const Vec u = noise_row(in, file_row);
    Vec jittered = x;
    for (size_t i = 0; i < x.size(); ++i) jittered[i] = x[i] * (Dual(1 - epsilon) + Dual(2 * epsilon) * u[i]);
    noisy = products(weight, jittered);
  }
  if (layer.train && learned) {
    std = products(in.matrix("router.noise_weight"), x);
    for (Dual& one : std) one = softplus(one) + Dual(std::max(0.0, layer.noise_epsilon));
  }
  if (layer.train && normal_std(layer) > 0) std = Vec(clean.size(), Dual(normal_std(layer)));
  if (!std.empty()) {
    const Vec draw = noise_row(in, file_row);
    for (size_t e = 0; e < clean.size(); ++e) noisy[e] = clean[e] + std[e] * draw[e];
  }
  d.clean.push_back(clean);
  d.noisy.push_back(noisy);
  d.std.push_back(std);
  d.clean_probability.push_back(softmax(clean));
  d.noisy_probability.push_back(softmax(noisy));
}

}  // namespace

int64_t best_of(const Vec& score, const std::vector<int64_t>& taken) {
  int64_t best = -1;
  for (size_t e = 0; e < score.size(); ++e) {
    if (std::find(taken.begin(), taken.end(), static_cast<int64_t>(e)) != taken.end()) continue;
    if (best < 0 || score[e].v > score[best].v) best = static_cast<int64_t>(e);
  }
  return best;
}

std::vector<int64_t> top(const Vec& score, int64_t k) {
  std::vector<int64_t> taken;
  while (static_cast<int64_t>(taken.size()) < k) taken.push_back(best_of(score, taken));
  return taken;
}

namespace {

std::vector<int64_t> gshard_choice(const Layer& layer, const Inputs& in, const Vec& z, int64_t file_row) {
  std::vector<int64_t> choice = top(z, std::min<int64_t>(2, layer.experts));
  if (layer.second_expert != "gumbel" || choice.size() < 2) return choice;
  const Vec gumbel = noise_row(in, file_row);
  Vec shaken = z;
  for (size_t e = 0; e < z.size(); ++e) shaken[e] = z[e] + gumbel[e];
  return {choice[0], best_of(shaken, {choice[0]})};
}

bool second_kept(const Layer& layer, const Inputs& in, double p1, double p2, int64_t file_row) {
  const double g2 = p2 / (p1 + p2);
  if (layer.second_expert == "random_2g") return noise_row(in, file_row)[0].v < g2 / layer.threshold;
  if (layer.second_expert == "random_2p") return noise_row(in, file_row)[0].v < 2 * p2;
  if (layer.second_expert == "threshold") return g2 > layer.threshold;
  return layer.second_expert != "none";
}

std::vector<int64_t> choice_of(const Layer& layer, const Inputs& in, const Rows& rows, const Decision& d, size_t t) {
  if (layer.router == "uniform" || layer.router == "random") {
    std::vector<int64_t> choice;
    for (int64_t j = 0; j < layer.k; ++j)
      choice.push_back(layer.router == "uniform" ? (rows.position[t] + j) % layer.experts
                                                 : static_cast<int64_t>(noise_row(in, rows.file_row[t])[j].v));
    return choice;
  }
  if (layer.router == "gshard") return gshard_choice(layer, in, d.noisy[t], rows.file_row[t]);
  return top(d.noisy[t], layer.router == "switch" ? 1 : layer.k);
}

Vec divided_by_sum(Vec gate) {
  Dual sum = 1e-9;
  for (const Dual& one : gate) sum += one;
  for (Dual& one : gate) one = one / sum;
  return gate;
}

void gate_row(const Layer& layer, Decision& d, size_t t) {
  const std::vector<int64_t>& choice = d.choice[t];
  if (d.noisy.empty()) {
    d.gate.emplace_back(choice.size(), Dual(1.0 / static_cast<double>(choice.size())));
    d.probability.push_back(d.gate.back());
    return;
  }
  Vec probability, chosen;
  for (const int64_t e : choice) {
    probability.push_back(d.noisy_probability[t][e]);
    chosen.push_back(d.noisy[t][e]);
  }
  const bool after = layer.router == "noisy_topk" || layer.softmax == "after";
  const Vec gate = after ? softmax(chosen) : probability;
  d.gate.push_back(layer.renormalise == "before_drop" ? divided_by_sum(gate) : gate);
  d.probability.push_back(probability);
}

double rounded(double value, const std::string& how) {
  if (how == "ceil") return std::ceil(value);
  return how == "floor" ? std::floor(value) : std::nearbyint(value);
}

}  // namespace

int64_t places(const Layer& layer, int64_t n, int64_t k) {
  const Capacity& c = layer.capacity;
  if (c.mode == "none") return n;
  if (c.mode == "absolute") return c.value;
  const double share = static_cast<double>(n) * c.factor;
  const double wanted = c.mode == "token_fraction"
                            ? share
                            : share * static_cast<double>(c.times_k ? k : 1) / static_cast<double>(layer.experts);
  int64_t count = std::max(static_cast<int64_t>(rounded(wanted, c.round)), c.min);
  while (count % c.multiple_of != 0) ++count;
  return std::min(count, n);
}

namespace {

struct Pair {
  size_t t, j;
};

// Rows sorted by a number, largest first; ties keep the row order.
template <class Number>
std::vector<size_t> rows_by(std::vector<size_t> rows, Number number) {
  std::stable_sort(rows.begin(), rows.end(), [&](size_t a, size_t b) { return number(a) > number(b); });
  return rows;
}

std::vector<Pair> all_pairs(const Decision& d, const std::vector<size_t>& rows, bool k_major) {
  std::vector<Pair> pairs;
  size_t k = 0;
  for (const size_t t : rows) k = std::max(k, d.choice[t].size());
  for (size_t i = 0; k_major && i < k; ++i)
    for (const size_t t : rows)
      if (i < d.choice[t].size()) pairs.push_back({t, i});
  for (size_t i = 0; !k_major && i < rows.size(); ++i)
    for (size_t j = 0; j < d.choice[rows[i]].size(); ++j) pairs.push_back({rows[i], j});
  return pairs;
}

// The pairs of one scope in the order in which they are served.
std::vector<Pair> queue_of(const Layer& layer, const Inputs& in, const Rows& rows, const Decision& d,
                           const std::vector<size_t>& scope) {
  const bool k_major = layer.capacity.order == "k_major";
  const std::string& priority = layer.capacity.priority;
  const auto largest = [&](size_t t) {
    double most = 0;
    for (const Dual& p : d.probability[t]) most = std::max(most, p.v);
    return most;
  };
  if (priority == "position") return all_pairs(d, scope, k_major);
  if (priority == "batch") return all_pairs(d, rows_by(scope, largest), k_major);
  std::vector<Pair> pairs = all_pairs(d, scope, priority == "random" && k_major);
  const auto number = [&](const Pair& p) {
    if (priority == "score") return d.probability[p.t][p.j].v;
    return in.at("noise.capacity", rows.file_row[p.t] * layer.experts + d.choice[p.t][p.j]).v;
  };
  std::stable_sort(pairs.begin(), pairs.end(), [&](const Pair& a, const Pair& b) {
    if (priority == "random" && k_major && a.j != b.j) return a.j < b.j;
    return number(a) > number(b);
  });
  return pairs;
}

}  // namespace

Decision scored(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d;
  const Mat x = in.matrix("x"), weight = in.matrix("router.weight");
  for (const int64_t row : rows.file_row) score_row(layer, in, weight, x[row], row, d);
  return d;
}

void add_choice(const Layer& layer, Decision& d, std::vector<int64_t> choice, Vec gate) {
  d.allowed.emplace_back(choice.size(), true);
  d.choice.push_back(std::move(choice));
  d.probability.push_back(gate);
  d.gate.push_back(layer.renormalise == "before_drop" ? divided_by_sum(gate) : gate);
}

Decision decide(const Layer& layer, const Inputs& in, const Rows& rows) {
  if (layer.groups > 1) return decide_in_two_levels(layer, in, rows);
  if (const Decide method = method_of(layer)) return method(layer, in, rows);
  Decision d;
  if (in.has("router.weight")) d = scored(layer, in, rows);
  for (size_t t = 0; t < rows.count(); ++t) {
    d.choice.push_back(choice_of(layer, in, rows, d, t));
    gate_row(layer, d, t);
    std::vector<bool> allowed(d.choice[t].size(), true);
    if (layer.router == "gshard" && allowed.size() == 2)
      allowed[1] = second_kept(layer, in, d.probability[t][0].v, d.probability[t][1].v, rows.file_row[t]);
    d.allowed.push_back(allowed);
  }
  return d;
}

void apply_capacity(const Layer& layer, const Inputs& in, const Rows& rows, Decision& d) {
  d.kept = d.allowed;
  if (d.capacity_is_choice) return;
  const bool by_sequence = layer.capacity.scope == "sequence";
  for (int64_t s = 0; s < (by_sequence ? rows.sequences : 1); ++s) {
    std::vector<size_t> scope;
    for (size_t t = 0; t < rows.count(); ++t)
      if (!by_sequence || rows.sequence[t] == s) scope.push_back(t);
    if (scope.empty()) continue;
    const auto k = static_cast<int64_t>(d.choice[scope[0]].size());
    std::vector<int64_t> left(layer.experts, places(layer, static_cast<int64_t>(scope.size()), k));
    for (const Pair& p : queue_of(layer, in, rows, d, scope)) {
      if (!d.allowed[p.t][p.j]) continue;
      int64_t& free = left[d.choice[p.t][p.j]];
      d.kept[p.t][p.j] = free > 0;
      if (free > 0) --free;
    }
  }
}

}  // namespace moelab::oracle
