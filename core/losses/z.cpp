// Router z-loss (Zoph et al. 2022, ST-MoE, 2202.08906): keeps router logits small.
//
//   mean_t (ln Σ_e exp z_te)²,   z = logits without noise
//
// It pulls the logsumexp to 0, so it also penalises an offset that all experts share. (ln E)² at zero logits, which is where
// experts are balanced by default; it says nothing about collapse. Rows of padding are not there to be averaged.
#include "core/losses/parts.h"

#include <ATen/ops/logsumexp.h>

#include <cmath>
#include <limits>

namespace moelab {
namespace {

class ZLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {required(input.out.scores.clean_TE, "logits", "z", input).logsumexp(1, /*keepdim=*/true).square()};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return mean_over_rows(statistics.sums[0].squeeze(), statistics.rows);
  }

  Landmarks landmarks(int64_t experts, int64_t) const override {
    return {std::pow(std::log(static_cast<double>(experts)), 2), std::numeric_limits<double>::quiet_NaN()};
  }
  // Inactive experts are not in the logsumexp.
  Landmarks landmarks_among(int64_t active, int64_t, int64_t k) const override { return landmarks(active, k); }
};

const Registration<LossEntry> z_registration{{
    .name = "z",
    .title = "Router z-loss",
    .citation = "Zoph et al. 2022, 2202.08906",
    .equation = "mean_t (logsumexp_e z_te)²",
    .coefficient = 1e-3,
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<ZLoss>(); },
    .refuses = refuses_without_scores,
}};

}  // namespace
}  // namespace moelab
