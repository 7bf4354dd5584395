// Recomputation changes no value, no gradient and no counter.
#include "model_fixture.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::test;

namespace {

std::string recomputed_model(const std::string& router, const std::string& dtype) {
  return "[model]\nlayers = 3\nwidth = 8\nheads = 2\ncontext = 12\nmoe_layers = \"1,2\"\ndtype = \"" + dtype +
         "\"\n[moe]\nexperts = 4\n[moe.router]\nname = \"" + router +
         "\"\n[moe.shared]\ncount = 1\nwidth = 3\ngate = true\n[moe.capacity]\nmode = \"factor\"\norder = \"token_major\"\n"
         "[[loss]]\nname = \"balance\"\n[[loss]]\nname = \"z\"\nscope = \"sequence\"\n[[loss]]\nname = \"importance\"\nscope = "
         "\"micro\"\n";
}

struct Outcome {
  double loss;
  std::vector<Tensor> gradients;
};

Outcome outcome_of(const Model& model, const Batch& batch, bool recompute) {
  StepContext context;
  context.seed = 2;
  context.step = 3;
  context.recompute = recompute;
  Outcome outcome{loss_and_gradients(model, batch, context), {}};
  for (const NamedTensor& entry : model.parameters())
    outcome.gradients.push_back(entry.tensor.grad().defined() ? entry.tensor.grad().clone() : Tensor());
  return outcome;
}

void check_bitwise_equal(const Outcome& a, const Outcome& b) {
  CHECK(a.loss == b.loss);
  for (size_t i = 0; i < a.gradients.size(); ++i) {
    REQUIRE(a.gradients[i].defined() == b.gradients[i].defined());
    if (a.gradients[i].defined()) CHECK(at::equal(a.gradients[i], b.gradients[i]));
  }
}

// Autocast around the forward pass, as a trainer switches it.
struct Bfloat16 {
  Bfloat16() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  ~Bfloat16() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
};

}  // namespace

TEST_CASE("with recomputation the loss and every gradient are bitwise those without") {
  Batch batch = random_batch(3, 9);
  batch.length_B = at::tensor({9, 4, 6}, at::kLong);
  for (int64_t b = 0; b < 3; ++b) batch.targets_BL[b].slice(0, batch.length_B[b].item<int64_t>()).fill_(-1);
  for (const std::string router : {"softmax_topk", "noisy_topk", "switch", "gshard"}) {
    for (const std::string dtype : {"float64", "float32"}) {
      INFO(router << " in " << dtype);
      const auto model = model_of(recomputed_model(router, dtype));
      shake(*model);
      check_bitwise_equal(outcome_of(*model, batch, true), outcome_of(*model, batch, false));
    }
  }
}

TEST_CASE("recomputation works where the first block's input needs no gradient") {
  const auto model = model_of(recomputed_model("softmax_topk", "float64"));
  shake(*model);
  parameter_of(*model, "embedding.weight").requires_grad_(false);
  const Batch batch = random_batch(2, 8);
  const Outcome with = outcome_of(*model, batch, true);
  check_bitwise_equal(with, outcome_of(*model, batch, false));
  CHECK(with.gradients[1].defined());
}

TEST_CASE("recomputation replays autocast, which the router's arithmetic never sees") {
  const auto model = model_of(recomputed_model("noisy_topk", "float32"));
  shake(*model);
  const Batch batch = random_batch(2, 8);
  Tensor loss_of[2];
  std::vector<Tensor> gradients[2];
  for (const bool recompute : {false, true}) {
    model->zero_grad();
    StepContext context;
    context.recompute = recompute;
    {
      const Bfloat16 autocast;
      const ModelOutput out = model->forward(batch, context);
      loss_of[recompute] = cross_entropy_sum(out.logits_BLV, batch.targets_BL);
      CHECK(out.sites[0].statistics.at(0).per_scope.at(0).sums.at(0).scalar_type() == at::kFloat);
    }
    loss_of[recompute].backward();
    for (const NamedTensor& entry : model->parameters()) gradients[recompute].push_back(entry.tensor.grad());
  }
  CHECK(at::equal(loss_of[0], loss_of[1]));
  for (size_t i = 0; i < gradients[0].size(); ++i)
    if (gradients[0][i].defined()) CHECK(at::equal(gradients[0][i], gradients[1][i]));
}

TEST_CASE("recomputation counts nothing twice and replays the first pass's selection") {
  const auto model = model_of(recomputed_model("gshard", "float64"));
  shake(*model);
  const Batch batch = random_batch(2, 10);
  StepContext context;
  const ModelOutput plain = model->forward(batch, context);
  context.recompute = true;
  const ModelOutput again = model->forward(batch, context);
  const RoutingRecord before = again.sites[0].record;
  cross_entropy_sum(again.logits_BLV, batch.targets_BL).backward();
  CHECK(again.sites[0].record.chosen_E == before.chosen_E);
  CHECK(before.chosen_E == plain.sites[0].record.chosen_E);
  CHECK(before.dropped == plain.sites[0].record.dropped);
  CHECK(before.entropy_sum == plain.sites[0].record.entropy_sum);
  CHECK(at::equal(again.sites[0].assignment.choice_TK, plain.sites[0].assignment.choice_TK));
}
