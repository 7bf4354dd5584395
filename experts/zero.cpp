// Zero experts: a row that chooses one skips the layer.
// Jin et al. 2024, MoE++, arXiv 2410.07348; the null experts of Zeng et al. 2024, AdaMoE, arXiv 2406.13233
//
//   y = 0
//
// They have no parameters and cost nothing; beside others in [[moe.expert.group]] they make the number of working experts vary
// from row to row.
//
// Differences from the paper: MoE++ routes with residuals of the previous layer's logits, sets the weight of its last zero expert
// to 0 and renormalises the pair; here the router decides and the gates are its own. A balance loss counts them like any expert.
#include "core/expert.h"

#include <ATen/ops/zeros_like.h>

namespace moelab {
namespace {

class ZeroBank : public ExpertBank {
 public:
  explicit ZeroBank(const ExpertSpec& spec) : width_(spec.width) {
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
  }

  Tensor forward(const ExpertContext& context, int) const override { return at::zeros_like(context.rows_ND); }

  // One zero for all rows, on the graph of the gates: their gradients are zero, not missing.
  Tensor forward_layer(const ExpertContext& context) const override {
    return context.plan->gate_N.sum().mul(0).to(context.input_TD.scalar_type()).expand_as(context.input_TD);
  }

  Tensor forward_with(const std::vector<Tensor>&, const Tensor& rows_ND) const override { return at::zeros_like(rows_ND); }
  bool has_forward_with() const override { return true; }

  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return 0; }
  void reset_expert(int64_t, RandomKey) override {}

 private:
  int64_t width_;
};

const Registration<ExpertEntry> registration_zero{{
    .name = "zero",
    .title = "Zero experts: the row skips the layer",
    .citation = "Jin et al. 2024 (MoE++), arXiv 2410.07348",
    .equation = "y = 0",
    .differences = {"gates are the router's own: MoE++ sets that of its last zero expert to 0 and renormalises"},
    .make = [](ExpertSpec spec) { return std::make_unique<ZeroBank>(spec); },
}};

}  // namespace
}  // namespace moelab
