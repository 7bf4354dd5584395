#include "oracle_parts.h"

#include <algorithm>

namespace moelab::oracle {

std::string LossCase::option(const std::string& key, const std::string& fallback) const {
  const auto found = options.find(key);
  return found == options.end() ? fallback : found->second;
}

std::string Layer::option(const std::string& key, const std::string& fallback) const {
  const auto found = options.find(key);
  return found == options.end() ? fallback : found->second;
}

double Layer::number(const std::string& key, double fallback) const {
  const auto found = options.find(key);
  return found == options.end() ? fallback : std::stod(found->second);
}

Dual Inputs::at(const std::string& name, size_t i) const {
  return {arrays.at(name).value.at(i), name == seed && i == seed_index ? 1.0 : 0.0};
}

Mat Inputs::matrix(const std::string& name, int64_t block) const {
  const Array& array = arrays.at(name);
  const size_t columns = array.shape.back(), rows = array.shape.at(array.shape.size() - 2);
  Mat m(rows, Vec(columns));
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < columns; ++j) m[i][j] = at(name, (block * rows + i) * columns + j);
  return m;
}

Vec Inputs::vector(const std::string& name, int64_t block) const {
  const size_t columns = arrays.at(name).shape.back();
  Vec v(columns);
  for (size_t j = 0; j < columns; ++j) v[j] = at(name, block * columns + j);
  return v;
}

Dual dot(const Vec& a, const Vec& b) {
  Dual sum;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

Vec softmax(const Vec& z) {
  double top = -1e300;
  for (const Dual& one : z) top = std::max(top, one.v);
  Dual sum;
  Vec p;
  for (const Dual& one : z) {
    p.push_back(exp(one - Dual(top)));
    sum += p.back();
  }
  for (Dual& one : p) one = one / sum;
  return p;
}

Rows routed_rows(const Inputs& in) {
  Rows rows;
  std::map<int64_t, int64_t> number, next;
  for (int64_t t = 0; t < in.arrays.at("x").shape[0]; ++t) {
    if (in.has("padding") && in.at("padding", t).v != 0) continue;
    const auto id = in.has("sequence_ids") ? static_cast<int64_t>(in.at("sequence_ids", t).v) : 0;
    const int64_t sequence = number.try_emplace(id, static_cast<int64_t>(number.size())).first->second;
    const int64_t order = next[sequence]++;
    rows.file_row.push_back(t);
    rows.sequence.push_back(sequence);
    rows.position.push_back(in.has("positions") ? static_cast<int64_t>(in.at("positions", t).v) : order);
  }
  rows.sequences = static_cast<int64_t>(number.size());
  return rows;
}

namespace {

Dual activate(const std::string& name, Dual a) {
  if (name == "relu") return a.v > 0 ? a : Dual(0);
  if (name == "swiglu") return a * sigmoid(a);
  if (name == "gelu") return a * normal_cdf(a);
  const Dual inner = Dual(std::sqrt(2 / std::numbers::pi)) * (a + Dual(0.044715) * a * a * a);
  return Dual(0.5) * a * (Dual(1) + tanh(inner));
}

// weight·x, with the bias where there is one.
Vec linear(const Layer& layer, const Inputs& in, const std::string& prefix, const std::string& map, int64_t expert,
           const Vec& x) {
  const Mat weight = in.matrix(prefix + ".w_" + map, expert);
  Vec out;
  for (const Vec& row : weight) out.push_back(dot(row, x));
  if (!layer.bias) return out;
  const Vec bias = in.vector(prefix + ".b_" + map, expert);
  for (size_t i = 0; i < out.size(); ++i) out[i] += bias[i];
  return out;
}

void add_scaled(Vec& y, Dual factor, const Vec& more) {
  for (size_t j = 0; j < y.size(); ++j) y[j] += factor * more[j];
}

void add_shared(const Layer& layer, const Inputs& in, const Vec& x, Vec& y) {
  if (layer.shared_count == 0) return;
  const Dual gate = layer.shared_gate ? sigmoid(dot(in.vector("shared.gate_weight"), x)) : Dual(1);
  add_scaled(y, gate, expert_output(layer, in, "shared", 0, x));
}

// Gate of a kept pair, after the renormalisation that looks at the survivors.
Dual final_gate(const Layer& layer, const Decision& decision, size_t t, size_t j) {
  const Dual gate = decision.gate[t][j] * Dual(decision.scale);
  if (layer.renormalise != "after_drop") return gate;
  Dual sum;
  for (size_t i = 0; i < decision.gate[t].size(); ++i)
    if (decision.kept[t][i]) sum += decision.gate[t][i];
  return gate / (sum + Dual(1e-9));
}

void write_plan(const Layer& layer, const Rows& rows, const Decision& decision, Result& result) {
  result.offsets.push_back(0);
  for (int64_t e = 0; e < layer.experts; ++e) {
    for (size_t t = 0; t < rows.count(); ++t)
      for (size_t j = 0; j < decision.choice[t].size(); ++j) {
        if (decision.choice[t][j] != e || !decision.kept[t][j]) continue;
        result.token.push_back(rows.file_row[t]);
        result.expert.push_back(e);
        result.gate.push_back(final_gate(layer, decision, t, j));
      }
    result.offsets.push_back(static_cast<int64_t>(result.token.size()));
  }
  for (size_t t = 0; t < rows.count(); ++t)
    for (size_t j = 0; j < decision.choice[t].size(); ++j) {
      if (!decision.allowed[t][j] || decision.kept[t][j]) continue;
      result.dropped_token.push_back(rows.file_row[t]);
      result.dropped_expert.push_back(decision.choice[t][j]);
    }
}

void write_output(const Layer& layer, const Inputs& in, const Rows& rows, const Decision& decision, Result& result) {
  const Mat x = in.matrix("x");
  result.y = Mat(x.size(), Vec(in.arrays.at("x").shape[1]));
  for (size_t t = 0; t < rows.count(); ++t) {
    Vec& y = result.y[rows.file_row[t]];
    const Vec& x_t = x[rows.file_row[t]];
    for (size_t j = 0; j < decision.choice[t].size(); ++j)
      if (decision.kept[t][j])
        add_scaled(y, final_gate(layer, decision, t, j), expert_output(layer, in, "experts", decision.choice[t][j], x_t));
    add_shared(layer, in, x_t, y);
  }
}

Mat in_file_rows(const Inputs& in, const Rows& rows, const Mat& values, int64_t columns) {
  Mat all(in.arrays.at("x").shape[0], Vec(columns));
  for (size_t t = 0; t < rows.count(); ++t) all[rows.file_row[t]] = values[t];
  return all;
}

void write_probes(const Layer& layer, const Inputs& in, const Rows& rows, const Decision& decision, Result& result) {
  if (!in.has("router.weight")) return;
  const bool levels = layer.groups > 1;
  result.probe["logits"] = in_file_rows(in, rows, levels ? decision.inside_clean : decision.clean, layer.experts);
  if (levels) result.probe["group_logits"] = in_file_rows(in, rows, decision.group_clean, layer.groups);
  result.probe["probs"] = in_file_rows(in, rows, decision.clean_probability, layer.experts);
  for (const auto& [name, value] : decision.probe) {
    const bool per_row = value.size() == rows.count() && rows.count() > 1;
    result.probe[name] = per_row ? in_file_rows(in, rows, value, static_cast<int64_t>(value[0].size())) : value;
  }
  const bool vmoe = layer.router == "vmoe";
  if (layer.router != "noisy_topk" && !vmoe) return;
  std::vector<size_t> all(rows.count());
  for (size_t t = 0; t < all.size(); ++t) all[t] = t;
  result.probe["importance"] = {importance(layer, decision, all, !vmoe)};
  result.probe["load"] = {load(layer, decision, all, vmoe)};
}

}  // namespace

Vec expert_output(const Layer& layer, const Inputs& in, const std::string& prefix, int64_t expert, const Vec& x) {
  const bool gated = layer.activation == "swiglu";
  Vec hidden = linear(layer, in, prefix, gated ? "gate" : "in", expert, x);
  for (Dual& one : hidden) one = activate(layer.activation, one);
  if (!gated) return linear(layer, in, prefix, "out", expert, hidden);
  const Vec up = linear(layer, in, prefix, "up", expert, x);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = hidden[i] * up[i];
  return linear(layer, in, prefix, "down", expert, hidden);
}

Result evaluate(const Layer& layer, const Arrays& arrays, const std::string& seed, size_t index) {
  const Inputs in{arrays, seed, index};
  const Rows rows = routed_rows(in);
  Decision decision = decide(layer, in, rows);
  apply_capacity(layer, in, rows, decision);
  Result result;
  write_plan(layer, rows, decision, result);
  write_output(layer, in, rows, decision, result);
  write_probes(layer, in, rows, decision, result);
  for (size_t t = 0; in.has("grad_y") && t < result.y.size(); ++t)
    for (size_t j = 0; j < result.y[t].size(); ++j)
      result.objective += result.y[t][j] * in.at("grad_y", t * result.y[t].size() + j);
  for (const LossCase& loss : layer.losses) {
    const Dual value = loss_value(loss, layer, rows, decision);
    result.loss[loss.label.empty() ? loss.name : loss.label] = value;
    result.objective += Dual(loss.coefficient) * value;
  }
  return result;
}

std::vector<double> gradient(const Layer& layer, const Arrays& in, const std::string& name) {
  std::vector<double> g;
  for (size_t i = 0; i < in.at(name).value.size(); ++i) g.push_back(evaluate(layer, in, name, i).objective.d);
  return g;
}

}  // namespace moelab::oracle
