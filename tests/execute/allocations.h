// What a piece of work allocates, seen by LibTorch's own reporting hook.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace moelab::testing {

// Frees are reported as negative sizes.
class AllocationProbe : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    largest = std::max(largest, size);
    peak = std::max(peak, alive += size);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t largest = 0, alive = 0, peak = 0;  // bytes; alive: allocated since the start and not yet freed
};

// `work` may look at the probe while it runs.
template <class Work>
AllocationProbe allocations_of(Work work) {
  const auto probe = std::make_shared<AllocationProbe>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, probe);
  if constexpr (requires { work(*probe); }) work(*probe);
  else work();
  return *probe;
}

}  // namespace moelab::testing
