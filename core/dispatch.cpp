// Moving rows to their pairs and back. Every output row is made by one thread in a fixed order, so one and two threads give the
// same bits; nothing is added atomically.
#include "core/error.h"
#include "core/execute.h"
#include "core/parallel.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

#define MOELAB_FLOATING(tensor, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, (tensor).scalar_type(), name, __VA_ARGS__)

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kElementsPerTask = 1 << 15;  // below this a second thread costs more than it brings

template <class Body>
void for_rows(int64_t rows, int64_t columns, Body body) {
  parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Eight running sums: the order is fixed, and the processor need not wait for one addition to start the next.
template <class Scalar, class Sum = at::opmath_type<Scalar>>
Sum dot_product(const Scalar* a, const Scalar* b, int64_t count) {
  Sum lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int64_t j = 0; j < 8; ++j) lane[j] += static_cast<Sum>(a[i + j]) * static_cast<Sum>(b[i + j]);
  for (; i < count; ++i) lane[0] += static_cast<Sum>(a[i]) * static_cast<Sum>(b[i]);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// What the three loops below do, by the library's calls: on other devices. Sums have the same order, and are not atomic either.
struct ByLibrary {
  static Tensor gather_pairs(const Tensor& in_TD, const Tensor& token_N, const Tensor& weight_N) {
    const Tensor rows_ND = in_TD.index_select(0, token_N);
    return weight_N.defined() ? rows_ND.mul(weight_N.unsqueeze(1)).to(in_TD.scalar_type()) : rows_ND;
  }

  static Tensor reduce_pairs(const Tensor& in_ND, const Tensor& slot_TK, const Tensor& weight_N) {
    Tensor sum_TD = at::zeros({slot_TK.size(0), in_ND.size(1)}, in_ND.options().dtype(at::toOpMathType(in_ND.scalar_type())));
    for (int64_t k = 0; in_ND.size(0) > 0 && k < slot_TK.size(1); ++k) {
      const Tensor slot_T = slot_TK.select(1, k), there_T = slot_T.clamp_min(0);
      const Tensor rows_TD = in_ND.index_select(0, there_T).masked_fill(slot_T.lt(0).unsqueeze(1), 0);
      sum_TD.add_(weight_N.defined() ? rows_TD.mul(weight_N.index_select(0, there_T).unsqueeze(1)) : rows_TD);
    }
    return sum_TD.to(in_ND.scalar_type());
  }

  static Tensor pair_products(const Tensor& a_TD, const Tensor& b_ND, const Tensor& token_N) {
    return a_TD.index_select(0, token_N).to(at::toOpMathType(b_ND.scalar_type())).mul(b_ND).sum(1);
  }
};

// out[n] = weight[n]·in[token[n]]; undefined weights are 1.
Tensor gather_pairs(const Tensor& in_TD, const Tensor& token_N, const Tensor& weight_N) {
  if (!in_TD.is_cpu()) return ByLibrary::gather_pairs(in_TD, token_N, weight_N);
  const int64_t pairs = token_N.numel(), width = in_TD.size(1);
  Tensor out_ND = at::empty({pairs, width}, in_TD.options());
  MOELAB_FLOATING(in_TD, "gather_pairs", [&] {
    using Sum = at::opmath_type<scalar_t>;
    const scalar_t* in = in_TD.const_data_ptr<scalar_t>();
    const int64_t* token = token_N.const_data_ptr<int64_t>();
    const Sum* weight = weight_N.defined() ? weight_N.const_data_ptr<Sum>() : nullptr;
    scalar_t* out = out_ND.mutable_data_ptr<scalar_t>();
    for_rows(pairs, width, [&](int64_t n) {
      const scalar_t* from = in + token[n] * width;
      scalar_t* to = out + n * width;
      if (weight == nullptr) std::copy_n(from, width, to);
      else for (int64_t d = 0; d < width; ++d) to[d] = static_cast<scalar_t>(weight[n] * static_cast<Sum>(from[d]));
    });
  });
  return out_ND;
}

// out[t] = Σ_k weight[slot[t,k]]·in[slot[t,k]] over the slots that are not -1, in the order of k; undefined weights are 1.
Tensor reduce_pairs(const Tensor& in_ND, const Tensor& slot_TK, const Tensor& weight_N) {
  if (!in_ND.is_cpu()) return ByLibrary::reduce_pairs(in_ND, slot_TK, weight_N);
  const int64_t rows = slot_TK.size(0), choices = slot_TK.size(1), width = in_ND.size(1);
  Tensor out_TD = at::empty({rows, width}, in_ND.options());
  MOELAB_FLOATING(in_ND, "reduce_pairs", [&] {
    using Sum = at::opmath_type<scalar_t>;
    const scalar_t* in = in_ND.const_data_ptr<scalar_t>();
    const int64_t* slot = slot_TK.const_data_ptr<int64_t>();
    const Sum* weight = weight_N.defined() ? weight_N.const_data_ptr<Sum>() : nullptr;
    scalar_t* out = out_TD.mutable_data_ptr<scalar_t>();
    for_rows(rows, width * std::max<int64_t>(1, choices), [&](int64_t t) {
      thread_local std::vector<Sum> sum;
      sum.assign(static_cast<size_t>(width), Sum(0));
      for (int64_t k = 0; k < choices; ++k) {
        const int64_t n = slot[t * choices + k];
        if (n < 0) continue;
        const Sum w = weight == nullptr ? Sum(1) : weight[n];
        const scalar_t* from = in + n * width;
        for (int64_t d = 0; d < width; ++d) sum[static_cast<size_t>(d)] += w * static_cast<Sum>(from[d]);
      }
      for (int64_t d = 0; d < width; ++d) out[t * width + d] = static_cast<scalar_t>(sum[static_cast<size_t>(d)]);
    });
  });
  return out_TD;
}

// out[n] = ⟨a[token[n]], b[n]⟩, in float32 or better.
Tensor pair_products(const Tensor& a_TD, const Tensor& b_ND, const Tensor& token_N) {
  if (!b_ND.is_cpu()) return ByLibrary::pair_products(a_TD, b_ND, token_N);
  const int64_t pairs = token_N.numel(), width = b_ND.size(1);
  Tensor out_N = at::empty({pairs}, b_ND.options().dtype(at::toOpMathType(b_ND.scalar_type())));
  MOELAB_FLOATING(b_ND, "pair_products", [&] {
    const scalar_t* a = a_TD.const_data_ptr<scalar_t>();
    const scalar_t* b = b_ND.const_data_ptr<scalar_t>();
    const int64_t* token = token_N.const_data_ptr<int64_t>();
    at::opmath_type<scalar_t>* out = out_N.mutable_data_ptr<at::opmath_type<scalar_t>>();
    for_rows(pairs, width, [&](int64_t n) { out[n] = dot_product(a + token[n] * width, b + n * width, width); });
  });
  return out_N;
}

void refuse_second_derivative() {
  if (at::GradMode::is_enabled()) usage_error("dispatch: second derivatives are not supported; use create_graph = false");
}

struct DispatchRows : torch::autograd::Function<DispatchRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x_TD, const Tensor& token_N, const Tensor& slot_TK) {
    ctx->save_for_backward({slot_TK});
    return gather_pairs(x_TD, token_N, {});
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative();
    return {reduce_pairs(grads[0].contiguous(), ctx->get_saved_variables()[0], {}), {}, {}};
  }
};

struct CombineRows : torch::autograd::Function<CombineRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows_ND, const Tensor& gate_N, const Tensor& token_N,
                        const Tensor& slot_TK) {
    ctx->save_for_backward({rows_ND, gate_N, token_N});
    return reduce_pairs(rows_ND, slot_TK, gate_N);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_second_derivative();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor grad_TD = grads[0].contiguous();
    variable_list out(4);
    if (ctx->needs_input_grad(0)) out[0] = gather_pairs(grad_TD, saved[2], saved[1]);
    if (ctx->needs_input_grad(1)) out[1] = pair_products(grad_TD, saved[0], saved[2]);
    return out;
  }
};

}  // namespace

// Plans lie on the CPU; rows and gates may lie elsewhere.
Tensor dispatch_rows(const Tensor& x_TD, const SparsePlan& plan) {
  check_invariant(x_TD.size(0) == plan.rows, "dispatch_rows: the plan was made for another number of rows");
  const at::Device device = x_TD.device();
  return DispatchRows::apply(x_TD.contiguous(), plan.token_N.to(device).contiguous(), plan.slot_TK.to(device).contiguous());
}

Tensor combine_rows(const Tensor& rows_ND, const SparsePlan& plan) {
  check_invariant(rows_ND.size(0) == plan.token_N.numel(), "combine_rows: one row per pair expected");
  const at::Device device = rows_ND.device();
  const Tensor gate_N = plan.gate_N.to(at::toOpMathType(rows_ND.scalar_type())).contiguous();
  return CombineRows::apply(rows_ND.contiguous(), gate_N, plan.token_N.to(device).contiguous(),
                            plan.slot_TK.to(device).contiguous());
}

}  // namespace moelab
