// Routers that do not look at x: THOR, and experts by domain label.
#include "oracle_parts.h"

namespace moelab::oracle {
namespace {

// Which of the given draws row t uses.
size_t draw_of(const std::string& granularity, const Rows& rows, size_t t) {
  if (granularity == "sequence") return rows.sequence[t];
  if (granularity == "position") return rows.position[t];
  return granularity == "token" ? rows.file_row[t] : 0;
}

std::vector<int64_t> thor_choice(const Layer& layer, const Inputs& in, const Rows& rows, size_t t) {
  const std::string inference = layer.option("inference", "random");
  if (!layer.train && inference == "fixed") return {static_cast<int64_t>(layer.number("fixed_expert", 0))};
  std::vector<int64_t> all;
  for (int64_t e = 0; e < layer.experts; ++e) all.push_back(e);
  if (!layer.train && inference == "ensemble") return all;
  const std::string granularity =
      layer.train ? layer.option("granularity", "batch") : layer.option("inference_granularity", "token");
  return {static_cast<int64_t>(in.at("noise", draw_of(granularity, rows, t)).v)};
}

}  // namespace

Decision decide_thor(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d;
  for (size_t t = 0; t < rows.count(); ++t) {
    const std::vector<int64_t> choice = thor_choice(layer, in, rows, t);
    add_choice(layer, d, choice, Vec(choice.size(), Dual(1.0 / static_cast<double>(choice.size()))));
  }
  return d;
}

Decision decide_domain(const Layer& layer, const Inputs& in, const Rows& rows) {
  Decision d;
  const auto k = static_cast<int64_t>(layer.number("k", 1));
  for (size_t t = 0; t < rows.count(); ++t) {
    const auto label = static_cast<int64_t>(in.at("domain", rows.file_row[t]).v);
    std::vector<int64_t> choice;
    for (int64_t j = 0; j < k; ++j) choice.push_back((label * k + j) % layer.experts);
    Vec gate(k, Dual(1.0 / static_cast<double>(k)));
    if (layer.option("hard", "true") == "false") {
      d.clean.push_back(in.matrix("router.weight")[label]);
      d.clean_probability.push_back(softmax(d.clean.back()));
      choice = top(d.clean.back(), k);
      for (int64_t j = 0; j < k; ++j) gate[j] = d.clean_probability.back()[choice[j]];
    }
    add_choice(layer, d, choice, gate);
  }
  d.noisy = d.clean;
  d.noisy_probability = d.clean_probability;
  return d;
}

}  // namespace moelab::oracle
