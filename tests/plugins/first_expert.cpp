// The smallest router of one's own outside the tree: every row takes expert 0.
#include "core/plugin.h"
#include "core/select.h"

#include <ATen/ops/zeros.h>

MOELAB_PLUGIN

namespace moelab {
namespace {

class FirstExpertRouter : public Router {
 public:
  using Router::Router;
  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.x_TD, "x", in);
    return finish_unscored(in, spec_, at::zeros({in.rows(), 1}, at::kLong));
  }
};

const Registration<RouterEntry> registration_first_expert{{
    .name = "first_expert",
    .title = "Every row takes expert 0",
    .citation = "a test's",
    .equation = "y = f_0(x)",
    .facts =
        {.learned = false, .differentiable_gate = false, .permutation_equivariant = false, .fixed_k = 1, .has_scores = false},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<FirstExpertRouter>(std::move(spec)); },
}};

}  // namespace
}  // namespace moelab
