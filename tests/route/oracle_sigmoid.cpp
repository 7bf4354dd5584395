// Sigmoid top-k: bias in the choice alone, groups, scaled gates.
#include "oracle_parts.h"

#include <algorithm>

namespace moelab::oracle {
namespace {

// Experts of the groups that are not kept: a group's score is the sum of its two best.
std::vector<int64_t> experts_outside(const Layer& layer, const Vec& select) {
  const auto groups = static_cast<int64_t>(layer.number("groups", 1)), size = layer.experts / groups;
  auto kept = static_cast<int64_t>(layer.number("groups_kept", 0));
  if (kept == 0) kept = groups;
  Vec score(groups);
  for (int64_t g = 0; g < groups; ++g) {
    Vec own(select.begin() + g * size, select.begin() + (g + 1) * size);
    std::sort(own.begin(), own.end(), [](const Dual& a, const Dual& b) { return a.v > b.v; });
    for (int64_t i = 0; i < std::min<int64_t>(2, size); ++i) score[g] += own[i];
  }
  const std::vector<int64_t> best = top(score, kept);
  std::vector<int64_t> outside;
  for (int64_t e = 0; e < layer.experts; ++e)
    if (std::find(best.begin(), best.end(), e / size) == best.end()) outside.push_back(e);
  return outside;
}

std::vector<int64_t> sigmoid_choice(const Layer& layer, const Vec& select) {
  std::vector<int64_t> taken = experts_outside(layer, select), choice;
  while (static_cast<int64_t>(choice.size()) < layer.k) {
    choice.push_back(best_of(select, taken));
    taken.push_back(choice.back());
  }
  return choice;
}

}  // namespace

Decision decide_sigmoid_topk(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d = scored(layer, in, rows);
  d.scale = layer.number("scale", 1);
  const Vec bias = in.vector("router.bias");
  for (size_t t = 0; t < rows.count(); ++t) {
    Vec score, select, gate, share;
    Dual sum;
    for (size_t e = 0; e < bias.size(); ++e) {
      score.push_back(sigmoid(d.noisy[t][e]));
      select.push_back(score[e] + (layer.option("selection_bias", "false") == "true" ? bias[e] : Dual(0)));
      share.push_back(sigmoid(d.clean[t][e]));
      sum += share[e];
    }
    d.probe["scores"].push_back(share);
    for (Dual& one : share) one = one / sum;
    d.clean_probability[t] = share;
    const std::vector<int64_t> choice = sigmoid_choice(layer, select);
    for (const int64_t e : choice) gate.push_back(score[e]);
    add_choice(layer, d, choice, gate);
  }
  return d;
}

}  // namespace moelab::oracle
