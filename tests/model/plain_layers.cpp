#include "plain_layers.h"

#include "model_fixture.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

namespace moelab::test {
namespace {

// Turns the pairs (i, i + A/2) of each head.
Vector rotated(Vector x, size_t heads, double position) {
  const size_t size = x.size() / heads, half = size / 2;
  for (size_t h = 0; h < heads; ++h)
    for (size_t i = 0; i < half; ++i) {
      const double angle = position * std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(size));
      double& a = x[h * size + i];
      double& b = x[h * size + i + half];
      const double turned_a = a * std::cos(angle) - b * std::sin(angle), turned_b = a * std::sin(angle) + b * std::cos(angle);
      a = turned_a;
      b = turned_b;
    }
  return x;
}

// What the query reads of the first `seen` rows, head by head.
Vector mixture_of_values(const Vector& query, const Matrix& keys, const Matrix& values, size_t heads, size_t seen) {
  const size_t size = query.size() / heads;
  Vector mixed(query.size(), 0.0);
  for (size_t h = 0; h < heads; ++h) {
    Vector weight_of(seen);
    double total = 0;
    for (size_t s = 0; s < seen; ++s) {
      double score = 0;
      for (size_t i = h * size; i < (h + 1) * size; ++i) score += query[i] * keys[s][i];
      total += weight_of[s] = std::exp(score / std::sqrt(static_cast<double>(size)));
    }
    for (size_t s = 0; s < seen; ++s)
      for (size_t i = h * size; i < (h + 1) * size; ++i) mixed[i] += weight_of[s] / total * values[s][i];
  }
  return mixed;
}

}  // namespace

Vector vector_of(const Tensor& t) {
  const Tensor flat = t.detach().contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

void add_to(Vector& x, const Vector& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

Vector times(const Tensor& weight_OI, const Vector& x) {
  const Vector w = vector_of(weight_OI);
  Vector y(weight_OI.size(0), 0.0);
  for (size_t o = 0; o < y.size(); ++o)
    for (size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
  return y;
}

Vector normed(const Vector& x, const Tensor& weight_D) {
  const Vector w = vector_of(weight_D);
  double square = 0;
  for (const double v : x) square += v * v;
  Vector y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] / std::sqrt(square / static_cast<double>(x.size()) + 1e-5) * w[i];
  return y;
}

Matrix plain_attention(const Model& model, const std::string& block, const Matrix& x, size_t heads, bool causal) {
  const auto weight = [&](const char* name) { return parameter_of(model, block + "attention." + name); };
  const auto turned = [&](Vector row, size_t t) { return causal ? rotated(std::move(row), heads, static_cast<double>(t)) : row; };
  Matrix q, k, v, out;
  for (size_t t = 0; t < x.size(); ++t) {
    q.push_back(turned(times(weight("q"), x[t]), t));
    k.push_back(turned(times(weight("k"), x[t]), t));
    v.push_back(times(weight("v"), x[t]));
  }
  for (size_t t = 0; t < x.size(); ++t)
    out.push_back(times(weight("o"), mixture_of_values(q[t], k, v, heads, causal ? t + 1 : x.size())));
  return out;
}

Vector swiglu(const Model& model, const std::string& bank, int64_t expert, const Vector& x) {
  Vector hidden = times(parameter_of(model, bank + "w_gate")[expert], x);
  const Vector up = times(parameter_of(model, bank + "w_up")[expert], x);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] *= up[i] / (1 + std::exp(-hidden[i]));
  return times(parameter_of(model, bank + "w_down")[expert], hidden);
}

Vector softmax_top2(const Model& model, const std::string& moe, const Vector& x) {
  Vector prob = times(parameter_of(model, moe + "router.weight"), x);
  double total = 0;
  for (double& p : prob) total += p = std::exp(p);
  std::vector<size_t> order(prob.size());
  for (size_t e = 0; e < order.size(); ++e) order[e] = e;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return prob[a] > prob[b]; });
  Vector y(x.size(), 0.0);
  for (const size_t e : {order[0], order[1]}) {
    const Vector part = swiglu(model, moe + "experts.", static_cast<int64_t>(e), x);
    for (size_t i = 0; i < y.size(); ++i) y[i] += prob[e] / total * part[i];
  }
  return y;
}

}  // namespace moelab::test
