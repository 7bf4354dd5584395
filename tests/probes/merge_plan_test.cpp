// Probe: a merge plan. Rows of a group run through one expert whose parameters are a mixture of all.
#include "core/execute.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

TEST_CASE("a merge plan runs each group through the mixture of its experts' parameters") {
  std::mt19937_64 draw(23);
  const int64_t groups = 3, experts = 4, rows = 7, width = 3;
  const auto bank = ffn_bank(width, experts, 5, "gelu", true, at::kDouble);
  const Tensor scores_GE = random_leaf(draw, {groups, experts}, at::kDouble),
               x_TD = random_leaf(draw, {rows, width}, at::kDouble);
  const Tensor group_T = at::tensor({2, 0, 0, 2, 1, 0, 2}, at::kLong);  // groups need not be contiguous
  const MergePlan plan{.alpha_GE = scores_GE.softmax(1), .group_of_token_T = group_T};
  validate(plan, rows, experts);
  const Tensor y_TD = execute(plan, *bank, {.x_TD = x_TD});
  y_TD.square().sum().backward();

  std::vector<Tensor> grads{scores_GE.grad().clone(), x_TD.grad().clone()};
  for (const NamedTensor& entry : bank->parameters()) grads.push_back(entry.tensor.grad().clone());
  bank->zero_grad();
  scores_GE.mutable_grad() = Tensor(), x_TD.mutable_grad() = Tensor();

  // Row by row, with the formula of the expert written out.
  const auto parameters = bank->parameters();
  const Tensor alpha_GE = scores_GE.softmax(1);
  std::vector<Tensor> outputs;
  for (int64_t t = 0; t < rows; ++t) {
    const Tensor alpha_E = alpha_GE[group_T[t].item<int64_t>()];
    std::vector<Tensor> mixed;
    for (const NamedTensor& entry : parameters) {
      Tensor sum = at::zeros_like(entry.tensor[0]);
      for (int64_t e = 0; e < experts; ++e) sum = sum + alpha_E[e] * entry.tensor[e];
      mixed.push_back(sum);
    }
    outputs.push_back(mixed[2].mv(at::gelu(mixed[0].mv(x_TD[t]) + mixed[1])) + mixed[3]);
  }
  const Tensor expected_TD = at::stack(outputs);
  expected_TD.square().sum().backward();
  CHECK(relative_error(y_TD, expected_TD) < 1e-10);
  CHECK(relative_error(grads[0], scores_GE.grad()) < 1e-10);
  CHECK(relative_error(grads[1], x_TD.grad()) < 1e-10);
  for (size_t i = 0; i < parameters.size(); ++i) CHECK(relative_error(grads[2 + i], parameters[i].tensor.grad()) < 1e-10);
}
