#include "core/ffn_layer.h"

#include "core/error.h"
#include "core/ffn_engine.h"
#include "core/grouped.h"
#include "core/parallel.h"

#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The optional inputs in a fixed order: gate, token, then six tensors of each group. Autograd's engine must not see undefined
// ones, so the call gets the others alone and a list of which they are.
constexpr size_t kRowInputs = 2, kGroupInputs = 6;

struct FfnSettings {
  FfnActivation activation;
  std::vector<int64_t> first;    // of each group
  std::vector<int64_t> present;  // 0 or 1 per optional input
  Tensor offsets_E1;
  bool keep = false;             // the pre-activations
};

variable_list group_tensors(const FfnGroup& g) {
  return {g.in_EFD, g.up_EFD, g.out_EDF, g.in_bias_EF, g.up_bias_EF, g.out_bias_ED};
}

variable_list optional_inputs(const FfnRows& rows, const std::vector<FfnGroup>& groups) {
  variable_list inputs{rows.gate_N, rows.token_N};
  for (const FfnGroup& group : groups)
    for (const Tensor& tensor : group_tensors(group)) inputs.push_back(tensor);
  return inputs;
}

variable_list with_gaps(at::TensorList given, const std::vector<int64_t>& present) {
  variable_list all;
  size_t next = 0;
  for (const int64_t there : present) all.push_back(there ? given[next++] : Tensor());
  return all;
}

variable_list without_gaps(const variable_list& all) {
  variable_list given;
  for (const Tensor& tensor : all)
    if (tensor.defined()) given.push_back(tensor);
  return given;
}

std::vector<FfnGroup> groups_from(at::TensorList inputs, const std::vector<int64_t>& first) {
  std::vector<FfnGroup> groups;
  for (size_t g = 0; g < first.size(); ++g) {
    const at::TensorList at = inputs.slice(kRowInputs + g * kGroupInputs, kGroupInputs);
    groups.push_back({first[g], at[0], at[1], at[2], at[3], at[4], at[5]});
  }
  return groups;
}

std::vector<FfnHidden> hidden_of(const FfnSettings& settings, const std::vector<FfnGroup>& groups, const FfnRows& rows) {
  std::vector<FfnHidden> hidden(groups.size());
  const int64_t* offset = rows.offsets_E1.const_data_ptr<int64_t>();
  for (size_t g = 0; settings.keep && g < groups.size(); ++g) {
    const int64_t pairs = offset[groups[g].first + groups[g].in_EFD.size(0)] - offset[groups[g].first];
    hidden[g].in_NF = at::empty({pairs, groups[g].in_EFD.size(1)}, rows.x_TD.options());
    if (settings.activation == FfnActivation::kSwiglu) hidden[g].up_NF = at::empty_like(hidden[g].in_NF);
  }
  return hidden;
}

// What rows of x are summed into: float or better where several pairs meet in a row.
Tensor row_sums(const FfnRows& rows) {
  if (!rows.token_N.defined()) return at::empty(rows.x_TD.sizes(), rows.x_TD.options());
  return at::zeros(rows.x_TD.sizes(), rows.x_TD.options().dtype(at::toOpMathType(rows.x_TD.scalar_type())));
}

// Only experts without rows are zeroed, by all threads: the others' first block writes.
Tensor weight_gradient(const Tensor& weight, int64_t first, const Tensor& offsets_E1) {
  Tensor grad = at::empty(weight.sizes(), weight.options());
  const int64_t* offset = offsets_E1.const_data_ptr<int64_t>() + first;
  const size_t bytes = static_cast<size_t>(grad.stride(0)) * grad.element_size();
  std::vector<char*> without_rows;
  for (int64_t slot = 0; slot < grad.size(0); ++slot)
    if (offset[slot] == offset[slot + 1])
      without_rows.push_back(static_cast<char*>(grad.mutable_data_ptr()) + static_cast<size_t>(slot) * bytes);
  parallel_for(0, static_cast<int64_t>(without_rows.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memset(without_rows[static_cast<size_t>(i)], 0, bytes);
  });
  return grad;
}

Tensor bias_gradient(const Tensor& bias) {
  return at::zeros(bias.sizes(), bias.options().dtype(at::toOpMathType(bias.scalar_type())));
}

struct FfnFunction : torch::autograd::Function<FfnFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, at::TensorList given, const FfnSettings& settings) {
    const variable_list inputs = with_gaps(given, settings.present);
    const std::vector<FfnGroup> groups = groups_from(inputs, settings.first);
    const FfnRows rows{x_TD, inputs[1], inputs[0], settings.offsets_E1};
    const std::vector<FfnHidden> hidden = hidden_of(settings, groups, rows);
    const Tensor y_TD = row_sums(rows);
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x_TD.scalar_type(), "ffn_layer", [&] {
      FfnEngine<scalar_t>(settings.activation, groups, rows, hidden).forward(y_TD);
    });
    variable_list saved{x_TD, settings.offsets_E1};
    saved.insert(saved.end(), given.begin(), given.end());
    for (const FfnHidden& h : hidden) saved.insert(saved.end(), {h.in_NF, h.up_NF});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["first"] = settings.first;
    ctx->saved_data["present"] = settings.present;
    ctx->saved_data["activation"] = static_cast<int64_t>(settings.activation);
    return y_TD.to(x_TD.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (at::GradMode::is_enabled()) usage_error("experts: second derivatives are not supported; use create_graph = false");
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> first = ctx->saved_data["first"].toIntVector(), present = ctx->saved_data["present"].toIntVector();
    const auto activation = static_cast<FfnActivation>(ctx->saved_data["activation"].toInt());
    const variable_list inputs = with_gaps(at::TensorList(saved).slice(2), present);
    const FfnRows rows{saved[0], inputs[1], inputs[0], saved[1]};
    const std::vector<FfnGroup> groups = groups_from(inputs, first);
    std::vector<FfnHidden> hidden;
    for (size_t at = saved.size() - 2 * groups.size(); at < saved.size(); at += 2) hidden.push_back({saved[at], saved[at + 1]});
    const FfnGradients out = wanted(*ctx, inputs, first, rows);
    const Tensor grad_TD = grads[0].contiguous();  // a sum's gradient comes with strides 0
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.x_TD.scalar_type(), "ffn_layer", [&] {
      FfnEngine<scalar_t>(activation, groups, rows, hidden).backward(grad_TD, out);
    });
    return results(out, rows.x_TD, inputs);
  }

 private:
  static Tensor gradient_like(const Tensor& parameter, int64_t first, const Tensor& offsets_E1) {
    return parameter.dim() == 2 ? bias_gradient(parameter) : weight_gradient(parameter, first, offsets_E1);
  }

  static FfnGradients wanted(const AutogradContext& ctx, const variable_list& inputs, const std::vector<int64_t>& first,
                             const FfnRows& rows) {
    FfnGradients out;
    if (ctx.needs_input_grad(0)) out.x_TD = row_sums(rows);
    variable_list grads(inputs.size());
    size_t edge = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].defined() || !ctx.needs_input_grad(++edge) || i == 1) continue;
      grads[i] = i == 0 ? at::zeros(inputs[0].sizes(), inputs[0].options())
                        : gradient_like(inputs[i], first[(i - kRowInputs) / kGroupInputs], rows.offsets_E1);
    }
    out.gate_N = grads[0];
    out.groups = groups_from(grads, first);
    return out;
  }

  // In the dtypes and the order of the inputs that there were; then nothing for the settings.
  static variable_list results(const FfnGradients& out, const Tensor& x_TD, const variable_list& inputs) {
    variable_list grads{out.x_TD.defined() ? out.x_TD.to(x_TD.scalar_type()) : Tensor()};
    const variable_list all = optional_inputs({.x_TD = {}, .gate_N = out.gate_N, .offsets_E1 = {}}, out.groups);
    for (size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i].defined()) grads.push_back(all[i].defined() ? all[i].to(inputs[i].scalar_type()) : Tensor());
    grads.emplace_back();
    return grads;
  }
};

void check_rows(const std::vector<FfnGroup>& groups, const FfnRows& rows) {
  check_invariant(rows.x_TD.is_cpu() && rows.x_TD.dim() == 2, "ffn_layer: rows on the CPU expected");
  check_invariant(!rows.gate_N.defined() || rows.token_N.defined(), "ffn_layer: gates need tokens");
  int64_t experts = 0;
  for (const FfnGroup& group : groups) experts = std::max(experts, group.first + group.in_EFD.size(0));
  check_invariant(rows.offsets_E1.numel() > experts, "ffn_layer: one offset per expert and one more expected");
  const int64_t pairs = rows.token_N.defined() ? rows.token_N.numel() : rows.x_TD.size(0);
  const int64_t covered = rows.offsets_E1.const_data_ptr<int64_t>()[rows.offsets_E1.numel() - 1];
  check_invariant(covered == pairs, fmt::format("ffn_layer: offsets cover {} of {} rows", covered, pairs));
}

}  // namespace

Tensor ffn_layer(FfnActivation activation, const std::vector<FfnGroup>& groups, const FfnRows& rows, bool recompute) {
  check_rows(groups, rows);
  const Tensor x_TD = autocast_operand(rows.x_TD).contiguous();
  FfnSettings settings{.activation = activation, .first = {}, .present = {}, .offsets_E1 = rows.offsets_E1};
  for (const FfnGroup& group : groups) settings.first.push_back(group.first);
  variable_list inputs = optional_inputs(rows, groups);
  for (size_t i = 0; i < inputs.size(); ++i) {
    settings.present.push_back(inputs[i].defined());
    if (!inputs[i].defined()) continue;
    if (i == 0) inputs[i] = inputs[i].to(at::toOpMathType(x_TD.scalar_type()));
    if (i >= kRowInputs) inputs[i] = autocast_operand(inputs[i]);
    inputs[i] = inputs[i].contiguous();
  }
  const variable_list given = without_gaps(inputs);
  const auto trains = [](const Tensor& t) { return t.requires_grad(); };
  settings.keep = !recompute && at::GradMode::is_enabled() && (trains(x_TD) || std::any_of(given.begin(), given.end(), trains));
  return FfnFunction::apply(x_TD, at::TensorList(given), settings);
}

}  // namespace moelab
