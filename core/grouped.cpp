#include "core/grouped.h"

#include "core/error.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <vector>

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

thread_local GroupedProduct current_product = GroupedProduct::kAuto;

int64_t longest_group(const Tensor& offsets_E1) {
  int64_t longest = 0;
  for_each_expert(offsets_E1, [&](int64_t, int64_t, int64_t rows) { longest = std::max(longest, rows); });
  return longest;
}

// Operands of the library's grouped product are float or shorter, with rows of whole 16 bytes.
bool library_takes(const Tensor& x_ND, const Tensor& weight_EOD) {
  const auto whole = [](const Tensor& t, int64_t width) { return width > 0 && width * t.element_size() % 16 == 0; };
  return x_ND.scalar_type() != at::kDouble && x_ND.size(0) > 0 && whole(x_ND, x_ND.size(1)) && whole(x_ND, weight_EOD.size(1));
}

bool padding_fits(const Tensor& x_ND, const Tensor& offsets_E1) {
  return x_ND.size(0) > 0 && (offsets_E1.numel() - 1) * longest_group(offsets_E1) <= 2 * x_ND.size(0);
}

// Short groups of one length are worth one batched call: nothing is padded, and a call costs as much as such a product.
GroupedProduct cheapest_product(const Tensor& x_ND, const Tensor& offsets_E1) {
  const int64_t experts = offsets_E1.numel() - 1, longest = longest_group(offsets_E1);
  if (!x_ND.is_cpu()) return x_ND.scalar_type() == at::kBFloat16 ? GroupedProduct::kGrouped : GroupedProduct::kLoop;
  return experts > 1 && longest <= 16 && longest * experts == x_ND.size(0) ? GroupedProduct::kBmm : GroupedProduct::kLoop;
}

// What runs: the wanted kind where its rules are met, else the loop.
GroupedProduct possible_product(GroupedProduct wanted, const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& offsets_E1) {
  if (wanted == GroupedProduct::kAuto) wanted = cheapest_product(x_ND, offsets_E1);
  if (wanted == GroupedProduct::kGrouped && !library_takes(x_ND, weight_EOD)) return GroupedProduct::kLoop;
  if (wanted == GroupedProduct::kBmm && !padding_fits(x_ND, offsets_E1)) return GroupedProduct::kLoop;
  return wanted;
}

Tensor library_ends(const Tensor& x_ND, const Tensor& offsets_E1) {
  return offsets_E1.slice(0, 1).to(x_ND.device(), at::kInt);
}

// [N,…] to [E,longest,…], zeros behind each group's rows.
Tensor padded_groups(const Tensor& x_ND, const Tensor& offsets_E1) {
  const int64_t experts = offsets_E1.numel() - 1, longest = longest_group(offsets_E1);
  if (experts * longest == x_ND.size(0)) return x_ND.view({experts, longest, x_ND.size(1)});
  Tensor padded = at::zeros({experts, longest, x_ND.size(1)}, x_ND.options());
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    padded.select(0, e).narrow(0, 0, rows).copy_(x_ND.narrow(0, first, rows));
  });
  return padded;
}

Tensor unpadded_groups(const Tensor& padded, const Tensor& offsets_E1, int64_t total) {
  if (padded.size(0) * padded.size(1) == total) return padded.reshape({total, padded.size(2)});
  Tensor rows_NO = at::empty({total, padded.size(2)}, padded.options());
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    rows_NO.narrow(0, first, rows).copy_(padded.select(0, e).narrow(0, 0, rows));
  });
  return rows_NO;
}

// y[n] = x[n]·matrix[e], without a bias, by a call of the library for all groups.
Tensor joint_product(GroupedProduct product, const Tensor& x_ND, const Tensor& matrix_EDO, const Tensor& offsets_E1) {
  if (product == GroupedProduct::kGrouped) return at::_grouped_mm(x_ND, matrix_EDO, library_ends(x_ND, offsets_E1)).contiguous();
  return unpadded_groups(padded_groups(x_ND, offsets_E1).bmm(matrix_EDO), offsets_E1, x_ND.size(0));
}

Tensor with_bias(Tensor y_NO, const Tensor& bias_EO, const Tensor& offsets_E1) {
  if (!bias_EO.defined()) return y_NO;
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) { y_NO.narrow(0, first,
                                                                                        rows).add_(bias_EO.select(0, e)); });
  return y_NO;
}

Tensor grouped_outputs(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1,
                       GroupedProduct product) {
  if (product != GroupedProduct::kLoop)
    return with_bias(joint_product(product, x_ND, weight_EOD.transpose(1, 2), offsets_E1), bias_EO, offsets_E1);
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

Tensor grouped_input_grad(const Tensor& grad_NO, const Tensor& weight_EOD, const Tensor& offsets_E1, GroupedProduct product) {
  if (product != GroupedProduct::kLoop) return joint_product(product, grad_NO, weight_EOD, offsets_E1);
  Tensor grad_ND = at::empty({grad_NO.size(0), weight_EOD.size(2)}, grad_NO.options());
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    if (rows == 0) return;
    Tensor out = grad_ND.narrow(0, first, rows);
    at::mm_out(out, grad_NO.narrow(0, first, rows), weight_EOD.select(0, e));
  });
  return grad_ND;
}

// Each expert's gradient is written into its slice of one stacked tensor; only experts without rows are zeroed.
Tensor grouped_weight_grad(const Tensor& grad_NO, const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& offsets_E1,
                           GroupedProduct product) {
  if (product == GroupedProduct::kGrouped)
    return at::_grouped_mm(grad_NO.t(), x_ND, library_ends(x_ND, offsets_E1)).contiguous();
  if (product == GroupedProduct::kBmm)
    return padded_groups(grad_NO, offsets_E1).transpose(1, 2).bmm(padded_groups(x_ND, offsets_E1));
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

Tensor reference_outputs(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1) {
  std::vector<Tensor> outputs;
  for_each_expert(offsets_E1, [&](int64_t e, int64_t first, int64_t rows) {
    const Tensor bias_O = bias_EO.defined() ? bias_EO.select(0, e) : Tensor();
    outputs.push_back(at::linear(x_ND.narrow(0, first, rows), weight_EOD.select(0, e), bias_O));
  });
  return at::cat(outputs);
}

// The bias comes last: an absent one is no input of the graph.
struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& offsets_E1,
                        const std::optional<Tensor>& bias_EO) {
    const GroupedProduct product = possible_product(grouped_product(), x_ND, weight_EOD, offsets_E1);
    ctx->saved_data["product"] = static_cast<int64_t>(product);
    ctx->save_for_backward({x_ND, weight_EOD, offsets_E1});
    ctx->saved_data["bias"] = bias_EO.has_value();
    return grouped_outputs(x_ND, weight_EOD, bias_EO.value_or(Tensor()), offsets_E1, product);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (at::GradMode::is_enabled()) usage_error("experts: second derivatives are not supported; use create_graph = false");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x_ND = saved[0], &weight_EOD = saved[1], &offsets_E1 = saved[2];
    const Tensor grad_NO = grads[0].contiguous();  // a sum's gradient comes with strides 0
    const bool bias = ctx->saved_data["bias"].toBool();
    const auto product = static_cast<GroupedProduct>(ctx->saved_data["product"].toInt());
    variable_list out(4);
    if (ctx->needs_input_grad(0)) out[0] = grouped_input_grad(grad_NO, weight_EOD, offsets_E1, product);
    if (ctx->needs_input_grad(1)) out[1] = grouped_weight_grad(grad_NO, x_ND, weight_EOD, offsets_E1, product);
    if (bias && ctx->needs_input_grad(3)) out[3] = grouped_bias_grad(grad_NO, weight_EOD.size(0), offsets_E1);
    return out;
  }
};

}  // namespace

GroupedProductGuard::GroupedProductGuard(GroupedProduct product) : before_(current_product) { current_product = product; }
GroupedProductGuard::~GroupedProductGuard() { current_product = before_; }
GroupedProduct grouped_product() { return current_product; }

Tensor autocast_operand(const Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

Tensor grouped_linear(const Tensor& x_ND, const Tensor& weight_EOD, const Tensor& bias_EO, const Tensor& offsets_E1) {
  check_invariant(offsets_E1.numel() == weight_EOD.size(0) + 1, "grouped_linear: one offset per expert and one more expected");
  check_invariant(offsets_E1.const_data_ptr<int64_t>()[weight_EOD.size(0)] == x_ND.size(0),
                  "grouped_linear: the offsets do not end at the last row");
  const Tensor x = autocast_operand(x_ND).contiguous(), weight = autocast_operand(weight_EOD);
  if (grouped_product() == GroupedProduct::kReference) return reference_outputs(x, weight, bias_EO, offsets_E1);
  if (!bias_EO.defined()) return GroupedLinear::apply(x, weight, offsets_E1, std::nullopt);
  return GroupedLinear::apply(x, weight, offsets_E1, autocast_operand(bias_EO));
}

}  // namespace moelab
