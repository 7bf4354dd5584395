// The forward pass against plain loops in double.
#include "model_fixture.h"
#include "plain_layers.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::test;

namespace {

Matrix plain_logits(const Model& model, const Tensor& tokens_L) {
  const Tensor embedding = parameter_of(model, "embedding.weight");
  Matrix x;
  for (int64_t t = 0; t < tokens_L.numel(); ++t) x.push_back(vector_of(embedding[tokens_L[t].item<int64_t>()]));
  for (const std::string block : {"layers.0.", "layers.1."}) {
    Matrix in;
    for (const Vector& row : x) in.push_back(normed(row, parameter_of(model, block + "norm_attention")));
    const Matrix attended = plain_attention(model, block, in, 2, /*causal=*/true);
    const bool dense = block == "layers.0.";
    for (size_t t = 0; t < x.size(); ++t) {
      add_to(x[t], attended[t]);
      const Vector row = normed(x[t], parameter_of(model, block + (dense ? "norm_dense" : "norm_moe")));
      add_to(x[t], dense ? swiglu(model, block + "dense.", 0, row) : softmax_top2(model, block + "moe.", row));
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
