// Every executor against the reference, in value and in every gradient, on the same seeded plans.
#include "core/execute.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>

using namespace moelab;
using namespace moelab::testing;

namespace {

struct ExecutorUse {
  const char* name;
  Execution execution;
  bool recompute = false;
};
const ExecutorUse kUses[] = {{"auto", Execution::kAuto},         {"auto, recomputed", Execution::kAuto, true},
                             {"loop", Execution::kLoop},
                             {"grouped", Execution::kGrouped}, {"bmm", Execution::kBmm}};

int64_t between(std::mt19937_64& draw, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(draw);
}

// All rows to one expert, as the second of the choices that the plan keeps.
SparseCase one_takes_all(std::mt19937_64& draw, int64_t rows, int64_t experts, at::ScalarType dtype) {
  const Tensor choice_TK = at::full({rows, 1}, between(draw, 0, experts - 1), at::kLong), all_TK = at::ones({rows, 1}, at::kBool);
  const Tensor gate_TK = random_leaf(draw, {rows, 1}, dtype);
  return {make_sparse_plan({choice_TK, all_TK, all_TK.logical_not()}, gate_TK, experts), gate_TK};
}

// By turns: anything, no rows, one expert for all, every expert for all, rows enough for several blocks.
SparseCase plan_of_kind(std::mt19937_64& draw, int kind, int64_t experts, at::ScalarType dtype) {
  const int64_t rows = between(draw, 1, 96);
  switch (kind % 5) {
    case 1: return random_sparse_case(draw, 0, experts, 1, 0, dtype);
    case 2: return one_takes_all(draw, kind % 25 == 2 ? 700 : rows, experts, dtype);
    case 3: return random_sparse_case(draw, rows, experts, experts, 0, dtype);
    case 4: return random_sparse_case(draw, kind % 25 == 4 ? 900 : rows, std::min<int64_t>(experts, 3), 1, 0.3, dtype);
    default: return random_sparse_case(draw, rows, experts, between(draw, 1, experts), 0.1, dtype);
  }
}

std::vector<Tensor> outcomes(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input, std::vector<Tensor> leaves,
                             const Tensor& grad_y_TD, Execution execution) {
  for (const NamedTensor& entry : bank.parameters()) leaves.push_back(entry.tensor);
  leaves.push_back(input.x_TD);
  for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  std::vector<Tensor> values{execute(plan, bank, input, execution)};
  values[0].backward(grad_y_TD, /*retain_graph=*/true);
  values[0] = values[0].detach();
  for (const Tensor& leaf : leaves) values.push_back(leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf));
  return values;
}

double worst_of(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  double worst = 0;
  for (size_t i = 0; i < b.size(); ++i) worst = std::max(worst, relative_error(a[i], b[i]));
  return worst;
}

void check_sparse_plans(uint64_t seed, at::ScalarType dtype, double tolerance) {
  static const char* const activations[] = {"relu", "gelu", "gelu_tanh", "swiglu"};
  std::mt19937_64 draw(seed);
  for (int i = 0; i < 500; ++i) {
    const SparseCase at_hand = plan_of_kind(draw, i, between(draw, 3, 12), dtype);
    const int64_t width = 4 * between(draw, 1, 5) - (i % 3 == 0), hidden = 4 * between(draw, 1, 6);
    const auto bank = ffn_bank(width, at_hand.plan.experts, hidden, activations[i % 4], i % 2 == 0, dtype);
    const Tensor x_TD = random_leaf(draw, {at_hand.plan.rows, width}, dtype),
        grad_y_TD = random_leaf(draw, x_TD.sizes().vec(), dtype, false);
    validate(at_hand.plan, at_hand.plan.rows, at_hand.plan.experts);
    const auto plain = outcomes(at_hand.plan, *bank, {.x_TD = x_TD}, {at_hand.gate_TK}, grad_y_TD, Execution::kReference);
    for (const ExecutorUse& use : kUses) {
      INFO("plan " << i << ", " << use.name);
      REQUIRE(worst_of(outcomes(at_hand.plan, *bank, {.x_TD = x_TD, .recompute = use.recompute}, {at_hand.gate_TK}, grad_y_TD,
                                use.execution), plain) <= tolerance);
    }
  }
}

// A bank of the same weights in another dtype.
std::unique_ptr<ExpertBank> bank_in(const ExpertBank& bank, int64_t width, int64_t hidden, const char* activation,
                                    at::ScalarType dtype) {
  auto other = ffn_bank(width, bank.experts(), hidden, activation, true, dtype);
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < other->parameters().size(); ++i) other->parameters()[i].tensor.copy_(bank.parameters()[i].tensor);
  return other;
}

struct SoftCase {
  SoftPlan plan;
  Tensor x_TD;
  std::vector<Tensor> leaves;
};

SoftCase soft_case(std::mt19937_64& draw, int64_t rows, int64_t experts, int64_t slots, int64_t width) {
  SoftCase at;
  at.x_TD = random_leaf(draw, {rows, width}, at::kDouble);
  const Tensor key_SD = random_leaf(draw, {(experts - between(draw, 0, 1)) * slots, width}, at::kDouble);
  const Tensor scale = random_leaf(draw, {1}, at::kDouble), query_TD = random_leaf(draw, {rows, width}, at::kDouble);
  const int64_t sequences = between(draw, 1, 4);
  const Tensor sequence_T = at::arange(rows, at::kLong).mul(7).remainder(sequences);
  at.plan = {.experts = experts, .slots_per_expert = slots, .query_TD = query_TD, .key_SD = key_SD, .scale = scale,
             .sequence_T = sequence_T, .sequences = sequences + between(draw, 0, 1), .noise_std = between(draw, 0, 1) ? 0.5 : 0,
             .noise_TS = {}, .noise_key = random_key(3, "noise"), .position_T = at::arange(rows, at::kLong),
                 .sequence_key_T = sequence_T,
             .dispatch = static_cast<SlotWeights>(between(draw, 0, 2)), .combine = static_cast<SlotWeights>(between(draw, 0, 2))};
  at.leaves = {key_SD, scale, query_TD};
  return at;
}

}  // namespace

TEST_CASE("every executor equals the reference on 500 seeded sparse plans in double, in value and gradient") {
  check_sparse_plans(20170123, at::kDouble, 1e-10);
}

TEST_CASE("every executor equals the reference on 500 seeded sparse plans in float, in value and gradient") {
  check_sparse_plans(20200630, at::kFloat, 1e-5);
}

// On the way from an input to a gradient at most 8 values are rounded to bfloat16 (rows, pre-activation, activation, output, sum
// and their like backward), each by up to 2⁻⁹ of itself; what sums over 32 hidden units cancel of it is taken as a factor of 4.
TEST_CASE("bfloat16 executors are within their roundings of the same plan in double") {
  std::mt19937_64 draw(16);
  const double tolerance = 8 * 4 / 512.0;
  for (const char* activation : {"relu", "gelu", "gelu_tanh", "swiglu"}) {
    const SparseCase at_hand = random_sparse_case(draw, 60, 4, 2, 0.1, at::kDouble);
    const auto low = ffn_bank(16, 4, 32, activation, true, at::kBFloat16);
    const auto high = bank_in(*low, 16, 32, activation, at::kDouble);
    const Tensor x_TD = random_leaf(draw, {60, 16}, at::kBFloat16), grad_y_TD = random_leaf(draw, {60, 16}, at::kBFloat16, false);
    const auto exact = outcomes(at_hand.plan, *high, {.x_TD = x_TD.detach().to(at::kDouble).requires_grad_()}, {at_hand.gate_TK},
                                grad_y_TD.to(at::kDouble), Execution::kReference);
    for (const ExecutorUse& use : kUses) {
      INFO(activation << ", " << use.name);
      const auto values = outcomes(at_hand.plan, *low, {.x_TD = x_TD, .recompute = use.recompute}, {at_hand.gate_TK}, grad_y_TD,
                                   use.execution);
      const double worst = worst_of(values, exact);
      CHECK(worst <= tolerance);
      CHECK(worst > 1e-6);  // it was bfloat16
    }
  }
}

TEST_CASE("soft plans of every mode: executors equal the reference over several sequences, with noise and missing slots") {
  std::mt19937_64 draw(61);
  for (int i = 0; i < 60; ++i) {
    const SoftCase at = soft_case(draw, between(draw, 1, 40), 3, between(draw, 1, 3), 4);
    const auto bank = ffn_bank(4, 3, 8, i % 2 ? "swiglu" : "gelu", true, at::kDouble);
    const Tensor grad_y_TD = random_leaf(draw, at.x_TD.sizes().vec(), at::kDouble, false);
    const auto plain = outcomes(at.plan, *bank, {.x_TD = at.x_TD}, at.leaves, grad_y_TD, Execution::kReference);
    for (const ExecutorUse& use : kUses) {
      INFO("plan " << i << ", " << use.name);
      REQUIRE(worst_of(outcomes(at.plan, *bank, {.x_TD = at.x_TD, .recompute = use.recompute}, at.leaves, grad_y_TD,
                                use.execution), plain) <= 1e-10);
    }
  }
}

TEST_CASE("soft plans: rows of a sequence that fill several blocks equal the reference") {
  std::mt19937_64 draw(62);
  SoftCase at = soft_case(draw, 2600, 3, 2, 3);
  at.plan.dispatch = at.plan.combine = SlotWeights::kSoft;
  at.plan.sequence_T.zero_();
  at.plan.sequences = 1;
  const auto bank = ffn_bank(3, 3, 4, "gelu", true, at::kDouble);
  const Tensor grad_y_TD = random_leaf(draw, at.x_TD.sizes().vec(), at::kDouble, false);
  const auto plain = outcomes(at.plan, *bank, {.x_TD = at.x_TD}, at.leaves, grad_y_TD, Execution::kReference);
  CHECK(worst_of(outcomes(at.plan, *bank, {.x_TD = at.x_TD}, at.leaves, grad_y_TD, Execution::kAuto), plain) <= 1e-10);
}

TEST_CASE("merge plans of few and of many groups: executors equal the reference") {
  std::mt19937_64 draw(63);
  for (int i = 0; i < 60; ++i) {
    const int64_t groups = between(draw, 1, 12), rows = between(draw, 1, 40);
    const auto bank = ffn_bank(4, 3, 8, i % 2 ? "swiglu" : "relu", i % 3 == 0, at::kDouble);
    const Tensor score_GE = random_leaf(draw, {groups, 3}, at::kDouble), x_TD = random_leaf(draw, {rows, 4}, at::kDouble);
    const MergePlan plan{.alpha_GE = score_GE.softmax(1), .group_of_token_T = at::arange(rows,
                                                                                         at::kLong).mul(5).remainder(groups)};
    const Tensor grad_y_TD = random_leaf(draw, {rows, 4}, at::kDouble, false);
    const auto plain = outcomes(plan, *bank, {.x_TD = x_TD}, {score_GE}, grad_y_TD, Execution::kReference);
    for (const ExecutorUse& use : kUses) {
      INFO("plan " << i << ", " << use.name);
      REQUIRE(worst_of(outcomes(plan, *bank, {.x_TD = x_TD, .recompute = use.recompute}, {score_GE}, grad_y_TD, use.execution),
                       plain) <= 1e-10);
    }
  }
}

TEST_CASE("a whole layer of feed-forward experts gives the same bits on one, two and three threads") {
  std::mt19937_64 draw(64);
  for (const int kind : {2, 4, 0}) {  // one expert takes all; few experts in several blocks; anything
    const SparseCase at_hand = plan_of_kind(draw, kind == 0 ? 0 : kind, 8, at::kFloat);
    const auto bank = ffn_bank(32, at_hand.plan.experts, 64, "swiglu", true, at::kFloat);
    const Tensor x_TD = random_leaf(draw, {at_hand.plan.rows, 32}, at::kFloat),
        grad_y_TD = random_leaf(draw, x_TD.sizes().vec(), at::kFloat, false);
    const auto on = [&](int threads) {
      at::set_num_threads(threads);
      return outcomes(at_hand.plan, *bank, {.x_TD = x_TD}, {at_hand.gate_TK}, grad_y_TD, Execution::kAuto);
    };
    const auto one = on(1), two = on(2), three = on(3);
    at::set_num_threads(1);
    for (size_t i = 0; i < one.size(); ++i) {
      INFO("plan " << kind << ", tensor " << i);
      CHECK(at::equal(one[i], two[i]));
      CHECK(at::equal(one[i], three[i]));
    }
  }
}

TEST_CASE("frozen weights, rows and gates get no gradient, and the others' stay what they were") {
  std::mt19937_64 draw(65);
  const SparseCase at_hand = random_sparse_case(draw, 30, 4, 2, 0, at::kDouble);
  const auto bank = ffn_bank(6, 4, 8, "gelu", true, at::kDouble);
  const Tensor x_TD = random_leaf(draw, {30, 6}, at::kDouble), grad_y_TD = random_leaf(draw, {30, 6}, at::kDouble, false);
  const auto all = outcomes(at_hand.plan, *bank, {.x_TD = x_TD}, {at_hand.gate_TK}, grad_y_TD, Execution::kAuto);
  bank->parameters()[0].tensor.requires_grad_(false);
  x_TD.requires_grad_(false);
  const auto some = outcomes(at_hand.plan, *bank, {.x_TD = x_TD}, {at_hand.gate_TK}, grad_y_TD, Execution::kAuto);
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
