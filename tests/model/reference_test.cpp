// The forward pass against plain loops in double.
#include "model_fixture.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

using namespace moelab;
using namespace moelab::test;

namespace {

using Vector = std::vector<double>;
using Matrix = std::vector<Vector>;

Vector vector_of(const Tensor& t) {
  const Tensor flat = t.detach().contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
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

Matrix attention(const Model& model, const std::string& block, const Matrix& x, size_t heads) {
  const auto weight = [&](const char* name) { return parameter_of(model, block + "attention." + name); };
  Matrix q, k, v, out;
  for (size_t t = 0; t < x.size(); ++t) {
    q.push_back(rotated(times(weight("q"), x[t]), heads, static_cast<double>(t)));
    k.push_back(rotated(times(weight("k"), x[t]), heads, static_cast<double>(t)));
    v.push_back(times(weight("v"), x[t]));
  }
  const size_t size = x[0].size() / heads;
  for (size_t t = 0; t < x.size(); ++t) {
    Vector mixed(x[0].size(), 0.0);
    for (size_t h = 0; h < heads; ++h) {
      Vector weight_of(t + 1);
      double total = 0;
      for (size_t s = 0; s <= t; ++s) {
        double score = 0;
        for (size_t i = h * size; i < (h + 1) * size; ++i) score += q[t][i] * k[s][i];
        total += weight_of[s] = std::exp(score / std::sqrt(static_cast<double>(size)));
      }
      for (size_t s = 0; s <= t; ++s)
        for (size_t i = h * size; i < (h + 1) * size; ++i) mixed[i] += weight_of[s] / total * v[s][i];
    }
    out.push_back(times(weight("o"), mixed));
  }
  return out;
}

Vector swiglu(const Model& model, const std::string& bank, int64_t expert, const Vector& x) {
  Vector hidden = times(parameter_of(model, bank + "w_gate")[expert], x);
  const Vector up = times(parameter_of(model, bank + "w_up")[expert], x);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] *= up[i] / (1 + std::exp(-hidden[i]));
  return times(parameter_of(model, bank + "w_down")[expert], hidden);
}

// Softmax over all experts, the two best, gates as they are.
Vector routed(const Model& model, const std::string& moe, const Vector& x) {
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

void add_to(Vector& x, const Vector& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

Matrix plain_logits(const Model& model, const Tensor& tokens_L) {
  const Tensor embedding = parameter_of(model, "embedding.weight");
  Matrix x;
  for (int64_t t = 0; t < tokens_L.numel(); ++t) x.push_back(vector_of(embedding[tokens_L[t].item<int64_t>()]));
  for (const std::string block : {"layers.0.", "layers.1."}) {
    Matrix in;
    for (const Vector& row : x) in.push_back(normed(row, parameter_of(model, block + "norm_attention")));
    const Matrix attended = attention(model, block, in, 2);
    const bool dense = block == "layers.0.";
    for (size_t t = 0; t < x.size(); ++t) {
      add_to(x[t], attended[t]);
      const Vector row = normed(x[t], parameter_of(model, block + (dense ? "norm_dense" : "norm_moe")));
      add_to(x[t], dense ? swiglu(model, block + "dense.", 0, row) : routed(model, block + "moe.", row));
    }
  }
  Matrix logits;
  for (const Vector& row : x) logits.push_back(times(embedding, normed(row, parameter_of(model, "norm.weight"))));
  return logits;
}

}  // namespace

TEST_CASE("logits and loss equal plain loops in double") {
  const auto model = model_of(R"(
[model]
layers = 2
width = 8
heads = 2
context = 8
moe_layers = "1"
dense_width = 12
dtype = "float64"
[moe]
experts = 4
[moe.router]
k = 2
[moe.expert]
activation = "swiglu"
width = 5
)");
  shake(*model);
  const Batch batch = random_batch(2, 7);
  StepContext context;
  const ModelOutput out = model->forward(batch, context);
  double loss = 0;
  for (int64_t b = 0; b < 2; ++b) {
    const Matrix plain = plain_logits(*model, batch.tokens_BL[b]);
    Tensor expected_LV = at::empty({7, 11}, at::kDouble);
    for (int64_t t = 0; t < 7; ++t) {
      double total = 0;
      for (int64_t v = 0; v < 11; ++v) {
        expected_LV[t][v] = plain[t][v];
        total += std::exp(plain[t][v]);
      }
      if (b + t > 0) loss += std::log(total) - plain[t][batch.targets_BL[b][t].item<int64_t>()];
    }
    CHECK(relative_error(out.logits_BLV[b].detach(), expected_LV) < 1e-10);
  }
  Tensor targets_BL = batch.targets_BL.clone();
  targets_BL[0][0] = -1;  // nothing to predict there
  CHECK(std::abs(cross_entropy_sum(out.logits_BLV, targets_BL).item<double>() - loss) < 1e-10 * loss);
}
