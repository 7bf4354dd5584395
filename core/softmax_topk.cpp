// Softmax and top-k of each row in one pass: the row's logits are read once, and its probabilities are still in the cache when
// the largest are sought.
#include "core/error.h"
#include "core/parallel.h"
#include "core/row_loops.h"
#include "core/select.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Body>
void for_blocks(int64_t rows, int64_t columns, Body body) {
  constexpr int64_t kElementsPerTask = 1 << 14;
  parallel_for(0, rows, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns)), body);
}

template <class Scalar>
void choose_rows(const Tensor& logits_TE, Tensor& probs_TE, Tensor& choice_TK, Tensor& prob_TK) {
  const int64_t columns = logits_TE.size(1), k = choice_TK.size(1);
  const Scalar* logits = logits_TE.const_data_ptr<Scalar>();
  Scalar* probs = probs_TE.mutable_data_ptr<Scalar>();
  int64_t* choice = choice_TK.mutable_data_ptr<int64_t>();
  Scalar* prob = prob_TK.mutable_data_ptr<Scalar>();
  for_blocks(logits_TE.size(0), columns, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      softmax_row(logits + t * columns, probs + t * columns, columns);
      topk_of_row(logits + t * columns, columns, k, choice + t * k);
      for (int64_t i = 0; i < k; ++i) prob[t * k + i] = probs[t * columns + choice[t * k + i]];
    }
  });
}

// d logits = p ∘ (g − ⟨p, g⟩), where g is the gradient of the probabilities plus that of the chosen ones at their places.
template <class Scalar>
void choose_rows_backward(const Tensor& probs_TE, const Tensor& choice_TK, const Tensor& grad_TE, const Tensor& grad_TK,
                          Tensor& out_TE) {
  const int64_t columns = probs_TE.size(1), k = choice_TK.size(1);
  const Scalar* probs = probs_TE.const_data_ptr<Scalar>();
  const int64_t* choice = choice_TK.const_data_ptr<int64_t>();
  const Scalar* full = grad_TE.defined() ? grad_TE.const_data_ptr<Scalar>() : nullptr;
  const Scalar* chosen = grad_TK.defined() ? grad_TK.const_data_ptr<Scalar>() : nullptr;
  Scalar* out = out_TE.mutable_data_ptr<Scalar>();
  for_blocks(probs_TE.size(0), columns, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Scalar* row = out + t * columns;
      if (full) std::copy_n(full + t * columns, columns, row);
      else std::fill_n(row, columns, Scalar(0));
      for (int64_t i = 0; chosen && i < k; ++i) row[choice[t * k + i]] += chosen[t * k + i];
      softmax_row_backward(probs + t * columns, row, columns);
    }
  });
}

struct SoftmaxTopkFunction : torch::autograd::Function<SoftmaxTopkFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits_TE, int64_t k) {
    const int64_t rows = logits_TE.size(0);
    Tensor probs_TE = at::empty_like(logits_TE), prob_TK = at::empty({rows, k}, logits_TE.options());
    Tensor choice_TK = at::empty({rows, k}, logits_TE.options().dtype(at::kLong));
    if (logits_TE.scalar_type() == at::kDouble) choose_rows<double>(logits_TE, probs_TE, choice_TK, prob_TK);
    else choose_rows<float>(logits_TE, probs_TE, choice_TK, prob_TK);
    ctx->save_for_backward({probs_TE, choice_TK});
    ctx->mark_non_differentiable({choice_TK});
    ctx->set_materialize_grads(false);
    return {probs_TE, choice_TK, prob_TK};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (at::GradMode::is_enabled()) usage_error("router: second derivatives are not supported; use create_graph = false");
    const variable_list saved = ctx->get_saved_variables();
    if (!grads[0].defined() && !grads[2].defined()) return {Tensor(), Tensor()};
    for (Tensor& grad : grads)
      if (grad.defined()) grad = grad.contiguous();
    Tensor out_TE = at::empty_like(saved[0]);
    if (out_TE.scalar_type() == at::kDouble) choose_rows_backward<double>(saved[0], saved[1], grads[0], grads[2], out_TE);
    else choose_rows_backward<float>(saved[0], saved[1], grads[0], grads[2], out_TE);
    return {out_TE, Tensor()};
  }
};

}  // namespace

SoftmaxTopk softmax_topk(const Tensor& logits_TE, int64_t k) {
  check_invariant(logits_TE.dim() == 2 && k >= 0 && k <= logits_TE.size(1), "softmax_topk: k is outside 0 … E");
  if (!logits_TE.is_cpu()) {
    const Tensor probs_TE = logits_TE.softmax(1), choice_TK = stable_topk(logits_TE, k);
    return {probs_TE, choice_TK, probs_TE.gather(1, choice_TK)};
  }
  const variable_list out = SoftmaxTopkFunction::apply(logits_TE.contiguous(), k);
  return {out[0], out[1], out[2]};
}

}  // namespace moelab
