// When a layer validates the plans of its router: always in evaluation, in training at the first step and where it is told to.
#include "core/moe_layer.h"

#include "core/error.h"
#include "core/layer_tables.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <catch2/catch_test_macros.hpp>

namespace moelab::test {
namespace {

// Its plans lack the last expert's column of alpha from step 3 on.
class ShrinkingRouter : public Router {
 public:
  using Router::Router;
  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const int64_t experts = spec_.max_experts - (in.step >= 3 ? 1 : 0);
    RouteOutput out;
    out.plan = MergePlan{.alpha_GE = at::full({1, experts}, 1.0 / static_cast<double>(experts), in.x_TD.scalar_type()),
                         .group_of_token_T = at::zeros({in.rows()}, at::kLong)};
    return out;
  }
};

const Registration<RouterEntry> shrinking_registration{{
    .name = "shrinking_for_tests",
    .facts = {.plan = PlanForm::kMerge, .learned = false, .has_scores = false},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<ShrinkingRouter>(std::move(spec)); },
}};

bool refuses(const MoELayer& layer, Mode mode, int64_t step) {
  RouteInput in;
  in.x_TD = at::ones({3, 4});
  in.mode = mode;
  in.step = step;
  RouteState state;
  try {
    layer.decide(in, state);
    return false;
  } catch (const Error& error) {
    return std::string(error.what()).find("alpha") != std::string::npos;
  }
}

TEST_CASE("plans are validated in every evaluation, and in training at the first step and after a change") {
  const Table root = parse_config("[moe.router]\nname = \"shrinking_for_tests\"\n[moe.expert]\nwidth = 2\n", "plans.toml");
  MoELayer layer("moe", read_layer(root, 4, 0, 0, at::kFloat, random_key(0, "init")));
  CHECK_FALSE(refuses(layer, Mode::kTrain, 0));
  CHECK_FALSE(refuses(layer, Mode::kTrain, 5));  // the price of validation is not paid in every step
  CHECK(refuses(layer, Mode::kEval, 5));
  CHECK_FALSE(refuses(layer, Mode::kEval, 2));
  layer.site().checked_step = 5;  // what the trainer sets after an event of step 4, or when it resumes there
  CHECK(refuses(layer, Mode::kTrain, 5));
  CHECK_FALSE(refuses(layer, Mode::kTrain, 6));
}

}  // namespace
}  // namespace moelab::test
