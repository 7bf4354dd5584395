// The sparse executor against numbers worked by hand and finite differences. (sweep_test.cpp holds every executor to the
// reference, threads_test.cpp one thread to several.)
#include "core/execute.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

struct Results {
  Tensor y_TD;
  std::vector<Tensor> grads;  // of x, the gates, and every parameter
};

Results run_case(const SparseCase& at_hand, const ExpertBank& bank, const Tensor& x_TD, const Tensor& grad_y_TD,
                 Execution execution) {
  bank.zero_grad();
  for (const Tensor& leaf : {x_TD, at_hand.gate_TK}) leaf.mutable_grad() = Tensor();
  const Tensor y_TD = execute(at_hand.plan, bank, {.x_TD = x_TD}, execution);
  y_TD.backward(grad_y_TD, /*retain_graph=*/true);  // both executors use the graph from gate_TK to the plan
  Results results{.y_TD = y_TD.detach(), .grads = {x_TD.grad(), at_hand.gate_TK.grad()}};
  for (const NamedTensor& entry : bank.parameters()) results.grads.push_back(entry.tensor.grad());
  return results;
}

}  // namespace

TEST_CASE("one row worked by hand: two ReLU experts, one gate each") {
  const auto bank = ffn_bank(1, 2, 1, "relu", false, at::kDouble);
  {
    const at::NoGradGuard no_grad;
    bank->parameters_of(0)[0].fill_(2), bank->parameters_of(0)[1].fill_(3);   // 3·relu(2x)
    bank->parameters_of(1)[0].fill_(-1), bank->parameters_of(1)[1].fill_(5);  // 5·relu(-x)
  }
  const Tensor gate_TK = at::tensor({0.25, 0.5, 0.75, 0.125}, at::kDouble).view({2, 2});
  const Tensor choice_TK = at::tensor({0, 1, 1, 0}, at::kLong).view({2, 2}), all = at::ones({2, 2}, at::kBool);
  const SparsePlan plan = make_sparse_plan({choice_TK, all, all.logical_not()}, gate_TK, 2);
  const Tensor y = execute(plan, *bank, {.x_TD = at::tensor({4.0, -2.0}, at::kDouble).view({2, 1})});
  CHECK(y[0].item<double>() == 0.25 * 3 * 8);   // the second expert's ReLU is shut
  CHECK(y[1].item<double>() == 0.75 * 5 * 2);
}

TEST_CASE("bfloat16 rows are summed in float") {
  std::mt19937_64 draw(11);
  const SparseCase at_hand = random_sparse_case(draw, 64, 4, 4, 0, at::kFloat);
  const Tensor rows_ND = random_leaf(draw, {at_hand.plan.token_N.numel(), 8}, at::kBFloat16, false);
  const Tensor exact = combine_rows(rows_ND.to(at::kFloat), at_hand.plan);
  CHECK(at::equal(combine_rows(rows_ND, at_hand.plan), exact.to(at::kBFloat16)));
}

TEST_CASE("the gradients of the sparse executor are those of central differences") {
  std::mt19937_64 draw(3);
  SparseCase at_hand = random_sparse_case(draw, 9, 4, 2, 0.2, at::kDouble);
  const auto bank = ffn_bank(5, 4, 6, "swiglu", true, at::kDouble);
  const Tensor x_TD = random_leaf(draw, {9, 5}, at::kDouble), grad_y_TD = random_leaf(draw, {9, 5}, at::kDouble, false);
  const Results analytic = run_case(at_hand, *bank, x_TD, grad_y_TD, Execution::kAuto);
  const at::NoGradGuard no_grad;
  // The selection stays; the plan's gates follow gate_TK through slot_TK.
  const auto value = [&] {
    SparsePlan plan = at_hand.plan;
    plan.gate_N = at::empty_like(plan.gate_N);
    const Tensor slot = plan.slot_TK.flatten(), kept = slot.ge(0);
    plan.gate_N.index_put_({slot.masked_select(kept)}, at_hand.gate_TK.flatten().masked_select(kept));
    return execute(plan, *bank, {.x_TD = x_TD}).mul(grad_y_TD).sum().item<double>();
  };
  std::vector<Tensor> leaves{x_TD, at_hand.gate_TK};
  for (const NamedTensor& entry : bank->parameters()) leaves.push_back(entry.tensor);
  for (size_t i = 0; i < leaves.size(); ++i) {
    Tensor numeric = at::zeros_like(leaves[i]);
    double* element = leaves[i].mutable_data_ptr<double>();
    for (int64_t n = 0; n < leaves[i].numel(); ++n) {
      const double kept = element[n], step = 1e-5;
      element[n] = kept + step;
      const double above = value();
      element[n] = kept - step;
      numeric.mutable_data_ptr<double>()[n] = (above - value()) / (2 * step);
      element[n] = kept;
    }
    CHECK(relative_error(analytic.grads[i], numeric) < 1e-7);
  }
}
