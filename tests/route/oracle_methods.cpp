// Which file decides for a router, the losses of single methods, and the state after a step.
#include "oracle_parts.h"

#include <algorithm>
#include <numeric>

namespace moelab::oracle {

Decide method_of(const Layer& layer) {
  const std::map<std::string, Decide> methods{{"base", decide_base},
                                              {"expert_choice", decide_expert_choice},
                                              {"hash", decide_hash},
                                              {"thor", decide_thor},
                                              {"stablemoe", decide_stablemoe},
                                              {"domain", decide_domain},
                                              {"top_p", decide_top_p},
                                              {"dynmoe", decide_dynmoe},
                                              {"sigmoid_topk", decide_sigmoid_topk}};
  const auto found = methods.find(layer.router);
  return found == methods.end() ? nullptr : found->second;
}

namespace {

Dual distillation(const Decision& d, const std::vector<size_t>& of) {
  Dual sum;
  for (const size_t t : of) sum += Dual(-1) * log(softmax(d.distilled[t])[d.choice[t][0]]);
  return sum;
}

Dual stablemoe_balance(const Layer& layer, const Decision& d, const std::vector<size_t>& of) {
  std::vector<double> count(layer.experts);
  Vec sum(layer.experts);
  for (const size_t t : of) {
    count[d.choice[t][0]] += 1;
    sum[d.choice[t][0]] += sigmoid(d.clean[t][d.choice[t][0]]);
  }
  const double mean = static_cast<double>(of.size()) / static_cast<double>(layer.experts);
  Dual value;
  for (int64_t e = 0; e < layer.experts; ++e) value += Dual((count[e] - mean) / mean) * sum[e];
  return value;
}

// ‖Ŵ Ŵᵀ - I‖ over the active rows.
Dual diversity(const Decision& d) {
  Dual squares;
  for (size_t a = 0; a < d.direction.size(); ++a)
    for (size_t b = 0; b < d.direction.size(); ++b) {
      if (!d.active[a] || !d.active[b]) continue;
      const Vec &first = d.direction[a], &second = d.direction[b];
      const Dual length = square_root(dot(first, first)) * square_root(dot(second, second));
      const Dual off = dot(first, second) / length - Dual(a == b ? 1 : 0);
      squares += off * off;
    }
  return square_root(squares);
}

Dual simplicity(const Decision& d) {
  Dual sum;
  for (const Vec& row : d.direction) sum += square_root(dot(row, row));
  return sum / Dual(static_cast<double>(d.direction.size()));
}

Dual efficiency(const Decision& d, const std::vector<size_t>& of) {
  Dual sum;
  for (const size_t t : of)
    for (const Dual& one : d.indicator[t]) sum += one;
  return sum / Dual(static_cast<double>(of.size() * d.direction.size()));
}

Dual dynmoe_balance(const Decision& d, const std::vector<size_t>& of) {
  const size_t experts = d.direction.size();
  Vec share(experts), mean(experts);
  double rows = 0;
  for (const size_t t : of) {
    Dual used;
    for (const Dual& one : d.indicator[t]) used += one;
    if (used.v == 0) continue;
    rows += 1;
    for (size_t e = 0; e < experts; ++e) {
      share[e] += Dual(d.indicator[t][e].v);
      mean[e] += d.indicator[t][e] / used;
    }
  }
  return rows == 0 ? Dual(0) : dot(share, mean) * Dual(static_cast<double>(experts) / (rows * rows));
}

Arrays bias_after_step(const Layer& layer, const Inputs& in, const Rows& rows) {
  Array bias = in.arrays.at("router.bias");
  if (!layer.train) return {{"router.bias", bias}};  // an evaluation moves nothing
  std::vector<double> load(layer.experts);
  for (const std::vector<int64_t>& choice : decide_sigmoid_topk(layer, in, rows).choice)
    for (const int64_t e : choice) load[e] += 1;
  const double mean = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(layer.experts);
  for (size_t e = 0; e < load.size(); ++e)
    bias.value[e] += layer.number("bias_rate", 0) * (load[e] < mean ? 1 : load[e] > mean ? -1 : 0);
  return {{"router.bias", bias}};
}

Arrays thresholds_after_step(const Layer& layer, const Inputs& in, const Rows& rows) {
  Array threshold = in.arrays.at("router.thresholds");
  const Vec last = last_chosen_scores(layer, in, rows);
  for (size_t e = 0; e < last.size(); ++e)
    threshold.value[e] += layer.number("threshold_rate", 0.1) * (last[e].v - threshold.value[e]);
  return {{"router.thresholds", threshold}};
}

}  // namespace

std::optional<Dual> method_loss(const LossCase& loss, const Layer& layer, const Decision& d, const std::vector<size_t>& of) {
  if (loss.name == "diversity") return diversity(d);
  if (loss.name == "simplicity") return simplicity(d);
  if (loss.name == "efficiency") return efficiency(d, of);
  if (loss.name == "dynmoe_balance") return dynmoe_balance(d, of);
  const bool stablemoe = loss.name == "distillation" || loss.name == "stablemoe_balance";
  if (stablemoe && !d.learns_distilled) return Dual(0);  // stage 2 has the task's loss alone
  if (loss.name == "distillation") return distillation(d, of);
  if (loss.name == "stablemoe_balance") return stablemoe_balance(layer, d, of);
  return std::nullopt;
}

Arrays after_step(const Layer& layer, const Arrays& arrays) {
  const Inputs in{arrays, "", 0};
  Arrays after;
  for (const auto& [name, array] : arrays)
    if (name.starts_with("router.")) after[name] = array;
  Arrays moved;
  const Rows rows = routed_rows(in);
  if (layer.router == "dynmoe" && layer.train) moved = dynmoe_after_window(layer, in, rows);
  if (layer.router == "sigmoid_topk") moved = bias_after_step(layer, in, rows);
  if (layer.router == "expert_choice" && layer.train) moved = thresholds_after_step(layer, in, rows);
  if (layer.router == "stablemoe" && static_cast<double>(layer.step + 1) >= layer.number("stage1_steps", 6000))
    moved["router.stage"] = {{1}, {2}, true, true};
  for (const auto& [name, array] : moved) after[name] = array;
  return after;
}

}  // namespace moelab::oracle
