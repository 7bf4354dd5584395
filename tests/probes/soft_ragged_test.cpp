// Probe: soft slots over ragged sequences, interleaved rows, one slot set per sequence.
#include "core/execute.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

// Expert e multiplies its rows by factor[e].
class ScalingBank : public ExpertBank {
 public:
  ScalingBank(int64_t width, const Tensor& factor_E) : width_(width), factor_E_(add_parameter("factor", factor_E)) {
    groups_.push_back({.first = 0, .experts = factor_E.size(0), .stacked = {{"factor", factor_E_}}});
  }
  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return static_cast<double>(width_); }
  void reset_expert(int64_t, RandomKey) override {}
  bool has_forward_with() const override { return true; }
  Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows) const override { return rows * parameters[0]; }
  Tensor forward(const ExpertContext& context, int) const override {
    const Tensor counts_E = context.offsets_E1.diff();
    return context.rows_ND * factor_E_.repeat_interleave(counts_E).unsqueeze(1);
  }

 private:
  int64_t width_;
  Tensor factor_E_;
};

// Rows divided by their lengths, as the method asks of queries and keys.
Tensor unit_rows(const Tensor& rows) { return rows / rows.norm(2, {1}, true); }

}  // namespace

TEST_CASE("soft slots give the worked numbers, also where a second, shorter sequence is interleaved") {
  const Tensor x_TD = at::tensor({1.0, 0.0, 9.0, 2.0, 0.0, 1.0, 1.0, 1.0}, at::kDouble).view({4, 2});  // row 1: sequence 1
  const ScalingBank bank(2, at::tensor({2.0, -1.0}, at::kDouble));
  const SoftPlan plan{.experts = 2, .query_TD = unit_rows(x_TD), .key_SD = at::eye(2, at::kDouble),
                      .scale = at::ones({1}, at::kDouble), .sequence_T = at::tensor({0, 1, 0, 0}, at::kLong), .sequences = 2,
                      .noise_TS = {}, .noise_key = {}, .position_T = {}, .sequence_key_T = {}};
  validate(plan, 4, 2);
  const SoftMatrices first = soft_matrices(plan, 0);
  const Tensor dispatch = at::tensor({0.4730, 0.1740, 0.1740, 0.4730, 0.3529, 0.3529}, at::kDouble).view({3, 2});
  const Tensor combine = at::tensor({0.7311, 0.2689, 0.2689, 0.7311, 0.5, 0.5}, at::kDouble).view({3, 2});
  CHECK(at::equal(first.row_M, at::tensor({0, 2, 3}, at::kLong)));
  CHECK(at::allclose(first.dispatch_MS, dispatch, 0, 6e-5));
  CHECK(at::allclose(first.combine_MS, combine, 0, 6e-5));

  const Tensor y_TD = execute(plan, bank, {.x_TD = x_TD});
  const Tensor expected = at::tensor({1.0660, 0.5483, 0.0590, -0.3204, 0.5625, 0.1140}, at::kDouble).view({3, 2});
  CHECK(at::allclose(y_TD.index_select(0, first.row_M), expected, 0, 1e-4));
  // A sequence of one row: every slot holds that row, so y = (2c₀ - c₁)·x with c the softmax of its logits.
  const double norm = std::sqrt(85.0), c = 1 / (1 + std::exp((2 - 9) / norm));
  CHECK(std::abs(y_TD[1][0].item<double>() - (2 * c - (1 - c)) * 9) < 1e-12);
}

TEST_CASE("gradients of soft slots equal those of a direct computation") {
  std::mt19937_64 draw(29);
  const auto bank = ffn_bank(3, 2, 4, "relu", true, at::kDouble);
  const Tensor x_TD = random_leaf(draw, {5, 3}, at::kDouble), key_SD = random_leaf(draw, {4, 3}, at::kDouble);
  const SoftPlan plan{.experts = 2, .slots_per_expert = 2, .query_TD = x_TD, .key_SD = key_SD,
                      .scale = at::full({1}, 0.7, at::kDouble), .sequence_T = at::zeros({5}, at::kLong), .sequences = 1,
                      .noise_TS = {}, .noise_key = {}, .position_T = {}, .sequence_key_T = {}};
  execute(plan, *bank, {.x_TD = x_TD}).square().sum().backward();
  const std::vector<Tensor> grads{x_TD.grad().clone(), key_SD.grad().clone(), bank->parameters()[0].tensor.grad().clone()};
  x_TD.mutable_grad() = Tensor(), key_SD.mutable_grad() = Tensor();
  bank->zero_grad();

  const Tensor logits = x_TD.mm(key_SD.t()) * 0.7, slots = logits.softmax(0).t().mm(x_TD);
  const Tensor outputs = at::cat({bank->forward_with(bank->parameters_of(0), slots.slice(0, 0, 2)),
                                  bank->forward_with(bank->parameters_of(1), slots.slice(0, 2, 4))});
  logits.softmax(1).mm(outputs).square().sum().backward();
  CHECK(relative_error(grads[0], x_TD.grad()) < 1e-10);
  CHECK(relative_error(grads[1], key_SD.grad()) < 1e-10);
  CHECK(relative_error(grads[2], bank->parameters()[0].tensor.grad()) < 1e-10);
}
