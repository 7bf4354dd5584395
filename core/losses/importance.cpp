// Importance loss of noisy top-k gating (Shazeer et al. 2017, 1701.06538) and V-MoE (Riquelme et al. 2021, 2106.05974):
//
//   CV²(Σ_t w_te),   CV² = variance over experts / mean²
//
// Conventions: of = gates sums the gate values of the chosen experts, before any drop (Shazeer); of = probabilities sums the
// probabilities of all experts, without noise (V-MoE). 0 at balance, E/k - 1 at collapse with population variance; sample
// variance (the default of some libraries' var()) is E/(E - 1) times larger.
#include "core/losses/parts.h"

namespace moelab {
namespace {

class ImportanceLoss : public VariationLoss {
 public:
  ImportanceLoss(const Options& options, const RouterEntry& router)
      : VariationLoss(options), gates_(convention(options, router, "importance", "of") == "gates") {}

  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const RouteOutput& out = input.out;
    if (!gates_) return {required(out.scores.loss_TE, "probabilities", "importance", input)};
    return {spread_over_experts(out.gate_TK, out.assignment.choice_TK, input.experts)};
  }

 private:
  bool gates_;
};

const Registration<LossEntry> importance_registration{{
    .name = "importance",
    .title = "Importance loss",
    .citation = "Shazeer et al. 2017, 1701.06538; Riquelme et al. 2021, 2106.05974",
    .equation = "CV²(Σ_t w_te), w = gates of the chosen experts before drops, or clean probabilities",
    .coefficient = 0.1,
    .options =
        {
            option("of", "gates", "what is summed; unless given, as in the router's paper").one_of({"gates", "probabilities"}),
            variance_option(),
        },
    .make = [](const Options& options,
               const RouterEntry& router) { return std::make_unique<ImportanceLoss>(options, router); },
    .refuses = refuses_without_choices,
}};

}  // namespace
}  // namespace moelab
