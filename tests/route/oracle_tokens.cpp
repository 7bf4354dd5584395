// Routers that read token ids: hash layers and StableMoE.
#include "oracle_parts.h"

#include <algorithm>

namespace moelab::oracle {
namespace {

int64_t token_of(const Inputs& in, const Rows& rows, size_t t) {
  return static_cast<int64_t>(in.at("token_ids", rows.file_row[t]).v);
}

// Rows of the same sequence before row t, the nearest first; after it with `forwards`.
std::vector<size_t> neighbours(const Rows& rows, size_t t, bool forwards) {
  std::vector<size_t> found;
  const auto ahead = [&](size_t o) { return (rows.position[o] - rows.position[t]) * (forwards ? 1 : -1); };
  for (size_t o = 0; o < rows.count(); ++o)
    if (rows.sequence[o] == rows.sequence[t] && ahead(o) > 0) found.push_back(o);
  std::sort(found.begin(), found.end(), [&](size_t a, size_t b) { return ahead(a) < ahead(b); });
  return found;
}

// The line of the table that row t reads.
int64_t line_of(const std::string& kind, const Inputs& in, const Rows& rows, size_t t) {
  if (kind == "position") return rows.position[t] % in.arrays.at("router.table").shape[0];
  if (kind != "previous" && kind != "future") return token_of(in, rows, t);
  const std::vector<size_t> near = neighbours(rows, t, kind == "future");
  return near.empty() ? 0 : token_of(in, rows, near[0]);
}

// What the second router reads of row t: its token's embedding, or a causal convolution over five tokens.
Vec distilled_input(const Layer& layer, const Inputs& in, const Rows& rows, size_t t) {
  const auto embedding = [&](size_t row) { return in.matrix("router.embedding")[token_of(in, rows, row)]; };
  if (layer.option("distilled", "word") == "word") return embedding(t);
  std::vector<size_t> window = neighbours(rows, t, false);
  window.insert(window.begin(), t);
  Vec hidden = in.vector("router.taps_bias");
  for (size_t o = 0; o < hidden.size(); ++o) {
    const Mat taps = in.matrix("router.taps", static_cast<int64_t>(o));
    for (size_t j = 0; j < std::min<size_t>(5, window.size()); ++j) hidden[o] += dot(taps[j], embedding(window[j]));
  }
  return hidden;
}

}  // namespace

Decision decide_hash(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d;
  const auto k = static_cast<size_t>(layer.number("k", 1));
  for (size_t t = 0; t < rows.count(); ++t) {
    std::vector<int64_t> choice;
    for (size_t j = 0; j < k && layer.given_choice.empty(); ++j)
      choice.push_back(
          static_cast<int64_t>(in.at("router.table", line_of(layer.option("kind", "balanced"), in, rows, t) * k + j).v));
    if (!layer.given_choice.empty()) choice = {layer.given_choice[t]};
    add_choice(layer, d, choice, Vec(choice.size(), Dual(1)));
  }
  return d;
}

Decision decide_stablemoe(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d = scored(layer, in, rows);
  const bool second = static_cast<double>(layer.step) >= layer.number("stage1_steps", 6000);
  const bool by_distilled = second || (!layer.train && layer.option("eval_router", "distilled") == "distilled");
  d.learns_distilled = !second;
  for (size_t t = 0; t < rows.count(); ++t) {
    Vec score = products(in.matrix("router.distilled"), distilled_input(layer, in, rows, t));
    for (Dual& one : score) one = second ? Dual(one.v) : one;  // frozen
    d.distilled.push_back(score);
    const int64_t expert = best_of(by_distilled ? score : d.noisy[t], {});
    add_choice(layer, d, {expert}, {sigmoid(d.noisy[t][expert])});
    d.probe["agreement"].push_back({best_of(d.clean[t], {}) == best_of(score, {}) ? 1.0 : 0.0});
  }
  d.probe["distilled"] = d.distilled;
  return d;
}

}  // namespace moelab::oracle
