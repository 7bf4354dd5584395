// Simplicity loss of DynMoE (Guo et al. 2024, 2405.14297): keeps the experts' vectors short.
//
//   mean_e ‖w_e‖₂ over all max_experts rows, the inactive ones too
//
// It reads the router's weight alone, so every row contributes the same value, and says nothing about balance or collapse.
// The trainer leaves inactive experts as they are, so their part moves nothing.
#include "core/losses/dynmoe_parts.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <limits>

namespace moelab {
namespace {

class SimplicityLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {same_for_every_row(at::linalg_vector_norm(router_matrix(input, "simplicity"), 2, {1}).mean(), input)};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return mean_over_rows(statistics.sums[0].squeeze(), statistics.rows);
  }

  Landmarks landmarks(int64_t, int64_t) const override {
    constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
    return {unknown, unknown};
  }
};

const Registration<LossEntry> simplicity_registration{{
    .name = "simplicity",
    .title = "Length of the experts' vectors",
    .citation = "Guo et al. 2024, 2405.14297",
    .equation = "mean_e ‖w_e‖ over all max_experts rows",
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<SimplicityLoss>(); },
    .refuses = refuses_without_indicators,
}};

}  // namespace
}  // namespace moelab
