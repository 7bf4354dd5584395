// Balance loss of StableMoE (Dai et al. 2022, 2204.08396):
//
//   Σ_e ((n_e - n̄)/n̄) · Σ_{t on e} σ(s_te),   n_e = rows that chose e (no gradient), n̄ = their mean, s = logits
//
// A sum over rows, and signed: below 0 where the fuller experts have the lower scores. Rows are counted before any drop. The
// gradient pushes s_te down by ((n_e - n̄)/n̄)·σ'(s_te) for rows on full experts and up on empty ones. 0 in stage 2 of
// StableMoE, whose routes are frozen. Per row it is 0 at balance, whatever s, and (E - 1)·σ(s) where all rows are on one
// expert; the landmark takes σ(0) = 1/2, where training starts.
#include "core/losses/parts.h"

#include <limits>

namespace moelab {
namespace {

// Experts that may be chosen now, of `all`.
int64_t active_count(const Router& router, int64_t all) {
  const Tensor active_E = router.active_experts_E();
  return active_E.defined() ? active_E.sum().item<int64_t>() : all;
}

class StableMoeBalance : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Tensor& choice_TK = input.out.assignment.choice_TK;
    const Tensor& logits_TE = required(input.out.scores.clean_TE, "logits", "stablemoe_balance", input);
    const Tensor chosen_TE = chosen_experts(choice_TK, input.experts, logits_TE.scalar_type());
    const auto stage1 = input.out.statistics.find("stage1");
    const Tensor counted_TE = stage1 == input.out.statistics.end() ? chosen_TE : chosen_TE.mul(stage1->second);
    return {counted_TE, logits_TE.sigmoid().mul(counted_TE)};
  }

  Tensor value(const LossStatistics& statistics, const Router& router) const override {
    const Tensor& count_E = statistics.sums[0];
    const Tensor mean = count_E.sum().div(active_count(router, count_E.size(0)));
    const Tensor excess_E = count_E.sub(mean).div(mean.masked_fill(mean.eq(0), 1));
    return excess_E.mul(statistics.sums[1]).sum();
  }

  bool reduces_by_sum() const override { return true; }

  Landmarks landmarks(int64_t experts, int64_t k) const override {
    if (k <= 0) return {0, std::numeric_limits<double>::quiet_NaN()};
    return {0, (static_cast<double>(experts) - static_cast<double>(k)) / 2};
  }
  // The mean is over the active experts.
  Landmarks landmarks_among(int64_t active, int64_t, int64_t k) const override { return landmarks(active, k); }
};

std::string stablemoe_balance_refuses(const RouterFacts& facts) {
  const std::string reason = refuses_without_choices(facts);
  return reason.empty() ? refuses_without_scores(facts) : reason;
}

const Registration<LossEntry> stablemoe_balance_registration{{
    .name = "stablemoe_balance",
    .title = "Balance loss of StableMoE",
    .citation = "Dai et al. 2022, 2204.08396",
    .equation = "Σ_e ((n_e - n̄)/n̄) · Σ_{t on e} σ(s_te), a sum over rows, 0 in StableMoE's stage 2; its landmarks are per row, "
                "at σ = 1/2",
    .coefficient = 0.3,
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<StableMoeBalance>(); },
    .refuses = stablemoe_balance_refuses,
}};

}  // namespace
}  // namespace moelab
