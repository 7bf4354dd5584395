// Entropy of a row's probabilities (the dynamic loss of top-p routing, Huang et al. 2024, 2403.07652): with a positive
// coefficient rows grow sure of their experts, so that top-p routing needs few of them.
//
//   mean_t Σ_e -p_te ln p_te   (nats, p without noise)
//
// ln E where probabilities are uniform, ln k where every row spreads its probability over k experts.
#include "core/losses/parts.h"

#include <cmath>

namespace moelab {
namespace {

class EntropyLoss : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {entropy_of_rows(required(input.out.scores.loss_TE, "probabilities", "entropy", input)).unsqueeze(1)};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return mean_over_rows(statistics.sums[0].squeeze(), statistics.rows);
  }

  Landmarks landmarks(int64_t experts, int64_t k) const override {
    return {std::log(static_cast<double>(experts)), k > 0 ? std::log(static_cast<double>(k)) : std::nan("")};
  }
  // Inactive experts have probability 0.
  Landmarks landmarks_among(int64_t active, int64_t, int64_t k) const override { return landmarks(active, k); }
};

const Registration<LossEntry> entropy_registration{{
    .name = "entropy",
    .title = "Entropy of the routing probabilities",
    .citation = "Huang et al. 2024, 2403.07652",
    .equation = "mean_t Σ_e -p_te ln p_te",
    .coefficient = 1e-4,
    .make = [](const Options&, const RouterEntry&) { return std::make_unique<EntropyLoss>(); },
    .refuses = refuses_without_scores,
}};

}  // namespace
}  // namespace moelab
