// Executors of feed-forward experts: the reference's values and gradients at odd widths and over several blocks, the same bits on
// any number of threads, nothing for frozen tensors. (sweep_test.cpp holds every kind of experts to the reference.)
#include "execute_support.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

#include <limits>

using namespace moelab;
using namespace moelab::testing;

namespace {

struct FfnCase {
  PlanCase at;
  std::unique_ptr<ExpertBank> bank;
  Tensor grad_y_TD;
};

FfnCase ffn_case(std::mt19937_64& draw, const SparseCase& sparse, int64_t width, int64_t hidden, const char* activation,
                 bool bias, at::ScalarType dtype) {
  FfnCase all{.at = {sparse.plan, random_leaf(draw, {sparse.plan.rows, width}, dtype), {sparse.gate_TK}},
              .bank = ffn_bank(width, sparse.plan.experts, hidden, activation, bias, dtype),
              .grad_y_TD = {}};
  all.grad_y_TD = random_leaf(draw, all.at.x_TD.sizes().vec(), dtype, false);
  return all;
}

// Every third width is odd, where vector loops have a rest and the library's grouped product is refused.
void check_sparse_plans(uint64_t seed, at::ScalarType dtype, double tolerance) {
  static const char* const activations[] = {"relu", "gelu", "gelu_tanh", "swiglu"};
  std::mt19937_64 draw(seed);
  for (int i = 0; i < 250; ++i) {
    const SparseCase sparse = sparse_of_kind(draw, i, between(draw, 3, 12), 96, dtype);
    const int64_t width = 4 * between(draw, 1, 5) - (i % 3 == 0), hidden = 4 * between(draw, 1, 6);
    const FfnCase one = ffn_case(draw, sparse, width, hidden, activations[i % 4], i % 2 == 0, dtype);
    validate(one.at.plan, sparse.plan.rows, sparse.plan.experts);
    const auto plain = reference_outcomes(one.at, *one.bank, one.grad_y_TD);
    for (const ExecutorUse& use : kUses) {
      INFO("plan " << i << ", " << use.name);
      REQUIRE(worst_of(outcomes(one.at, *one.bank, one.grad_y_TD, use), plain) <= tolerance);
    }
  }
}

}  // namespace

TEST_CASE("a NaN in a result is no agreement, whatever stands before or behind it") {
  const Tensor good = at::ones({3}, at::kDouble), bad = at::ones({3}, at::kDouble);
  bad[1] = std::numeric_limits<double>::quiet_NaN();
  CHECK(worst_of({good, good}, {good, good}) == 0);
  CHECK_FALSE(worst_of({good, bad}, {good, good}) <= 1e300);
  CHECK_FALSE(worst_of({bad, good}, {good, good}) <= 1e300);
  CHECK_FALSE(worst_of({bad}, {bad}) <= 1e300);
  CHECK_FALSE(worst_of({good}, {bad}) <= 1e300);
  CHECK_FALSE(worst_of({good}, {good, good}) <= 1e300);
}

TEST_CASE("a NaN that an executor makes is seen: one bad weight reaches y and is found") {
  std::mt19937_64 draw(15);
  const FfnCase one = ffn_case(draw, random_sparse_case(draw, 12, 3, 2, 0, at::kDouble), 4, 4, "gelu", false, at::kDouble);
  const auto plain = reference_outcomes(one.at, *one.bank, one.grad_y_TD);
  CHECK(worst_of(outcomes(one.at, *one.bank, one.grad_y_TD, kUses[0]), plain) <= 1e-10);
  const int64_t busy = std::get<SparsePlan>(one.at.plan).expert_N[0].item<int64_t>();
  {
    const at::NoGradGuard no_grad;
    one.bank->parameters_of(busy)[0].select(0, 0).fill_(std::numeric_limits<double>::quiet_NaN());
  }
  for (const ExecutorUse& use : kUses) CHECK_FALSE(worst_of(outcomes(one.at, *one.bank, one.grad_y_TD, use), plain) <= 1e300);
}

TEST_CASE("every executor equals the reference on 250 wider plans of feed-forward experts in double") {
  check_sparse_plans(20170123, at::kDouble, 1e-10);
}

TEST_CASE("every executor equals the reference on 250 wider plans of feed-forward experts in float") {
  check_sparse_plans(20200630, at::kFloat, 1e-5);
}

TEST_CASE("soft plans: rows of a sequence that fill several blocks equal the reference") {
  std::mt19937_64 draw(62);
  PlanCase at = soft_case(draw, 0, 3, 3, at::kDouble);
  auto& plan = std::get<SoftPlan>(at.plan);
  const int64_t rows = 2600;
  at.x_TD = random_leaf(draw, {rows, 3}, at::kDouble);
  plan.query_TD = random_leaf(draw, {rows, 3}, at::kDouble);
  plan.dispatch = plan.combine = SlotWeights::kSoft;
  plan.sequence_T = plan.sequence_key_T = at::zeros({rows}, at::kLong);
  plan.position_T = at::arange(rows, at::kLong);
  plan.sequences = 1;
  at.leaves = {plan.key_SD, plan.scale, plan.query_TD};
  const auto bank = ffn_bank(3, 3, 4, "gelu", true, at::kDouble);
  const Tensor grad_y_TD = random_leaf(draw, {rows, 3}, at::kDouble, false);
  CHECK(worst_of(outcomes(at, *bank, grad_y_TD, kUses[0]), reference_outcomes(at, *bank, grad_y_TD)) <= 1e-10);
}

TEST_CASE("frozen weights, rows and gates get no gradient, and the others' stay what they were") {
  std::mt19937_64 draw(65);
  const FfnCase one = ffn_case(draw, random_sparse_case(draw, 30, 4, 2, 0, at::kDouble), 6, 8, "gelu", true, at::kDouble);
  const auto all = outcomes(one.at, *one.bank, one.grad_y_TD, kUses[0]);
  one.bank->parameters()[0].tensor.requires_grad_(false);
  one.at.x_TD.requires_grad_(false);
  const auto some = outcomes(one.at, *one.bank, one.grad_y_TD, kUses[0]);
  for (size_t i = 0; i < all.size(); ++i) {
    const bool frozen = i == 2 || i + 1 == all.size();  // y, the gates, the parameters, x
    CHECK(at::equal(some[i], frozen ? at::zeros_like(all[i]) : all[i]));
  }
}

TEST_CASE("words and executions are one list") {
  CHECK(execution_of("auto") == Execution::kAuto);
  CHECK(execution_of("loop") == Execution::kLoop);
  CHECK(execution_of("grouped") == Execution::kGrouped);
  CHECK(execution_of("bmm") == Execution::kBmm);
  CHECK(execution_of("reference") == Execution::kReference);
}
