// noisy_topk's hierarchical form in plain loops (Shazeer et al. 2017, the appendix on hierarchical mixtures): a gate over groups,
// a gate inside each group.
#include "oracle_parts.h"

#include <algorithm>

namespace moelab::oracle {
namespace {

struct Gated {
  Vec clean, noisy, std;
};

// x·weightᵀ, and with the noise that the layer asks for. `draw` says where in the row of `noise` this gate's values begin.
Gated gated(const Layer& layer, const Inputs& in, const std::string& prefix, const Vec& x, int64_t file_row, int64_t draw) {
  Gated g;
  for (const Vec& row : in.matrix("router." + prefix + "weight")) g.clean.push_back(dot(row, x));
  g.noisy = g.clean;
  if (!layer.train || layer.noise == "none") return g;
  const int64_t columns = in.arrays.at("noise").shape[1];
  const auto value = [&](size_t i) { return Dual(in.at("noise", file_row * columns + draw + static_cast<int64_t>(i)).v); };
  if (layer.noise == "jitter") {
    const double epsilon = layer.noise_epsilon < 0 ? 0.01 : layer.noise_epsilon;
    Vec jittered;
    for (size_t i = 0; i < x.size(); ++i)
      jittered.push_back(x[i] * (Dual(1 - epsilon) + Dual(2 * epsilon) * Dual(in.at("noise", file_row * columns + i).v)));
    g.noisy.clear();
    for (const Vec& row : in.matrix("router." + prefix + "weight")) g.noisy.push_back(dot(row, jittered));
    return g;
  }
  for (const Vec& row : in.matrix("router." + prefix + "noise_weight"))
    g.std.push_back(layer.noise == "normal" ? Dual(layer.noise_std)
                                            : softplus(dot(row, x)) + Dual(std::max(0.0, layer.noise_epsilon)));
  for (size_t i = 0; i < g.clean.size(); ++i) g.noisy[i] = g.clean[i] + g.std[i] * value(i);
  return g;
}

Vec part(const Vec& all, int64_t from, int64_t count) { return {all.begin() + from, all.begin() + from + count}; }

Vec picked(const Vec& all, const std::vector<int64_t>& which) {
  Vec some;
  for (const int64_t i : which) some.push_back(all[i]);
  return some;
}

// Softmax over the groups times softmax inside each group.
Vec product_of_softmaxes(const Vec& group, const Vec& inside) {
  const auto size = static_cast<int64_t>(inside.size() / group.size());
  const Vec outer = softmax(group);
  Vec p;
  for (size_t g = 0; g < group.size(); ++g)
    for (const Dual& q : softmax(part(inside, static_cast<int64_t>(g) * size, size))) p.push_back(outer[g] * q);
  return p;
}

// Logits whose softmax this is, and whose logsumexp is that of the groups' logits.
Vec joint(const Vec& group, const Vec& inside) {
  Vec logits = product_of_softmaxes(group, inside);
  Dual sum;
  for (const Dual& z : group) sum += exp(z);
  for (Dual& one : logits) one = log(one) + log(sum);
  return logits;
}

void decide_row(const Layer& layer, const Gated& group, const Gated& inside, Decision& d) {
  const int64_t size = layer.experts / layer.groups;
  const std::vector<int64_t> chosen = top(group.noisy, layer.k_groups);
  const Vec outer = softmax(picked(group.noisy, chosen));
  std::vector<int64_t> choice;
  Vec gate, probability;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const Vec own = part(inside.noisy, chosen[i] * size, size);
    const std::vector<int64_t> best = top(own, layer.k);
    const Vec inner = softmax(picked(own, best));
    for (size_t j = 0; j < best.size(); ++j) {
      choice.push_back(chosen[i] * size + best[j]);
      gate.push_back(outer[i] * inner[j]);
    }
  }
  Dual sum = 1e-9;
  for (const Dual& one : gate) sum += one;
  if (layer.renormalise == "before_drop")
    for (Dual& one : gate) one = one / sum;
  d.group.push_back(chosen);
  d.choice.push_back(choice);
  d.gate.push_back(gate);
  d.probability.push_back(picked(d.noisy_probability.back(), choice));
  d.allowed.emplace_back(choice.size(), true);
}

// Σ over rows of P(stays among the k chosen), of all `count` from column `from` on; or how many rows chose each.
template <class Chose>
Vec level_load(const Mat& clean, const Mat& noisy, const Mat& std, const std::vector<size_t>& of, int64_t from, int64_t count,
               int64_t k, bool train, bool include_self, Chose chose) {
  Vec sums(count);
  for (const size_t t : of) {
    const bool smooth = train && !std[t].empty() && k < count;
    const Vec own = part(noisy[t], from, count);
    for (int64_t i = 0; i < count; ++i)
      sums[i] += smooth ? normal_cdf((clean[t][from + i] - kth_largest(own, k, include_self ? -1 : i)) / std[t][from + i])
                        : Dual(chose(t, from + i) ? 1.0 : 0.0);
  }
  return sums;
}

}  // namespace

Decision decide_in_two_levels(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d;
  const Mat x = in.matrix("x");
  for (const int64_t row : rows.file_row) {
    const Gated group = gated(layer, in, "group_", x[row], row, 0), inside = gated(layer, in, "", x[row], row, layer.groups);
    d.group_clean.push_back(group.clean);
    d.group_noisy.push_back(group.noisy);
    d.group_std.push_back(group.std);
    d.inside_clean.push_back(inside.clean);
    d.inside_noisy.push_back(inside.noisy);
    d.inside_std.push_back(inside.std);
    d.clean.push_back(joint(group.clean, inside.clean));
    d.noisy.push_back(joint(group.noisy, inside.noisy));
    d.clean_probability.push_back(product_of_softmaxes(group.clean, inside.clean));
    d.noisy_probability.push_back(product_of_softmaxes(group.noisy, inside.noisy));
    decide_row(layer, group, inside, d);
  }
  return d;
}

Vec load_in_two_levels(const Layer& layer, const Decision& d, const std::vector<size_t>& of, bool include_self) {
  const auto has = [](const std::vector<int64_t>& list, int64_t one) { return std::count(list.begin(), list.end(), one) > 0; };
  const Vec groups = level_load(d.group_clean, d.group_noisy, d.group_std, of, 0, layer.groups, layer.k_groups, layer.train,
                                include_self, [&](size_t t, int64_t g) { return has(d.group[t], g); });
  const int64_t size = layer.experts / layer.groups;
  Vec load;
  for (int64_t g = 0; g < layer.groups; ++g) {
    std::vector<size_t> on;
    for (const size_t t : of)
      if (has(d.group[t], g)) on.push_back(t);
    const Vec inside = level_load(d.inside_clean, d.inside_noisy, d.inside_std, on, g * size, size, layer.k, layer.train,
                                  include_self, [&](size_t t, int64_t e) { return has(d.choice[t], e); });
    for (const Dual& one : inside) load.push_back(on.empty() ? Dual(0) : groups[g] * one / Dual(static_cast<double>(on.size())));
  }
  return load;
}

}  // namespace moelab::oracle
