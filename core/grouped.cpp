#include "core/grouped.h"

#include "core/error.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Calls visit(expert, first row, rows) for every expert, those without rows included.
template <class Visit>
void for_each_expert(const Tensor& offsets_E1, Visit visit) {
  const int64_t* offset = offsets_E1.const_data_ptr<int64_t>();
  for (int64_t e = 0; e + 1 < offsets_E1.numel(); ++e) visit(e, offset[e], offset[e + 1] - offset[e]);
}

Tensor grouped_outputs(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1) {
  Tensor y_NO = at::empty({x_ND.size(0), weight_EOD.size(1)}, x_ND.options());
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    if (rows == 0) return;
    Tensor y = y_NO.narrow(0, first, rows);
    const Tensor x = x_ND.narrow(0, first, rows), weight_DO = weight_EOD.select(0, e).t();
    if (bias_EO.defined()) at::addmm_out(y, bias_EO.select(0, e), x, weight_DO);
    else at::mm_out(y, x, weight_DO);
  });
  return y_NO;
}

Tensor grouped_input_grad(const Tensor& grad_NO, const Tensor& weight_EOD, const Tensor& offsets_E1) {
  Tensor grad_ND = at::empty({grad_NO.size(0), weight_EOD.size(2)}, grad_NO.options());
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    if (rows == 0) return;
    Tensor out = grad_ND.narrow(0, first, rows);
    at::mm_out(out, grad_NO.narrow(0, first, rows), weight_EOD.select(0, e));
  });
  return grad_ND;
}

// Each expert's gradient is written into its slice of one stacked tensor; only experts without rows are zeroed.
Tensor grouped_weight_grad(const Tensor& grad_NO, const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& offsets_E1) {
  Tensor grad_EOD = at::empty_like(weight_EOD, at::MemoryFormat::Contiguous);
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    Tensor out = grad_EOD.select(0, e);
    if (rows == 0) out.zero_();
    else at::mm_out(out, grad_NO.narrow(0, first, rows).t(), x_ND.narrow(0, first, rows));
  });
  return grad_EOD;
}

Tensor grouped_bias_grad(const Tensor& grad_NO, int64_t experts, const Tensor& offsets_E1) {
  Tensor grad_EO = at::empty({experts, grad_NO.size(1)}, grad_NO.options());
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    Tensor out = grad_EO.select(0, e);
    at::sum_out(out, grad_NO.narrow(0, first, rows), {0});  // zero over no rows
  });
  return grad_EO;
}

// The bias comes last: an absent one is no input of the graph.
struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& offsets_E1,
                        const std::optional<Tensor>& bias_EO) {
    ctx->save_for_backward({x_ND, weight_EOD, offsets_E1});
    ctx->saved_data["bias"] = bias_EO.has_value();
    return grouped_outputs(x_ND, weight_EOD, bias_EO.value_or(Tensor()), offsets_E1);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (at::GradMode::is_enabled()) usage_error("experts: second derivatives are not supported; use create_graph = false");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x_ND = saved[0], &weight_EOD = saved[1], &offsets_E1 = saved[2];
    const Tensor grad_NO = grads[0].contiguous();  // a sum's gradient comes with strides 0
    const bool bias = ctx->saved_data["bias"].toBool();
    variable_list out(4);
    if (ctx->needs_input_grad(0)) out[0] = grouped_input_grad(grad_NO, weight_EOD, offsets_E1);
    if (ctx->needs_input_grad(1)) out[1] = grouped_weight_grad(grad_NO, x_ND, weight_EOD, offsets_E1);
    if (bias && ctx->needs_input_grad(3)) out[3] = grouped_bias_grad(grad_NO, weight_EOD.size(0), offsets_E1);
    return out;
  }
};

// What autocast does for a linear layer: weights are cast once per step, gradients come back in the parameter's dtype.
Tensor grouped_autocast(const Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

}  // namespace

Tensor grouped_linear(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1) {
  check_invariant(offsets_E1.numel() == weight_EOD.size(0) + 1, "grouped_linear: one offset per expert and one more expected");
  check_invariant(offsets_E1.const_data_ptr<int64_t>()[weight_EOD.size(0)] == x_ND.size(0), "grouped_linear: the offsets do not end at the last row");
  const Tensor x = grouped_autocast(x_ND).contiguous(), weight = grouped_autocast(weight_EOD);
  if (!bias_EO.defined()) return GroupedLinear::apply(x, weight, offsets_E1, std::nullopt);
  return GroupedLinear::apply(x, weight, offsets_E1, grouped_autocast(bias_EO));
}

}  // namespace moelab
