// With L = scale·q·keyᵀ (+ noise), one block of rows at a time:
//
//   fill   D = exp(L − λ), λ_s = log Σ_m exp L_ms kept as running maximum and sum;  slots = Dᵀ·x
//          ∂L = D ∘ (x·Gᵀ − c), c_s = ⟨G_s, slots_s⟩;  ∂x = D·G
//   read   C = softmax of each row of L;  out = C·Y;  ∂L = C ∘ (g·Yᵀ − r), r_m = Σ_s C·(g·Yᵀ);  ∂Y = Cᵀ·g
//   both   ∂q = scale·∂L·key;  ∂key = scale·∂Lᵀ·q;  ∂scale = Σ q ∘ (∂L·key)
#include "core/execute_soft.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kBlockElements = 1 << 18;  // of a block's logits: 1 MiB in float

// Keys of the noise of each row, or the noise itself; undefined without noise.
struct BlockNoise {
  double std = 0;
  Tensor given_MS;
  RandomKey key;
  Tensor sequence_key_M, position_M;

  void add_to(Tensor& logits_BS, int64_t first) const {
    if (std <= 0) return;
    const int64_t rows = logits_BS.size(0), slots = logits_BS.size(1);
    const Tensor noise_BS = given_MS.defined() ? given_MS.narrow(0, first, rows).narrow(1, 0, slots).to(logits_BS)
                                               : normal_rows(key, sequence_key_M.narrow(0, first, rows),
                                                             position_M.narrow(0, first, rows),
                                                             slots, logits_BS.scalar_type()).to(logits_BS.device());
    logits_BS.add_(noise_BS, std);
  }
};

BlockNoise noise_of(const SoftSequence& sequence) {
  const SoftPlan& plan = *sequence.plan;
  if (plan.noise_std <= 0) return {};
  const Tensor rows = sequence.row_M.cpu();
  if (plan.noise_TS.defined()) return {plan.noise_std, plan.noise_TS.cpu().index_select(0, rows), {}, {}, {}};
  return {plan.noise_std, {}, plan.noise_key, plan.sequence_key_T.index_select(0, rows), plan.position_T.index_select(0, rows)};
}

// to = a·b, in the dtype of `to`.
void multiply_into(Tensor to, const Tensor& a, const Tensor& b) {
  if (to.scalar_type() == a.scalar_type()) at::mm_out(to, a, b);
  else to.copy_(a.mm(b));
}

// Visits the blocks of rows: visit(first row, rows, logits of the block).
template <class Visit>
void for_logit_blocks(const Tensor& query_MD, const Tensor& key_SD, const Tensor& scale, const BlockNoise& noise, Visit visit) {
  const int64_t rows = query_MD.size(0), slots = std::max<int64_t>(1, key_SD.size(0));
  const int64_t most = std::clamp<int64_t>(kBlockElements / slots, 16, 1024);
  const Tensor scaled_DS = key_SD.mul(scale).t();
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    Tensor logits_BS = query_MD.narrow(0, first, count).mm(scaled_DS);
    noise.add_to(logits_BS, first);
    visit(first, count, logits_BS);
  }
}

// Gradients of query, key and scale, gathered block by block.
struct LogitGradients {
  const Tensor &query_MD, &key_SD, &scale;
  Tensor grad_query_MD = at::empty(query_MD.sizes(), query_MD.options());
  Tensor grad_key_SD = at::zeros(key_SD.sizes(), key_SD.options());
  Tensor grad_scale = at::zeros(scale.sizes(), scale.options());

  void add(int64_t first, const Tensor& grad_BS) {
    const Tensor query_BD = query_MD.narrow(0, first, grad_BS.size(0)), towards_BD = grad_BS.mm(key_SD);
    Tensor to_BD = grad_query_MD.narrow(0, first, grad_BS.size(0));
    at::mul_out(to_BD, towards_BD, scale);
    grad_key_SD.addmm_(grad_BS.t(), query_BD);
    grad_scale.add_(towards_BD.mul(query_BD).sum());
  }
  void clear() {
    for (const Tensor& grad : {grad_query_MD, grad_key_SD, grad_scale}) grad.zero_();
  }
  variable_list in_order() { return {grad_query_MD, grad_key_SD.mul_(scale), grad_scale}; }
};

void refuse_graph() {
  if (at::GradMode::is_enabled()) usage_error("soft plans: second derivatives are not supported; use create_graph = false");
}

// Sums are in the logits' dtype, whatever that of the rows.
struct FillSlots : torch::autograd::Function<FillSlots> {
  static Tensor forward(AutogradContext* ctx, const Tensor& query_MD, const Tensor& key_SD, const Tensor& scale,
                        const Tensor& x_MD,
                        const BlockNoise& noise) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Tensor highest_S = at::full({key_SD.size(0)}, -std::numeric_limits<double>::infinity(), key_SD.options());
    Tensor sum_S = at::zeros({key_SD.size(0)}, key_SD.options()), slots_SD = at::zeros({key_SD.size(0), x_MD.size(1)},
                                                                                       key_SD.options());
    for_logit_blocks(query_MD, key_SD, scale, noise, [&](int64_t first, int64_t rows, Tensor& logits_BS) {
      const Tensor now_S = at::maximum(highest_S, logits_BS.amax(0)), shrink_S = highest_S.sub(now_S).exp_();
      const Tensor weight_BS = logits_BS.sub_(now_S).exp_();
      sum_S.mul_(shrink_S).add_(weight_BS.sum(0));
      slots_SD.mul_(shrink_S.unsqueeze(1)).addmm_(weight_BS.t(), x_MD.narrow(0, first, rows).to(weight_BS.scalar_type()));
      highest_S = now_S;
    });
    slots_SD.div_(sum_S.unsqueeze(1));
    ctx->save_for_backward({query_MD, key_SD, scale, x_MD, highest_S.add(sum_S.log()), slots_SD});
    keep_noise(ctx, noise);
    return slots_SD.to(x_MD.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_graph();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x_MD = saved[3], &level_S = saved[4], &slots_SD = saved[5];
    const Tensor grad_SD = grads[0].to(slots_SD.scalar_type()), constant_S = grad_SD.mul(slots_SD).sum(1);
    LogitGradients out{saved[0], saved[1], saved[2]};
    Tensor grad_x_MD = at::empty(x_MD.sizes(), x_MD.options());
    for_logit_blocks(saved[0], saved[1], saved[2], kept_noise(ctx), [&](int64_t first, int64_t rows, Tensor& logits_BS) {
      // Where one row has nearly all of a slot's weight, ∂L is a small difference: in a single block weights that sum to one,
      // and a mean made of the very terms that it is taken from, keep it exact.
      const bool all = rows == x_MD.size(0);
      const Tensor weight_BS = all ? logits_BS.softmax(0) : logits_BS.sub_(level_S).exp_();
      multiply_into(grad_x_MD.narrow(0, first, rows), weight_BS, grad_SD);
      Tensor grad_BS = x_MD.narrow(0, first, rows).to(grad_SD.scalar_type()).mm(grad_SD.t());
      const Tensor mean_S = all ? grad_BS.mul(weight_BS).sum(0) : constant_S;
      out.add(first, grad_BS.sub_(mean_S).mul_(weight_BS));
    });
    if (x_MD.size(0) == 1) out.clear();  // one row fills every slot whatever the logits; rounding says otherwise
    variable_list all = out.in_order();
    all.insert(all.end(), {grad_x_MD, Tensor()});
    return all;
  }

  static void keep_noise(AutogradContext* ctx, const BlockNoise& noise) {
    ctx->saved_data["std"] = noise.std;
    if (noise.std <= 0) return;
    ctx->saved_data["key"] = static_cast<int64_t>(noise.key.value);
    ctx->saved_data["noise"] = noise.given_MS.defined() ? std::vector<Tensor>{noise.given_MS}
                                                        : std::vector<Tensor>{noise.sequence_key_M, noise.position_M};
  }

  static BlockNoise kept_noise(AutogradContext* ctx) {
    BlockNoise noise{.std = ctx->saved_data["std"].toDouble(), .given_MS = {}, .key = {}, .sequence_key_M = {}, .position_M = {}};
    if (noise.std <= 0) return noise;
    noise.key.value = static_cast<uint64_t>(ctx->saved_data["key"].toInt());
    const auto kept = ctx->saved_data["noise"].toTensorVector();
    if (kept.size() == 1) noise.given_MS = kept[0];
    else noise.sequence_key_M = kept[0], noise.position_M = kept[1];
    return noise;
  }
};

struct ReadSlots : torch::autograd::Function<ReadSlots> {
  static Tensor forward(AutogradContext* ctx, const Tensor& query_MD, const Tensor& key_SD, const Tensor& scale,
                        const Tensor& slots_SW,
                        const BlockNoise& noise) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Tensor out_MW = at::empty({query_MD.size(0), slots_SW.size(1)}, slots_SW.options());
    for_logit_blocks(query_MD, key_SD, scale, noise, [&](int64_t first, int64_t rows, Tensor& logits_BS) {
      multiply_into(out_MW.narrow(0, first, rows), logits_BS.softmax(1), slots_SW.to(logits_BS.scalar_type()));
    });
    ctx->save_for_backward({query_MD, key_SD, scale, slots_SW});
    FillSlots::keep_noise(ctx, noise);
    return out_MW;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    refuse_graph();
    const variable_list saved = ctx->get_saved_variables();
    const Tensor slots_SW = saved[3].to(saved[0].scalar_type()), grad_MW = grads[0].to(saved[0].scalar_type());
    LogitGradients out{saved[0], saved[1], saved[2]};
    Tensor grad_slots_SW = at::zeros(slots_SW.sizes(), slots_SW.options());
    for_logit_blocks(saved[0], saved[1], saved[2], FillSlots::kept_noise(ctx),
                     [&](int64_t first, int64_t rows, Tensor& logits_BS) {
      const Tensor weight_BS = logits_BS.softmax(1), grad_BW = grad_MW.narrow(0, first, rows);
      grad_slots_SW.addmm_(weight_BS.t(), grad_BW);
      Tensor grad_BS = grad_BW.mm(slots_SW.t()).mul_(weight_BS);
      out.add(first, grad_BS.sub_(weight_BS.mul(grad_BS.sum(1, /*keepdim=*/true))));
    });
    variable_list all = out.in_order();
    all.insert(all.end(), {grad_slots_SW.to(saved[3].scalar_type()), Tensor()});
    return all;
  }
};

// The first `rows` rows, zeros after those that there are.
Tensor rows_or_zeros(const Tensor& from, int64_t rows) {
  const Tensor there = from.narrow(0, 0, std::min(rows, from.size(0)));
  return there.size(0) == rows ? there : at::constant_pad_nd(there, {0, 0, 0, rows - there.size(0)});
}

at::ScalarType logit_dtype(const SoftPlan& plan) { return plan.query_TD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace

SoftSequence sequence_of(const SoftPlan& plan, int64_t sequence) {
  const Tensor row_M = plan.sequence_T.eq(sequence).nonzero().squeeze(1).to(plan.query_TD.device());
  return {&plan, row_M, plan.query_TD.index_select(0, row_M).to(logit_dtype(plan))};
}

Tensor fill_slots(const SoftSequence& sequence, const Tensor& x_MD) {
  const SoftPlan& plan = *sequence.plan;
  const int64_t slots = plan.key_SD.size(0);
  if (x_MD.size(0) == 0) return at::zeros({slots, x_MD.size(1)}, x_MD.options());
  if (plan.dispatch == SlotWeights::kIdentity) return rows_or_zeros(x_MD, slots);
  if (plan.dispatch == SlotWeights::kUniform) return x_MD.mean(0, /*keepdim=*/true).expand({slots, -1});
  const at::ScalarType dtype = logit_dtype(plan);
  return FillSlots::apply(sequence.query_MD, plan.key_SD.to(dtype), plan.scale.to(dtype), x_MD, noise_of(sequence));
}

Tensor read_slots(const SoftSequence& sequence, const Tensor& slots_SW) {
  const SoftPlan& plan = *sequence.plan;
  const int64_t rows = sequence.row_M.numel();
  if (plan.combine == SlotWeights::kIdentity) return rows_or_zeros(slots_SW, rows);
  if (plan.combine == SlotWeights::kUniform) return slots_SW.mean(0, /*keepdim=*/true).expand({rows, -1});
  const at::ScalarType dtype = logit_dtype(plan);
  return ReadSlots::apply(sequence.query_MD, plan.key_SD.to(dtype), plan.scale.to(dtype), slots_SW, noise_of(sequence));
}

}  // namespace moelab
