// Balance loss of DynMoE's code (Guo et al. 2024, 2405.14297), over the n rows that activate an expert (K_t > 0):
//
//   max_experts · Σ_e f_e · P_e,   f_e = Σ_t m_te / n (no gradient),   P_e = Σ_t (m_te / K_t) / n
//
// m = 1 where row t activates expert e, K_t = Σ_e m_te; P's gradient goes straight through both. k where k experts per row
// are evenly used, E where all rows use the same; 0 without such a row.
#include "core/losses/dynmoe_parts.h"

#include <limits>

namespace moelab {
namespace {

class DynmoeBalanceLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Tensor indicator_TE = indicator_rows(input);
    const Tensor active_T1 = indicator_TE.sum(1, /*keepdim=*/true);
    const Tensor routed_T1 = active_T1.detach().gt(0).to(indicator_TE.scalar_type());
    const Tensor counted_TE = indicator_TE.detach().round();  // rows: whole, wherever straight-through terms are evaluated
    return {counted_TE, indicator_TE.div(active_T1.add(1).sub(routed_T1)), routed_T1};  // rows without expert: 0 / 1
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    const Tensor rows = statistics.sums[2].squeeze().clamp_min(1);
    const Tensor share_E = statistics.sums[0].div(rows), probability_E = statistics.sums[1].div(rows);
    return share_E.mul(probability_E).sum().mul(share_E.size(0));
  }

  Landmarks landmarks(int64_t experts, int64_t k) const override {
    return {k > 0 ? static_cast<double>(k) : std::numeric_limits<double>::quiet_NaN(), static_cast<double>(experts)};
  }
};

const Registration<LossEntry> dynmoe_balance_registration{{
    .name = "dynmoe_balance",
    .title = "Balance over rows with an active expert",
    .citation = "Guo et al. 2024, 2405.14297 (its code)",
    .equation = "E · Σ_e f_e · P_e over rows with K > 0, f = share of rows that activate e (no gradient), P = mean of m/K",
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<DynmoeBalanceLoss>(); },
    .refuses = refuses_without_indicators,
}};

}  // namespace
}  // namespace moelab
