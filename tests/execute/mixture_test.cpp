// The fast paths of soft and merge plans against the reference executor: outputs and every gradient.
#include "core/execute.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>

using namespace moelab;
using namespace moelab::testing;

namespace {

// y, then the gradients of a fixed mixture of it with respect to the leaves and the bank's parameters.
std::vector<Tensor> mixture_values(const Plan& plan, const ExpertBank& bank, const Tensor& x_TD, std::vector<Tensor> leaves,
                                   Execution execution) {
  for (const NamedTensor& entry : bank.parameters()) leaves.push_back(entry.tensor);
  leaves.push_back(x_TD);
  for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  std::vector<Tensor> values{execute(plan, bank, {.x_TD = x_TD}, execution)};
  const Tensor grad_y_TD = at::arange(values[0].numel(), at::kDouble).sin().view(values[0].sizes());
  values[0].backward(grad_y_TD, /*retain_graph=*/true);
  for (const Tensor& leaf : leaves) values.push_back(leaf.grad().clone());
  return values;
}

void check_mixture(const Plan& plan, const ExpertBank& bank, const Tensor& x_TD, const std::vector<Tensor>& leaves) {
  const auto fast = mixture_values(plan, bank, x_TD, leaves, Execution::kAuto);
  const auto plain = mixture_values(plan, bank, x_TD, leaves, Execution::kReference);
  for (size_t i = 0; i < plain.size(); ++i) CHECK(relative_error(fast[i], plain[i]) < 1e-10);
}

}  // namespace

TEST_CASE("merge plans: the fast path equals the reference, with groups out of order and groups without rows") {
  std::mt19937_64 draw(5);
  for (const char* activation : {"relu", "swiglu"}) {
    const auto bank = ffn_bank(3, 4, 5, activation, true, at::kDouble);
    const Tensor scores_GE = random_leaf(draw, {5, 4}, at::kDouble), x_TD = random_leaf(draw, {9, 3}, at::kDouble);
    const Tensor group_T = at::tensor({4, 0, 0, 4, 1, 0, 4, 3, 1}, at::kLong);
    const MergePlan plan{.alpha_GE = scores_GE.softmax(1), .group_of_token_T = group_T};
    check_mixture(plan, *bank, x_TD, {scores_GE});
  }
}

TEST_CASE("soft plans: the fast path equals the reference over ragged, interleaved and empty sequences, with missing slots") {
  std::mt19937_64 draw(6);
  for (const int64_t present : {6, 4}) {  // of 3 experts with 2 slots each
    const auto bank = ffn_bank(3, 3, 5, "gelu", true, at::kDouble);
    const Tensor x_TD = random_leaf(draw, {8, 3}, at::kDouble), key_SD = random_leaf(draw, {present, 3}, at::kDouble);
    const Tensor scale = random_leaf(draw, {1}, at::kDouble);
    const SoftPlan plan{.experts = 3, .slots_per_expert = 2, .query_TD = x_TD, .key_SD = key_SD, .scale = scale,
                        .sequence_T = at::tensor({3, 0, 3, 1, 0, 3, 3, 0}, at::kLong), .sequences = 4, .noise_TS = {},
                        .noise_key = {}, .position_T = {}, .sequence_key_T = {}};
    check_mixture(plan, *bank, x_TD, {key_SD, scale});
  }
}

TEST_CASE("an expert's weight in the outputs is its columns of C, summed over the rows of every sequence") {
  std::mt19937_64 draw(7);
  const int64_t rows = 1500;  // more than one block
  SoftPlan plan{.experts = 3, .slots_per_expert = 2, .query_TD = random_leaf(draw, {rows, 3}, at::kDouble),
                .key_SD = random_leaf(draw, {4, 3}, at::kDouble), .scale = at::full({1}, 2.0, at::kDouble),
                .sequence_T = at::arange(rows, at::kLong).remainder(5), .sequences = 5, .noise_std = 0.5, .noise_TS = {},
                .noise_key = random_key(1, "noise"), .position_T = at::arange(rows, at::kLong).floor_divide(5),
                .sequence_key_T = at::arange(rows, at::kLong).remainder(5)};
  const auto summed = [&] {
    Tensor sum_S = at::zeros({6}, at::kDouble);
    for (int64_t b = 0; b < plan.sequences; ++b) sum_S.add_(soft_matrices(plan, b).combine_MS.detach().sum(0));
    return sum_S.view({3, 2}).sum(1);
  };
  const Tensor weight_E = expert_weights_E(plan);
  CHECK_FALSE(weight_E.requires_grad());
  CHECK(weight_E[2].item<double>() == 0);  // its slots are not there
  CHECK(relative_error(weight_E, summed()) < 1e-12);
  plan.combine = SlotWeights::kUniform;
  CHECK(relative_error(expert_weights_E(plan), summed()) < 1e-12);
  plan = {.experts = 2, .slots_per_expert = 2, .query_TD = random_leaf(draw, {8, 3}, at::kDouble),
          .key_SD = random_leaf(draw, {4, 3}, at::kDouble), .scale = at::ones({1}, at::kDouble),
          .sequence_T = at::tensor({0, 0, 1, 1, 0, 1, 1, 0}, at::kLong), .sequences = 3, .noise_TS = {}, .noise_key = {},
          .position_T = {}, .sequence_key_T = {}, .combine = SlotWeights::kIdentity};
  CHECK(at::equal(expert_weights_E(plan), at::tensor({4.0, 4.0}, at::kDouble)));
}

// Three rows of (1/4, 3/4) and two of (1, 0).
TEST_CASE("a merge gives each of its rows its mixture, and a sparse plan has none") {
  const MergePlan merge{.alpha_GE = at::tensor({0.25, 0.75, 1.0, 0.0}, at::kDouble).view({2, 2}),
                        .group_of_token_T = at::tensor({0, 1, 1, 0, 0}, at::kLong)};
  CHECK(at::equal(expert_weights_E(merge), at::tensor({2.75, 2.25}, at::kDouble)));
  CHECK_FALSE(expert_weights_E(SparsePlan{}).defined());
}
