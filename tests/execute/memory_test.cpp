// What a layer allocates: the largest single tensor, and the most bytes alive at a time, seen by LibTorch's own reporting hook.
// (training_memory_test.cpp asks the same of a trainer.)
#include "allocations.h"
#include "execute_support.h"
#include "tests/experts/experts_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

template <class Work>
int64_t largest_allocation(Work work) {
  return allocations_of(work).largest;
}

SoftPlan one_sequence(std::mt19937_64& draw, int64_t rows, int64_t slots, const Tensor& x_TD) {
  return {.experts = slots,
          .slots_per_expert = 1,
          .query_TD = x_TD,
          .key_SD = random_leaf(draw, {slots, x_TD.size(1)}, at::kFloat),
          .scale = random_leaf(draw, {1}, at::kFloat),
          .sequence_T = at::zeros({rows}, at::kLong),
          .sequences = 1,
          .noise_TS = {},
          .noise_key = {},
          .position_T = {},
          .sequence_key_T = {}};
}

}  // namespace

TEST_CASE("the allocation probe sees a tensor") {
  CHECK(largest_allocation([] { at::empty({1000}, at::kFloat); }) >= 4000);
}

// Rows x experts x capacity is the size of a padded mask of dispatch. What may be: one row of the widest kind per pair; the
// batched product pads to the longest group, up to twice the rows.
TEST_CASE("no tensor of rows x experts x capacity elements is made, forward or backward, by any executor of any kind") {
  constexpr int64_t rows = 2048, experts = 16, k = 2, width = 16, capacity = rows * k / experts;
  struct Kind {
    const char* name;
    std::unique_ptr<ExpertBank> bank;
    int64_t widest;  // numbers of a pair in the widest tensor
  };
  const GivenOptions gelu{{"activation", std::string("gelu")}, {"width", int64_t{32}}};
  std::vector<int64_t> widths;
  for (int64_t e = 0; e < experts; ++e) widths.push_back(8 + 8 * (e % 4));
  std::vector<Kind> kinds;
  kinds.push_back({"ffn", bank_of("ffn", width, experts, gelu, at::kFloat), 32});
  kinds.push_back({"unequal widths", bank_of("ffn", width, experts, {{"widths", widths}}, at::kFloat), 32});
  kinds.push_back({"lora", bank_of("lora", width, experts, {{"width", int64_t{32}}}, at::kFloat), 32});
  kinds.push_back({"conv", bank_of("conv", width, experts, {{"width", int64_t{8}}}, at::kFloat), 4 * 8});
  kinds.push_back({"constant", bank_of("constant", width, experts, {}, at::kFloat), 2 * experts});
  kinds.push_back(
      {"mixed", mixed_bank({{"ffn", 8, gelu}, {"identity", 3}, {"zero", 3}, {"constant", 2}}, width, at::kFloat), 32});
  std::mt19937_64 draw(5);
  const SparseCase sparse = random_sparse_case(draw, rows, experts, k, 0.1, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat);
  const int64_t pairs = sparse.plan.token_N.numel(), forbidden = 4 * rows * experts * capacity;
  for (const Kind& kind : kinds)
    for (const ExecutorUse& use : kUses) {
      const int64_t largest = largest_allocation([&] {
        execute(sparse.plan, *kind.bank, {.x_TD = x_TD, .recompute = use.recompute}, use.execution).sum().backward({}, true);
      });
      const int64_t padding = use.execution == Execution::kBmm ? 2 : 1;
      CAPTURE(kind.name, use.name, largest);
      CHECK(largest > 0);
      CHECK(largest <= padding * 4 * std::max(pairs, rows) * kind.widest + 64);
      CHECK(10 * largest < forbidden);
    }
}

TEST_CASE("no tensor of rows x slots elements is made for a soft plan, forward or backward") {
  const int64_t rows = 4096, slots = 512, width = 8;
  std::mt19937_64 draw(6);
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat);
  const SoftPlan plan = one_sequence(draw, rows, slots, x_TD);
  const auto bank = ffn_bank(width, slots, 4, "relu", false, at::kFloat);
  const AllocationProbe probe = allocations_of([&] { execute(plan, *bank, {.x_TD = x_TD}).sum().backward(); });
  CHECK(probe.largest == 4 << 18);       // one block of logits
  CHECK(probe.peak < 4 * rows * slots);  // not even all blocks of the pass together
  CHECK(largest_allocation([&] { execute_reference(plan, *bank, {.x_TD = x_TD}); }) >= 4 * rows * slots);
}

TEST_CASE("merging for many groups holds a few copies of an expert at a time, forward and backward") {
  const int64_t groups = 64, experts = 4, width = 32, hidden = 256, copy = 4 * 2 * width * hidden;
  std::mt19937_64 draw(8);
  const auto bank = ffn_bank(width, experts, hidden, "relu", false, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {2 * groups, width}, at::kFloat),
               score_GE = random_leaf(draw, {groups, experts}, at::kFloat);
  const MergePlan plan{.alpha_GE = score_GE.softmax(1), .group_of_token_T = at::arange(2 * groups, at::kLong).remainder(groups)};
  const AllocationProbe probe = allocations_of([&] { execute(plan, *bank, {.x_TD = x_TD}).sum().backward(); });
  CHECK(probe.peak < 24 * copy);  // 4 gradients of experts, 4 merged, their gradients in parts and together
}

// Bytes alive at most in forward and backward, without x, which was there before.
int64_t peak_of(const SparsePlan& plan, const ExpertBank& bank, const Tensor& x_TD, const Tensor& grad_y_TD,
                const ExecutorUse& use = {"auto", Execution::kAuto}) {
  return allocations_of([&] {
           const ExecuteInput input{.x_TD = x_TD, .recompute = use.recompute};
           execute(plan, bank, input, use.execution).backward(grad_y_TD, /*retain_graph=*/true);
           bank.zero_grad();
           x_TD.mutable_grad() = Tensor();
         })
      .peak;
}

int64_t bytes_of_parameters(const ExpertBank& bank) {
  int64_t bytes = 0;
  for (const NamedTensor& entry : bank.parameters()) bytes += 4 * entry.tensor.numel();
  return bytes;
}

// s·(T(d + (m−1)kf) + y, dx and parameter gradients), m matrices of an expert.
TEST_CASE("forward and backward keep little beside pre-activations, results and gradients") {
  const int64_t rows = 4096, width = 64, hidden = 128, experts = 64, k = 2;
  std::mt19937_64 draw(9);
  const SparseCase sparse = random_sparse_case(draw, rows, experts, k, 0, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat),
               grad_y_TD = random_leaf(draw, {rows, width}, at::kFloat, false);
  for (const bool gated : {false, true}) {
    const auto bank = ffn_bank(width, experts, hidden, gated ? "swiglu" : "gelu", false, at::kFloat);
    const int64_t kept = 4 * sparse.plan.token_N.numel() * hidden * (gated ? 2 : 1),
                  always = 4 * 3 * rows * width + bytes_of_parameters(*bank);
    CAPTURE(gated, kept, always);
    CHECK(peak_of(sparse.plan, *bank, x_TD, grad_y_TD) <= 1.15 * static_cast<double>(kept + always));
    CHECK(peak_of(sparse.plan, *bank, x_TD, grad_y_TD, kUses[1]) <=
          1.15 * static_cast<double>(always) + 0.15 * static_cast<double>(kept));
  }
}

// Of each pair its expert's own pre-activations, and no copy of a row.
TEST_CASE("forward and backward of unequal widths and of mixed kinds keep no rows of pairs") {
  const int64_t rows = 4096, width = 64, experts = 32, k = 2;
  std::mt19937_64 draw(11);
  const SparseCase sparse = random_sparse_case(draw, rows, experts, k, 0, at::kFloat);
  const auto* offset = sparse.plan.offsets_E1.const_data_ptr<int64_t>();
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat),
               grad_y_TD = random_leaf(draw, {rows, width}, at::kFloat, false);
  const GivenOptions gelu{{"activation", std::string("gelu")}, {"width", int64_t{128}}};
  std::vector<int64_t> widths;
  int64_t unequal_kept = 0, mixed_kept = 0;
  for (int64_t e = 0; e < experts; ++e) {
    widths.push_back(64 + 32 * (e % 4));
    unequal_kept += 4 * (offset[e + 1] - offset[e]) * widths.back();
    if (e < 28) mixed_kept += 4 * (offset[e + 1] - offset[e]) * 128;
  }
  const auto unequal = bank_of("ffn", width, experts, {{"widths", widths}}, at::kFloat);
  const auto mixed = mixed_bank({{"ffn", 28, gelu}, {"zero", 1}, {"identity", 1}, {"constant", 2}}, width, at::kFloat);
  const int64_t always = 4 * 3 * rows * width;
  const auto check = [&](const ExpertBank& bank, int64_t kept, int64_t more) {
    const int64_t peak = peak_of(sparse.plan, bank, x_TD, grad_y_TD), least = kept + always + more + bytes_of_parameters(bank);
    CAPTURE(bank.name(), peak, least);
    CHECK(peak <= 1.15 * static_cast<double>(least));
    CHECK(peak < peak_of(sparse.plan, bank, x_TD, grad_y_TD, kUses[2]));
  };
  check(*unequal, unequal_kept, 0);
  check(*mixed, mixed_kept, 4 * 2 * rows * width);  // parts of y, and of dx, before they are added
}

TEST_CASE("200 training steps of each plan form leave as many bytes alive as 10") {
  std::mt19937_64 draw(10);
  const auto bank = ffn_bank(8, 6, 16, "swiglu", true, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {64, 8}, at::kFloat);
  const SparseCase sparse = random_sparse_case(draw, 64, 6, 2, 0.1, at::kFloat);
  const MergePlan merge{.alpha_GE = random_leaf(draw, {8, 6}, at::kFloat),
                        .group_of_token_T = at::arange(64, at::kLong).remainder(8)};
  for (const Plan& plan : {Plan(sparse.plan), Plan(one_sequence(draw, 64, 6, x_TD)), Plan(merge)}) {
    const auto after = [&](int steps) {
      return allocations_of([&] {
               for (int i = 0; i < steps; ++i) {
                 execute(plan, *bank, {.x_TD = x_TD}).sum().backward({}, /*retain_graph=*/true);
                 const at::NoGradGuard no_grad;
                 for (const NamedTensor& entry : bank->parameters()) entry.tensor.sub_(entry.tensor.grad(), 1e-3);
               }
             })
          .alive;
    };
    after(1);  // gradients come to life
    CHECK(after(10) == after(200));
  }
}

TEST_CASE("the reference executor's dense matrices are seen by the probe") {
  std::mt19937_64 draw(5);
  const SparseCase at_hand = random_sparse_case(draw, 256, 4, 2, 0, at::kFloat);
  const auto bank = ffn_bank(4, 4, 4, "relu", false, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {256, 4}, at::kFloat);
  const int64_t dense = 4 * 256 * at_hand.plan.token_N.numel();
  CHECK(largest_allocation([&] { execute_reference(at_hand.plan, *bank, {.x_TD = x_TD}); }) >= dense);
}
