// The oracle's losses: values over any set of rows, as the contract's section 3 writes them.
#include "oracle_parts.h"

#include <algorithm>

namespace moelab::oracle {
namespace {

// Variance over mean squared; 0 for zeros and for one expert.
Dual squared_variation(const Vec& sums, bool sample) {
  const auto n = static_cast<double>(sums.size());
  Dual mean, squares;
  for (const Dual& one : sums) mean += one / Dual(n);
  if (mean.v == 0 || sums.size() == 1) return 0;
  for (const Dual& one : sums) squares += (one - mean) * (one - mean);
  return squares / Dual(sample ? n - 1 : n) / (mean * mean);
}

// E · Σ f·P over second choices, P without the first choice, renormalised.
Dual second_place(const Layer& layer, const Decision& d, const Mat& p, const std::vector<size_t>& of) {
  const auto n = static_cast<double>(of.size());
  Vec share(layer.experts), mean(layer.experts);
  for (const size_t t : of) {
    if (d.choice[t].size() < 2) continue;
    share[d.choice[t][1]] += Dual(1 / n);
    Dual rest = 1e-9;
    for (int64_t e = 0; e < layer.experts; ++e)
      if (e != d.choice[t][0]) rest += p[t][e];
    for (int64_t e = 0; e < layer.experts; ++e)
      if (e != d.choice[t][0]) mean[e] += p[t][e] / rest / Dual(n);
  }
  return dot(share, mean) * Dual(static_cast<double>(layer.experts));
}

Dual balance(const LossCase& loss, const Layer& layer, const Decision& d, const std::vector<size_t>& of) {
  const bool any = loss.option("counts", "first_choice") == "any_choice";
  const bool divide = loss.option("divide_by_k", "false") == "true";
  const Mat& p = loss.option("probabilities", "clean") == "noisy" ? d.noisy_probability : d.clean_probability;
  const auto n = static_cast<double>(of.size());
  Vec share(layer.experts), mean(layer.experts);
  double choices = 0;  // Σ f, to be divided by
  for (const size_t t : of) {
    for (size_t j = 0; j < std::min<size_t>(any ? d.choice[t].size() : 1, d.choice[t].size()); ++j) {
      share[d.choice[t][j]] += Dual(1 / n);
      choices += 1 / n;
    }
    for (int64_t e = 0; e < layer.experts; ++e) mean[e] += p[t][e] / Dual(n);
  }
  const Dual first = dot(share, mean) * Dual(static_cast<double>(layer.experts) / (any && divide && choices > 0 ? choices : 1));
  return first + Dual(std::stod(loss.option("second_place", "0"))) * second_place(layer, d, p, of);
}

Dual log_sum_exp(const Vec& z) {
  double top = -1e300;
  for (const Dual& one : z) top = std::max(top, one.v);
  Dual sum;
  for (const Dual& one : z) sum += exp(one - Dual(top));
  return log(sum) + Dual(top);
}

Dual value_over(const LossCase& loss, const Layer& layer, const Decision& d, const std::vector<size_t>& of) {
  if (of.empty()) return 0;
  const bool sample = loss.option("variance", "population") == "sample";
  const bool vmoe = layer.router == "vmoe";
  const std::string weights = loss.option("of", vmoe ? "probabilities" : "gates");
  const std::string threshold = loss.option("threshold", vmoe ? "include_self" : "exclude_self");
  if (loss.name == "balance") return balance(loss, layer, d, of);
  if (loss.name == "importance") return squared_variation(importance(layer, d, of, weights == "gates"), sample);
  if (loss.name == "load") return squared_variation(load(layer, d, of, threshold == "include_self"), sample);
  if (const std::optional<Dual> value = method_loss(loss, layer, d, of)) return *value;
  Dual sum;
  for (const size_t t : of) {
    if (loss.name == "z") sum += log_sum_exp(d.clean[t]) * log_sum_exp(d.clean[t]);
    for (size_t e = 0; loss.name == "entropy" && e < d.clean_probability[t].size(); ++e)
      sum += Dual(-1) * d.clean_probability[t][e] * log(d.clean_probability[t][e]);
  }
  return sum / Dual(static_cast<double>(of.size()));
}

}  // namespace

Dual kth_largest(const Vec& noisy, int64_t k, int64_t without) {
  Vec rest;
  for (size_t e = 0; e < noisy.size(); ++e)
    if (static_cast<int64_t>(e) != without) rest.push_back(noisy[e]);
  std::stable_sort(rest.begin(), rest.end(), [](const Dual& a, const Dual& b) { return a.v > b.v; });
  return rest[k - 1];
}

Vec importance(const Layer& layer, const Decision& d, const std::vector<size_t>& of, bool gates) {
  Vec sums(layer.experts);
  for (const size_t t : of) {
    for (size_t j = 0; gates && j < d.choice[t].size(); ++j) sums[d.choice[t][j]] += d.gate[t][j];
    for (int64_t e = 0; !gates && e < layer.experts; ++e) sums[e] += d.clean_probability[t][e];
  }
  return sums;
}

Vec load(const Layer& layer, const Decision& d, const std::vector<size_t>& of, bool include_self) {
  if (layer.groups > 1) return load_in_two_levels(layer, d, of, include_self);
  Vec sums(layer.experts);
  for (const size_t t : of) {
    const auto k = static_cast<int64_t>(d.choice[t].size());
    const bool smooth = layer.train && !d.std.empty() && !d.std[t].empty() && k < layer.experts;
    for (size_t j = 0; !smooth && j < d.choice[t].size(); ++j) sums[d.choice[t][j]] += Dual(1);
    for (int64_t e = 0; smooth && e < layer.experts; ++e)
      sums[e] += normal_cdf((d.clean[t][e] - kth_largest(d.noisy[t], k, include_self ? -1 : e)) / d.std[t][e]);
  }
  return sums;
}

Dual loss_value(const LossCase& loss, const Layer& layer, const Rows& rows, const Decision& d) {
  std::vector<std::vector<size_t>> scopes(loss.scope == "sequence" ? rows.sequences : 1);
  for (size_t t = 0; t < rows.count(); ++t) scopes[loss.scope == "sequence" ? rows.sequence[t] : 0].push_back(t);
  Dual sum;
  for (const std::vector<size_t>& of : scopes)
    sum += value_over(loss, layer, d, of) *
           Dual(static_cast<double>(of.size()) / static_cast<double>(std::max<size_t>(1, rows.count())));
  return sum;
}

}  // namespace moelab::oracle
