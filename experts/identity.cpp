// Identity experts: a row that chooses one gets itself back, times its gate.
// Jin et al. 2024, MoE++ ("copy experts"), arXiv 2410.07348; LongCat-Flash technical report 2025, arXiv 2509.01322
//
//   y = x
//
// They have no parameters and cost nothing but the copy; beside others in [[moe.expert.group]] they let easy rows do without a
// feed-forward expert.
//
// Differences from the paper: LongCat-Flash steers the share of its identity experts with a controller of the router's biases;
// here that is the router's business. MoE++ multiplies the layer's input by k = 2; here gates are used as the router gives them.
#include "core/expert.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

class IdentityBank : public ExpertBank {
 public:
  explicit IdentityBank(const ExpertSpec& spec) : width_(spec.width) {
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
  }

  Tensor forward(const ExpertContext& context, int) const override { return context.rows_ND.clone(); }

  // A row times the sum of its gates: no row is copied. On other devices index_add has no fixed order.
  Tensor forward_layer(const ExpertContext& context) const override {
    if (!context.input_TD.is_cpu()) return {};
    const SparsePlan& plan = *context.plan;
    const Tensor none_T = at::zeros({plan.rows}, plan.gate_N.options().requires_grad(false));
    const Tensor weight_T = none_T.index_add(0, plan.token_N, plan.gate_N);
    return context.input_TD.mul(weight_T.to(context.input_TD.scalar_type()).unsqueeze(1));
  }

  Tensor forward_with(const std::vector<Tensor>&, const Tensor& rows_ND) const override { return rows_ND.clone(); }
  bool has_forward_with() const override { return true; }

  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return 0; }
  void reset_expert(int64_t, RandomKey) override {}

 private:
  int64_t width_;
};

const Registration<ExpertEntry> registration_identity{{
    .name = "identity",
    .title = "Identity experts: the row itself",
    .citation = "Jin et al. 2024 (MoE++), arXiv 2410.07348; LongCat-Flash 2025, arXiv 2509.01322",
    .equation = "y = x",
    .differences = {"MoE++ multiplies the layer's input by k; here gates are used as the router gives them"},
    .make = [](ExpertSpec spec) { return std::make_unique<IdentityBank>(spec); },
}};

}  // namespace
}  // namespace moelab
