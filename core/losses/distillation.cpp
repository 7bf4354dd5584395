// Distillation loss of StableMoE (Dai et al. 2022, 2204.08396): a second, simpler router learns the choices of the first.
//
//   Σ_t CE(ŝ_t, a_t) = Σ_t (logsumexp_e ŝ_te - ŝ_t,a_t),   ŝ = scores of the distilled router, a = the row's chosen expert
//
// A sum over rows; the choice is a constant, so the gradient reaches the distilled router alone. 0 in stage 2, where that
// router decides by itself. Per row it is ln E where ŝ is uniform, whatever was chosen, and 0 where ŝ is sure and right.
#include "core/losses/parts.h"

#include <ATen/ops/log_softmax.h>

#include <cmath>

namespace moelab {
namespace {

Tensor distilled_scores(const LossInput& input) {
  const auto found = input.out.statistics.find("distilled");
  const Tensor scores_TE = found == input.out.statistics.end() ? Tensor() : found->second;
  return required(scores_TE, "the scores of a distilled router", "distillation", input);
}

class DistillationLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Tensor& choice_T1 = input.out.assignment.choice_TK;
    const Tensor likelihood_T1 = distilled_scores(input).log_softmax(1).gather(1, choice_T1.clamp_min(0));
    const Tensor entropy_T1 = likelihood_T1.neg().masked_fill(choice_T1.lt(0), 0);
    const auto stage1 = input.out.statistics.find("stage1");
    return {stage1 == input.out.statistics.end() ? entropy_T1 : entropy_T1.mul(stage1->second)};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override { return statistics.sums[0].squeeze(); }

  bool reduces_by_sum() const override { return true; }

  Landmarks landmarks(int64_t experts, int64_t) const override { return {std::log(static_cast<double>(experts)), 0}; }
};

std::string distillation_refuses(const RouterFacts& facts) {
  return facts.distils ? "" : "it teaches a distilled router, and this one has none";
}

const Registration<LossEntry> distillation_registration{{
    .name = "distillation",
    .title = "Distillation loss of StableMoE",
    .citation = "Dai et al. 2022, 2204.08396",
    .equation = "Σ_t CE(ŝ_t, chosen expert), a sum over rows, 0 in stage 2; its landmarks are per row",
    .coefficient = 1,
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<DistillationLoss>(); },
    .refuses = distillation_refuses,
}};

}  // namespace
}  // namespace moelab
