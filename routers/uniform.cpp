// Control: round robin over the experts by position. Every expert gets the same number of rows, and nothing is decided.
//
//   choices of the row at position t: t mod E, (t+1) mod E, …, k of them;  gate = 1/k
//
// Differences from the paper: there is none; a control of this project.
#include "core/linear_router.h"

#include <ATen/ops/arange.h>

namespace moelab {
namespace {

class UniformRouter : public Router {
 public:
  explicit UniformRouter(const RouterSpec& spec) : Router(spec) { require_k_fits(spec); }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    return finish_unscored(in, spec_, in.forced ? in.forced->choice_TK : choices(in));
  }

 private:
  Tensor choices(const RouteInput& in) const {
    const Tensor rank_K = at::arange(spec_.k(), at::kLong);
    return in.position_T.unsqueeze(1).add(rank_K).remainder(spec_.experts);
  }
};

const Registration<RouterEntry> registration_uniform{{
    .name = "uniform",
    .title = "Control: round robin by position",
    .citation = "a control, no paper",
    .equation = "choices of position t: t mod E, …, (t+k-1) mod E;  gate = 1/k",
    .facts = {.learned = false, .differentiable_gate = false, .permutation_equivariant = false,
              .has_scores = false},
    .options = {k_option(1), renormalise_option("none")},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<UniformRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
