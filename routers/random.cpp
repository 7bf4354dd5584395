// Control: every row draws its experts at random, in training and in evaluation, and keeps no memory of them.
//
//   k = 1: e ~ U{0, …, E-1};  k > 1: a uniform draw of k different experts;  gate = 1/k
//
// A draw depends on the row's sequence and position and on the pass's key, so that evaluating twice gives the same.
//
// Differences from the paper: there is none; a control of this project.
#include "core/error.h"
#include "core/linear_router.h"

#include <fmt/format.h>

namespace moelab {
namespace {

// An outside program's draw: int64 [T], or [T,K] with k different experts per row.
Tensor given_experts(const RouteInput& in, int64_t experts, int64_t k) {
  if (in.noise.numel() != in.rows() * k || in.noise.scalar_type() != at::kLong)
    usage_error(fmt::format("noise of the router 'random' is the drawn expert, int64 [{}]", k == 1 ? "T" : "T,k"));
  const Tensor choice_TK = in.noise.reshape({in.rows(), k});
  if (choice_TK.lt(0).logical_or(choice_TK.ge(experts)).any().item<bool>())
    usage_error(fmt::format("noise of the router 'random' names an expert outside 0 … {}", experts - 1));
  const Tensor sorted_TK = std::get<0>(choice_TK.sort(1));
  if (sorted_TK.slice(1, 1).eq(sorted_TK.slice(1, 0, k - 1)).any().item<bool>())
    usage_error("noise of the router 'random' gives a row the same expert twice");
  return choice_TK;
}

// The k largest of E independent uniforms are a uniform draw without replacement.
Tensor drawn_experts(const RouteInput& in, int64_t experts, int64_t k) {
  const Tensor draw_TE = uniform_rows(in.random.with("expert"), in.sequence_key_T, in.position_T, experts, at::kDouble);
  return stable_topk(draw_TE, k);
}

class RandomRouter : public Router {
 public:
  explicit RandomRouter(const RouterSpec& spec) : Router(spec) { require_k_fits(spec); }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    return finish_unscored(in, spec_, choices(in));
  }

 private:
  Tensor choices(const RouteInput& in) const {
    if (in.forced) return in.forced->choice_TK;
    return in.noise.defined() ? given_experts(in, spec_.experts, spec_.k()) : drawn_experts(in, spec_.experts, spec_.k());
  }
};

const Registration<RouterEntry> registration_random{{
    .name = "random",
    .title = "Control: experts drawn at random, row by row",
    .citation = "a control, no paper",
    .equation = "e ~ U{0, …, E-1}, k of them without replacement;  gate = 1/k",
    .facts = {.learned = false, .noisy_in_training = true, .random_in_eval = true, .differentiable_gate = false,
              .permutation_equivariant = false,
              .has_scores = false},
    .options = {k_option(1), renormalise_option("none")},
    .noise_shape = "int64 expert [T] ([T,k] with k > 1)",
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<RandomRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
