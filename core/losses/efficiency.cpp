// Efficiency loss of DynMoE's code (Guo et al. 2024, 2405.14297): rows are to activate few experts.
//
//   Σ_t Σ_e m_te / (T · max_experts),   m = 1 where row t activates expert e, straight-through backward
//
// The share of experts that a row uses: k/E, at balance and at collapse alike. An expert that evaluation falls back to for a
// row without any is not activated by it.
#include "core/losses/dynmoe_parts.h"

#include <limits>

namespace moelab {
namespace {

class EfficiencyLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {indicator_rows(input).mean(1, /*keepdim=*/true)};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return mean_over_rows(statistics.sums[0].squeeze(), statistics.rows);
  }

  Landmarks landmarks(int64_t experts, int64_t k) const override {
    constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
    const double share = k > 0 ? static_cast<double>(k) / static_cast<double>(experts) : unknown;
    return {share, share};
  }
};

const Registration<LossEntry> efficiency_registration{{
    .name = "efficiency",
    .title = "Share of experts that rows activate",
    .citation = "Guo et al. 2024, 2405.14297 (its code)",
    .equation = "mean_te m_te over rows × max_experts, m = 1 where row t activates e (straight-through)",
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<EfficiencyLoss>(); },
    .refuses = refuses_without_indicators,
}};

}  // namespace
}  // namespace moelab
