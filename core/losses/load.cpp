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
//
// A choice in two levels (Shazeer et al., the appendix on hierarchical mixtures): Σ_t P becomes
//
//   load_ge = (Σ_t P(t,g)) · (Σ_{t on g} P_g(t,e)) / n_g,   n_g = rows t on g: those that chose group g
//
// so that the gradient reaches the first level. Each level counts where it has no noise or takes all; without rows on g it is 0.
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

bool is_smooth(const RouteInput& in, const Scores& scores, int64_t k, int64_t among) {
  return in.training() && scores.noise_std_TE.defined() && k > 0 && k < among;
}

// P(t,e) among the experts of e's own group. [T,E]
Tensor load_inside(const TwoLevels& levels, int64_t groups, bool include_self) {
  const Scores& all = levels.expert;
  const int64_t rows = all.noisy_TE.size(0), size = all.noisy_TE.size(1) / groups;
  const auto by_group = [&](const Tensor& logits_TE) { return logits_TE.reshape({rows * groups, size}); };
  Scores each;
  each.clean_TE = by_group(all.clean_TE);
  each.noisy_TE = by_group(all.noisy_TE);
  each.noise_std_TE = by_group(all.noise_std_TE);
  return load_probability(each, levels.k, include_self).view({rows, groups * size});
}

std::vector<Tensor> load_rows_in_two_levels(const RouteInput& in, const RouteOutput& out, int64_t experts, bool include_self) {
  const TwoLevels& levels = *out.levels;
  const int64_t groups = levels.group.noisy_TE.size(1), size = experts / groups;
  const Tensor& choice_TK = out.assignment.choice_TK;
  const Tensor first_TK = choice_TK.slice(1, 0, choice_TK.size(1), levels.k);  // one expert of each chosen group
  const Tensor on_TG = chosen_experts(first_TK.floor_divide(size), groups, out.gate_TK.scalar_type());
  const bool smooth = is_smooth(in, levels.group, levels.k_groups, groups);
  const Tensor group_TG = smooth ? load_probability(levels.group, levels.k_groups, include_self) : on_TG;
  if (!is_smooth(in, levels.expert, levels.k, size))
    return {group_TG, chosen_experts(choice_TK, experts, on_TG.scalar_type()), on_TG};
  return {group_TG, load_inside(levels, groups, include_self).mul(on_TG.repeat_interleave(size, 1)), on_TG};
}

class LoadLoss : public VariationLoss {
 public:
  LoadLoss(const Options& options, const RouterEntry& router)
      : VariationLoss(options), include_self_(convention(options, router, "load", "threshold") == "include_self") {}

  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return load_rows(input.in, input.out, input.experts, include_self_);
  }

  Tensor value(const LossStatistics& statistics, const Router& router) const override {
    return VariationLoss::value({{load_of(statistics.sums)}, statistics.rows}, router);
  }

 private:
  bool include_self_;
};

const Registration<LossEntry> load_registration{{
    .name = "load",
    .title = "Load loss",
    .citation = "Shazeer et al. 2017, 1701.06538; Riquelme et al. 2021, 2106.05974",
    .equation = "CV²(Σ_t P(t,e)), P = Φ((clean - threshold)/std); rows per expert where there is no noise; in two levels "
                "CV²(load_g · load_e within g / rows on g)",
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
    .needs_noise = true,
}};

}  // namespace

Tensor load_probability(const Scores& scores, int64_t k, bool include_self) {
  const Tensor threshold_TE = load_threshold(scores.noisy_TE, k, include_self);
  const Tensor score_TE = scores.clean_TE.sub(threshold_TE).div(scores.noise_std_TE.clamp_min(kSmallestNoise));
  return score_TE.div(-std::numbers::sqrt2).erfc().div(2);  // Φ(z) = erfc(-z/√2)/2 keeps small probabilities exact
}

std::vector<Tensor> load_rows(const RouteInput& in, const RouteOutput& out, int64_t experts, bool include_self) {
  if (out.levels) return load_rows_in_two_levels(in, out, experts, include_self);
  if (is_smooth(in, out.scores, out.k, experts)) return {load_probability(out.scores, out.k, include_self)};
  return {chosen_experts(out.assignment.choice_TK, experts, out.gate_TK.scalar_type())};
}

Tensor load_of(const std::vector<Tensor>& sums) {
  if (sums.size() == 1) return sums[0];
  const Tensor &group_G = sums[0], &inside_E = sums[1], &rows_G = sums[2];
  const Tensor share_G1 = group_G.div(rows_G.clamp_min(1)).unsqueeze(1);
  return inside_E.unflatten(0, {group_G.size(0), -1}).mul(share_G1).flatten();
}

}  // namespace moelab
