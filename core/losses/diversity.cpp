// Diversity loss of DynMoE (Guo et al. 2024, 2405.14297): experts' directions are to differ.
//
//   ‖Ŵ Ŵᵀ - I‖_F over the active experts,   row e of Ŵ = w_e / ‖w_e‖
//
// 0 where the directions are orthonormal, which no number of rows per expert tells: there is no value at balance or at
// collapse. It reads the router's weight alone, so every row contributes the same value.
#include "core/losses/dynmoe_parts.h"
#include "core/select.h"

#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_vector_norm.h>

#include <limits>

namespace moelab {
namespace {

Tensor active_rows(const Tensor& weight_ED, const Router& router) {
  const Tensor active_E = router.active_experts_E();
  return active_E.defined() ? weight_ED.index_select(0, active_E.nonzero().squeeze(1)) : weight_ED;
}

// A row of zeros has no direction: it stays zero.
Tensor unit_directions(const Tensor& weight_ED) {
  const Tensor norm_E1 = at::linalg_vector_norm(weight_ED, 2, {1}, /*keepdim=*/true);
  return weight_ED.div(norm_E1.masked_fill(norm_E1.eq(0), 1));
}

class DiversityLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Tensor unit_ED = unit_directions(active_rows(router_matrix(input, "diversity"), input.router));
    const Tensor identity_EE = at::eye(unit_ED.size(0), unit_ED.options().requires_grad(false));
    return {same_for_every_row(at::linalg_vector_norm(router_logits(unit_ED, unit_ED).sub(identity_EE)), input)};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return mean_over_rows(statistics.sums[0].squeeze(), statistics.rows);
  }

  Landmarks landmarks(int64_t, int64_t) const override {
    constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
    return {unknown, unknown};
  }
};

const Registration<LossEntry> diversity_registration{{
    .name = "diversity",
    .title = "Diversity of the experts' directions",
    .citation = "Guo et al. 2024, 2405.14297",
    .equation = "‖Ŵ Ŵᵀ - I‖_F over the active experts, Ŵ with rows of length 1",
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<DiversityLoss>(); },
    .refuses = refuses_without_indicators,
}};

}  // namespace
}  // namespace moelab
