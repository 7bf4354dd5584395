// Probe: two LoRA sites on a frozen base share one plan. Expert e is a feed-forward layer whose matrices are the base's plus its
// own low-rank parts: FFN_e(x) = (D + B₂A₂[e])·relu((U + B₁A₁[e])·x). The base runs once per row, not per pair: U·x is gathered
// like x is, and D is linear, so Σ gate·D·h = D·Σ gate·h.
#include "core/execute.h"
#include "core/grouped.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

class LoraBank : public ExpertBank {
 public:
  LoraBank(std::mt19937_64& draw, int64_t experts, int64_t in, int64_t out, int64_t rank)
      : a_(add_parameter("a", random_leaf(draw, {experts, rank, in}, at::kDouble))),
        b_(add_parameter("b", random_leaf(draw, {experts, out, rank}, at::kDouble))) {
    groups_.push_back({.first = 0, .experts = experts, .stacked = {{"a", a_}, {"b", b_}}});
  }
  int64_t output_width(int) const override { return b_.size(1); }
  double flops_per_row(int64_t) const override { return 2.0 * static_cast<double>(a_[0].numel() + b_[0].numel()); }
  void reset_expert(int64_t, RandomKey) override {}
  Tensor forward(const ExpertContext& context, int) const override {
    return grouped_linear(grouped_linear(context.rows_ND, a_, {}, context.offsets_E1), b_, {}, context.offsets_E1);
  }
  Tensor a_, b_;
};

// A frozen linear map that counts the rows it multiplies.
struct FrozenLinear {
  Tensor weight_OI;
  int64_t rows = 0;
  Tensor operator()(const Tensor& x) {
    rows += x.size(0);
    return at::linear(x, weight_OI);
  }
};

}  // namespace

TEST_CASE("two LoRA sites share one decision over a frozen base that runs once per row") {
  std::mt19937_64 draw(31);
  const int64_t rows = 9, experts = 4, width = 5, hidden = 7;
  const SparseCase at_hand = random_sparse_case(draw, rows, experts, 3, 0.1, at::kDouble);
  const SparsePlan& plan = at_hand.plan;
  const LoraBank up(draw, experts, width, hidden, 2), down(draw, experts, hidden, width, 2);
  FrozenLinear base_up{random_leaf(draw, {hidden, width}, at::kDouble, false)};
  FrozenLinear base_down{random_leaf(draw, {width, hidden}, at::kDouble, false)};
  const Tensor x_TD = random_leaf(draw, {rows, width}, at::kDouble);
  const std::vector<Tensor> leaves{x_TD, at_hand.gate_TK, up.a_, up.b_, down.a_, down.b_};
  const auto gradients = [&](const Tensor& y_TD) {
    for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
    y_TD.square().sum().backward({}, true);
    std::vector<Tensor> grads{y_TD};
    for (const Tensor& leaf : leaves) grads.push_back(leaf.grad());
    return grads;
  };

  const ExecuteInput input{.x_TD = x_TD};
  const Tensor low_NF = map_pairs(plan, up, dispatch_rows(x_TD, plan), input);
  const Tensor hidden_NF = at::relu(dispatch_rows(base_up(x_TD), plan) + low_NF);
  const Tensor y_TD = base_down(combine_rows(hidden_NF, plan)) + combine_rows(map_pairs(plan, down, hidden_NF, input), plan);
  const auto routed = gradients(y_TD);
  CHECK((base_up.rows == rows && base_down.rows == rows));
  CHECK_FALSE(base_up.weight_OI.grad().defined());
  CHECK_FALSE(base_down.weight_OI.grad().defined());

  std::vector<Tensor> outputs(static_cast<size_t>(rows), at::zeros({width}, at::kDouble));
  for (int64_t n = 0; n < plan.token_N.numel(); ++n) {
    const int64_t t = plan.token_N[n].item<int64_t>(), e = plan.expert_N[n].item<int64_t>();
    const Tensor h = at::relu((base_up.weight_OI + up.b_[e].mm(up.a_[e])).mv(x_TD[t]));
    Tensor& y = outputs[static_cast<size_t>(t)];
    y = y + plan.gate_N[n] * (base_down.weight_OI + down.b_[e].mm(down.a_[e])).mv(h);
  }
  const auto plain = gradients(at::stack(outputs));
  for (size_t i = 0; i < plain.size(); ++i) CHECK(relative_error(routed[i], plain[i]) < 1e-10);
}
