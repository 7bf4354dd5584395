// What a layer allocates: the largest single tensor, and the most bytes alive at a time, seen by LibTorch's own reporting hook.
#include "core/execute.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <memory>

using namespace moelab;
using namespace moelab::testing;

namespace {

// Frees are reported as negative sizes.
class AllocationProbe : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    largest = std::max(largest, size);
    peak = std::max(peak, alive += size);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t largest = 0, alive = 0, peak = 0;  // alive: allocated since the start and not yet freed
};

template <class Work>
AllocationProbe allocations_of(Work work) {
  const auto probe = std::make_shared<AllocationProbe>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, probe);
  work();
  return *probe;
}

template <class Work>
int64_t largest_allocation(Work work) {
  return allocations_of(work).largest;
}

SoftPlan one_sequence(std::mt19937_64& draw, int64_t rows, int64_t slots, const Tensor& x_TD) {
  return {.experts = slots, .slots_per_expert = 1, .query_TD = x_TD, .key_SD = random_leaf(draw, {slots, x_TD.size(1)},
      at::kFloat),
          .scale = random_leaf(draw, {1}, at::kFloat), .sequence_T = at::zeros({rows}, at::kLong), .sequences = 1, .noise_TS = {},
          .noise_key = {}, .position_T = {}, .sequence_key_T = {}};
}

}  // namespace

TEST_CASE("the allocation probe sees a tensor") {
  CHECK(largest_allocation([] { at::empty({1000}, at::kFloat); }) >= 4000);
}

TEST_CASE("no tensor of rows x experts x capacity elements is made, forward or backward") {
  const int64_t rows = 512, experts = 16, k = 2, width = 16, hidden = 32, capacity = rows * k / experts;
  std::mt19937_64 draw(5);
  const SparseCase at_hand = random_sparse_case(draw, rows, experts, k, 0.1, at::kFloat);
  const auto bank = ffn_bank(width, experts, hidden, "gelu", true, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat);
  const int64_t largest = largest_allocation([&] { execute(at_hand.plan, *bank, {.x_TD = x_TD}).sum().backward(); });
  CHECK(largest > 0);
  CHECK(largest <= 4 * rows * k * hidden + 64);             // the hidden rows of all pairs
  CHECK(largest * 10 < 4 * rows * experts * capacity);  // far below the forbidden form
}

TEST_CASE("no tensor of rows x slots elements is made for a soft plan, forward or backward") {
  const int64_t rows = 4096, slots = 512, width = 8;
  std::mt19937_64 draw(6);
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat);
  const SoftPlan plan = one_sequence(draw, rows, slots, x_TD);
  const auto bank = ffn_bank(width, slots, 4, "relu", false, at::kFloat);
  const AllocationProbe probe = allocations_of([&] { execute(plan, *bank, {.x_TD = x_TD}).sum().backward(); });
  CHECK(probe.largest == 4 << 18);             // one block of logits
  CHECK(probe.peak < 4 * rows * slots);        // not even all blocks of the pass together
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

// s·(T(d + (m−1)kf) + y, dx and parameter gradients), here without x, which was there before.
TEST_CASE("forward and backward keep little beside pre-activations, results and gradients") {
  const int64_t rows = 4096, width = 64, hidden = 128, experts = 64, k = 2;
  std::mt19937_64 draw(9);
  const SparseCase at_hand = random_sparse_case(draw, rows, experts, k, 0, at::kFloat);
  const auto bank = ffn_bank(width, experts, hidden, "gelu", false, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kFloat), grad_y_TD = random_leaf(draw, {rows, width}, at::kFloat,
      false);
  const int64_t pairs = at_hand.plan.token_N.numel();
  const auto pass = [&](bool recompute) {
    return allocations_of([&] {
             execute(at_hand.plan, *bank, {.x_TD = x_TD, .recompute = recompute}).backward(grad_y_TD, /*retain_graph=*/true);
             bank->zero_grad();
             x_TD.mutable_grad() = Tensor();
           }).peak;
  };
  const int64_t kept = 4 * pairs * hidden, always = 4 * (rows * width + 2 * rows * width + 2 * experts * width * hidden);
  CHECK(pass(false) <= 1.15 * static_cast<double>(kept + always));
  CHECK(pass(true) <= 1.15 * static_cast<double>(always) + 0.15 * static_cast<double>(kept));
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
             }).alive;
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
