#include "core/linear_router.h"

#include "core/error.h"

#include <ATen/ops/zeros.h>

#include <fmt/format.h>

namespace moelab {
namespace {

// Far below any logit, so that the probability is exactly 0; finite, so that p·log p and the gradient of a noise scale are too.
constexpr double kInactiveLogit = -1e9;

Tensor initial_mask(const RouterSpec& spec) {
  Tensor mask_E = at::zeros({spec.max_experts}, spec.dtype);
  mask_E.slice(0, 0, spec.experts).fill_(1);
  return mask_E;
}

// Looks at x only when the logits are broken: a non-finite x never gives finite logits, not even with zero weights.
void require_finite_logits(const RouteInput& in, const Tensor& logits_TE) {
  if (logits_TE.numel() == 0 || logits_TE.detach().isfinite().all().item<bool>()) return;
  require_finite(in.routed(), "x", in);
  require_finite(logits_TE, "logits", in);
}

}  // namespace

LinearRouter::LinearRouter(RouterSpec spec, Tensor weight_ED, NoiseSpec noise, bool trainable)
    : Router(std::move(spec)), noise_(noise) {
  require_k_fits(spec_);
  weight_ED_ = add_parameter("weight", std::move(weight_ED), trainable);
  if (spec_.max_experts > spec_.experts) mask_E_ = add_buffer("mask", initial_mask(spec_));
}

RouterFacts LinearRouter::facts() const {
  RouterFacts facts = Router::facts();
  facts.noisy_in_training = noise_.kind != NoiseSpec::Kind::kNone;
  return facts;
}

Tensor LinearRouter::active_experts_E() const { return mask_E_.defined() ? mask_E_.ne(0) : Tensor(); }

NoisyLogits LinearRouter::score(const RouteInput& in) const { return checked(in, noisy_logits(in, weight_ED_, noise_)); }

NoisyLogits LinearRouter::checked(const RouteInput& in, NoisyLogits logits) const {
  require_finite_logits(in, logits.clean_TE);
  if (!logits.noisy_TE.is_same(logits.clean_TE)) require_finite_logits(in, logits.noisy_TE);
  if (!mask_E_.defined()) return logits;
  const Tensor inactive_E = mask_E_.eq(0);
  logits.clean_TE = logits.clean_TE.masked_fill(inactive_E, kInactiveLogit);
  logits.noisy_TE = logits.noisy_TE.masked_fill(inactive_E, kInactiveLogit);
  if (logits.std_TE.defined()) logits.std_TE = logits.std_TE.masked_fill(inactive_E, 1);
  return logits;
}

Tensor LinearRouter::choose(const RouteInput& in, const Tensor& score_TE, int64_t k) const {
  const Tensor choice_TK = chosen_topk(in, score_TE, k);
  if (!mask_E_.defined() || in.forced) return choice_TK;
  const Tensor inactive_TK = mask_E_.eq(0).index_select(0, choice_TK.reshape({-1})).view_as(choice_TK);
  return choice_TK.masked_fill(inactive_TK, -1);
}

RouteOutput LinearRouter::route_topk(const RouteInput& in, const NoisyLogits& logits, int64_t k, SoftmaxOver gates) const {
  const bool chosen_apart = mask_E_.defined() || in.forced;  // the probabilities' bits must not depend on who chose
  const SoftmaxTopk top = softmax_topk(logits.noisy_TE, chosen_apart ? 0 : k);
  const Tensor choice_TK = chosen_apart ? choose(in, logits.noisy_TE, k) : top.choice_TK;
  const Tensor prob_TK = chosen_apart ? gather_choices(top.probs_TE, choice_TK) : top.prob_TK;
  const Tensor gate_TK = gates == SoftmaxOver::kAll ? prob_TK : softmax_of_choices(logits.noisy_TE, choice_TK);
  return finish_sparse(in, spec_, {choice_TK, gate_TK, prob_TK, {}}, scores_of(logits, top.probs_TE));
}

Scores scores_of(const NoisyLogits& logits, const Tensor& gate_TE) {
  const Tensor loss_TE = logits.noisy_TE.is_same(logits.clean_TE) ? gate_TE : logits.clean_TE.softmax(1);
  return {logits.noisy_TE, gate_TE, loss_TE, logits.clean_TE, logits.noisy_TE, logits.std_TE};
}

NoiseSpec resolved_noise(NoiseSpec noise, NoiseSpec::Kind paper) {
  if (noise.kind == NoiseSpec::Kind::kPaper) noise.kind = paper;
  return noise;
}

void require_k_fits(const RouterSpec& spec) {
  if (spec.options.declared("k") && spec.k() > spec.experts)
    usage_error(fmt::format("[moe.router] k = {} is more than experts = {}", spec.k(), spec.experts));
}

}  // namespace moelab
