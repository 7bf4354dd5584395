// What a layer with the paper's losses and a capacity allocates in one step: no tensor of rows x experts x capacity elements.
#include "core/layer_tables.h"
#include "core/moe_layer.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <algorithm>
#include <memory>

namespace moelab::test {
namespace {

class LargestAllocation : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override { largest = std::max(largest, size); }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t largest = 0;
};

constexpr int64_t kProbeRows = 512, kProbeWidth = 16, kProbeHidden = 32, kProbeExperts = 16;

RouteInput rows_of_a_step(const Tensor& x_TD, const std::shared_ptr<Comm>& comm) {
  RouteInput in;
  in.x_TD = x_TD;
  in.sequence_T = in.sequence_key_T = at::zeros({kProbeRows}, at::kLong);
  in.position_T = at::arange(kProbeRows, at::kLong);
  in.random = random_key(1, "step");
  in.comm = comm.get();
  return in;
}

// Forward, every loss term from its statistics, and backward.
void step(const MoELayer& layer, const RouteInput& in) {
  RouteState state;
  const LayerOutput out = layer.forward(in, state);
  Tensor loss = out.y_TD.sum();
  for (const TermStatistics& statistics : out.statistics) {
    const LossTerm& term = layer.site().losses[statistics.term];
    loss = loss.add(local_value(term, statistics.per_scope, *layer.site().router), term.coefficient);
  }
  loss.backward();
}

TEST_CASE("a step with the paper's losses and a capacity makes no tensor of rows x experts x capacity elements") {
  const std::string router = GENERATE("noisy_topk", "softmax_topk", "switch", "gshard", "vmoe");
  const std::string order = GENERATE("k_major", "token_major");
  CAPTURE(router, order);
  const std::string text = "[moe]\nexperts = 16\n[moe.router]\nname = \"" + router +
                           "\"\n[moe.expert]\nwidth = 32\n[moe.capacity]\nmode = \"factor\"\ntimes_k = true\norder = \"" + order +
                           "\"\n";
  const MoELayer layer("moe", read_layer(parse_config(text, "layer.toml"), kProbeWidth, 0, 0, at::kFloat, random_key(0, "init")));
  REQUIRE_FALSE(layer.site().losses.empty());
  const std::shared_ptr<Comm> comm = single_comm();
  const Tensor x_TD = at::randn({kProbeRows, kProbeWidth}, at::kFloat).requires_grad_();
  const auto probe = std::make_shared<LargestAllocation>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, probe);
    step(layer, rows_of_a_step(x_TD, comm));
  }
  const RouterSpec& spec = layer.site().router->spec();
  const int64_t k = layer.site().router->facts().fixed_k > 0 ? layer.site().router->facts().fixed_k : spec.k();
  const int64_t capacity = spec.train_capacity.places(kProbeRows, kProbeExperts, k);
  CHECK(capacity == kProbeRows * k / kProbeExperts);
  CHECK(probe->largest > 0);
  const int64_t scores_in_double_or_hidden = 8 * kProbeRows * std::max(kProbeExperts, k * kProbeHidden);
  CHECK(probe->largest <= scores_in_double_or_hidden + 64);
  CHECK(probe->largest * 4 <= 4 * kProbeRows * kProbeExperts * capacity);  // far below the forbidden form
}

}  // namespace
}  // namespace moelab::test
