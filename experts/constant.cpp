// Constant experts: the row blended with a learned vector.
// Jin et al. 2024, MoE++, arXiv 2410.07348
//
//   (a_1, a_2) = softmax(w_mix · x);   y = a_1 · x + a_2 · v          w_mix [2, D], v [D]
//
// Initial values: w_mix ~ N(0, 1/D), v ~ N(0, 1/D); drawn per (parameter, expert). They cost 4·D + O(D) operations per row.
//
// Differences from the paper: MoE++ multiplies the layer's input by k = 2; here gates are used as the router gives them.
#include "core/expert.h"
#include "core/grouped.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace moelab {
namespace {

// v_ND: the vector of each row's expert, or one of all.
Tensor constant_blend(const Tensor& mix_N2, const Tensor& v_ND, const Tensor& rows_ND) {
  const Tensor a_N2 = mix_N2.softmax(1);
  return rows_ND.mul(a_N2.narrow(1, 0, 1)).add(v_ND.mul(a_N2.narrow(1, 1, 1)));
}

class ConstantBank : public ExpertBank {
 public:
  explicit ConstantBank(const ExpertSpec& spec) : width_(spec.width), first_(spec.first), scale_(spec.output_scale) {
    w_mix_E2D_ = add_parameter("w_mix", at::empty({spec.experts, 2, width_}, spec.dtype));
    v_ED_ = add_parameter("v", at::empty({spec.experts, width_}, spec.dtype));
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {{"w_mix", w_mix_E2D_}, {"v", v_ED_}}});
    for (int64_t e = 0; e < spec.experts; ++e) reset_expert(e, spec.init);
  }

  // Rows times experts without a gather: the rows of an expert are consecutive, so its vector is repeated.
  Tensor forward(const ExpertContext& context, int) const override {
    const Tensor mix_N2 = grouped_linear(context.rows_ND, w_mix_E2D_, {}, context.offsets_E1);
    const Tensor rows_E = context.offsets_E1.diff().to(v_ED_.device());
    return constant_blend(mix_N2, v_ED_.repeat_interleave(rows_E, 0, context.rows_ND.size(0)), context.rows_ND);
  }

  // The same without a row per pair: each row's weights on itself and on the vectors are summed first. As many products of a row
  // as there are experts, two numbers long each, cost less than the copies. On other devices index_add has no fixed order.
  Tensor forward_layer(const ExpertContext& context) const override {
    if (!context.input_TD.is_cpu()) return {};
    const SparsePlan& plan = *context.plan;
    const Tensor& x_TD = context.input_TD;
    const int64_t experts = v_ED_.size(0);
    const Tensor place_N = plan.token_N.mul(experts).add(plan.expert_N);
    const Tensor mix_TE2 = at::linear(x_TD, w_mix_E2D_.flatten(0, 1)).view({-1, experts, 2});
    const Tensor more_TE = mix_TE2.select(2, 0).sub(mix_TE2.select(2, 1));  // a softmax of two is the sigmoid of the difference
    const Tensor more_N = more_TE.flatten().gather(0, place_N).to(plan.gate_N.scalar_type());
    const auto summed = [&](int64_t count, const Tensor& at_N, const Tensor& values_N) {
      return at::zeros({count}, values_N.options().requires_grad(false)).index_add(0, at_N, values_N);
    };
    const Tensor row_T = summed(plan.rows, plan.token_N, plan.gate_N.mul(more_N.sigmoid()));
    const Tensor vector_TE = summed(plan.rows * experts, place_N, plan.gate_N.mul(more_N.neg().sigmoid())).view({-1, experts});
    const Tensor vectors_TD = vector_TE.to(v_ED_.scalar_type()).matmul(v_ED_);
    return x_TD.mul(row_T.to(x_TD.scalar_type()).unsqueeze(1)).add(vectors_TD);
  }

  Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows_ND) const override {
    return constant_blend(at::linear(rows_ND, parameters.at(0)), parameters.at(1), rows_ND);
  }
  bool has_forward_with() const override { return true; }

  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return 4.0 * static_cast<double>(width_); }  // the two dot products

  void reset_expert(int64_t expert, RandomKey key) override {
    const at::NoGradGuard no_grad;
    const double std = 1 / std::sqrt(static_cast<double>(width_));
    const auto draw = [&](const char* name, const Tensor& stacked, double size) {
      Tensor own = stacked.select(0, expert);
      own.copy_(normal_tensor(key.with(name, first_ + expert), own.sizes(), size, own.scalar_type()));
    };
    draw("w_mix", w_mix_E2D_, std);
    draw("v", v_ED_, std * scale_);
  }

 private:
  int64_t width_, first_;
  double scale_;
  Tensor w_mix_E2D_, v_ED_;
};

const Registration<ExpertEntry> registration_constant{{
    .name = "constant",
    .title = "Constant experts: the row blended with a learned vector",
    .citation = "Jin et al. 2024 (MoE++), arXiv 2410.07348",
    .equation = "(a_1, a_2) = softmax(w_mix·x);  y = a_1·x + a_2·v",
    .differences = {"MoE++ multiplies the layer's input by k; here gates are used as the router gives them"},
    .make = [](ExpertSpec spec) { return std::make_unique<ConstantBank>(spec); },
}};

}  // namespace
}  // namespace moelab
