// Load loss of noisy top-k gating (Shazeer et al. 2017, 1701.06538) and V-MoE (Riquelme et al. 2021, 2106.05974): a smooth
// stand-in for the number of rows per expert.
//
//   CV²(Σ_t P(t,e)),   P(t,e) = Φ((clean_te - threshold_te) / std_te)
//
// P is the probability that e stays among the k chosen if its own noise were drawn again. Conventions of the threshold:
// exclude_self takes the k-th largest noisy logit of the other experts (Shazeer), include_self that of all experts (V-MoE:
// P differs for the chosen experts, whose own noise then sets the bar). The gradient flows through clean logits, noise scale
// and the threshold's value, not through which expert set it. In evaluation, without additive noise and at k = E the rows per
// expert are counted, without gradient. 0 at balance, E/k - 1 at collapse with population variance.
#include "core/losses/parts.h"

#include <ATen/ops/erfc.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>

#include <numbers>

namespace moelab {
namespace {

// Below this the noise is as good as none; dividing by less would overflow in float32 gradients.
constexpr double kSmallestNoise = 1e-12;

// [T,E]: the noisy logit that e has to beat.
Tensor load_threshold(const Tensor& noisy_TE, int64_t k, bool include_self) {
  const Tensor best_TK1 = std::get<0>(noisy_TE.topk(k + 1, 1));
  const Tensor kth_T1 = best_TK1.slice(1, k - 1, k);
  if (include_self) return kth_T1;
  const Tensor next_T1 = best_TK1.slice(1, k, k + 1);
  return at::where(noisy_TE.gt(next_T1), next_T1, kth_T1);
}

class LoadLoss : public VariationLoss {
 public:
  LoadLoss(const Options& options, const RouterEntry& router)
      : VariationLoss(options), include_self_(convention(options, router, "load", "threshold") == "include_self") {}

  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {load_rows(input.in, input.out, input.experts, include_self_)};
  }

 private:
  bool include_self_;
};

const Registration<LossEntry> load_registration{{
    .name = "load",
    .title = "Load loss",
    .citation = "Shazeer et al. 2017, 1701.06538; Riquelme et al. 2021, 2106.05974",
    .equation = "CV²(Σ_t P(t,e)), P = Φ((clean - threshold)/std); rows per expert where there is no noise",
    .coefficient = 0.1,
    .options =
        {
            option("threshold", "exclude_self",
                   "k-th largest noisy logit without or with the expert itself; unless given, as in the router's paper")
                .one_of({"exclude_self", "include_self"}),
            variance_option(),
        },
    .make = [](const Options& options, const RouterEntry& router) { return std::make_unique<LoadLoss>(options, router); },
    .refuses = refuses_without_choices,
}};

}  // namespace

Tensor load_probability(const Scores& scores, int64_t k, bool include_self) {
  const Tensor threshold_TE = load_threshold(scores.noisy_TE, k, include_self);
  const Tensor score_TE = scores.clean_TE.sub(threshold_TE).div(scores.noise_std_TE.clamp_min(kSmallestNoise));
  return score_TE.div(-std::numbers::sqrt2).erfc().div(2);  // Φ(z) = erfc(-z/√2)/2 keeps small probabilities exact
}

Tensor load_rows(const RouteInput& in, const RouteOutput& out, int64_t experts, bool include_self) {
  const bool smooth = in.training() && out.scores.noise_std_TE.defined() && out.k > 0 && out.k < experts;
  if (smooth) return load_probability(out.scores, out.k, include_self);
  return chosen_experts(out.assignment.choice_TK, experts, out.gate_TK.scalar_type());
}

}  // namespace moelab
