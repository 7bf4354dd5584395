// What a layer allocates: the largest single tensor, seen by LibTorch's own reporting hook.
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

class LargestAllocation : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override { bytes = std::max(bytes, size); }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t bytes = 0;
};

template <class Work>
int64_t largest_allocation(Work work) {
  const auto probe = std::make_shared<LargestAllocation>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, probe);
  work();
  return probe->bytes;
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

TEST_CASE("the reference executor's dense matrices are seen by the probe") {
  std::mt19937_64 draw(5);
  const SparseCase at_hand = random_sparse_case(draw, 256, 4, 2, 0, at::kFloat);
  const auto bank = ffn_bank(4, 4, 4, "relu", false, at::kFloat);
  const Tensor x_TD = random_leaf(draw, {256, 4}, at::kFloat);
  const int64_t dense = 4 * 256 * at_hand.plan.token_N.numel();
  CHECK(largest_allocation([&] { execute_reference(at_hand.plan, *bank, {.x_TD = x_TD}); }) >= dense);
}
