// The plain evaluation Y = C · F(Dᵀ X ; A Θ): D, A and C as dense matrices, products that autograd differentiates by itself.
#include "core/error.h"
#include "core/execute.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace moelab {
namespace {

// J slots in groups that share one mixture of expert parameters.
struct SlotMatrices {
  Tensor read_TJ;      // D
  Tensor group_J;      // int64; slots of one group share a row of A
  Tensor mixture_GE;   // the distinct rows of A; undefined: group e uses expert e alone
  Tensor write_TJ;     // C
};

Tensor indices_of(const Tensor& mask) { return mask.nonzero().squeeze(1); }

Tensor run_group(const SlotMatrices& slots, const ExpertBank& bank, int64_t group, const Tensor& rows_ND) {
  if (slots.mixture_GE.defined()) return bank.forward_with(bank.merge(slots.mixture_GE.select(0, group)), rows_ND);
  return bank.forward_expert(group, bank.parameters_of(group), rows_ND);
}

// F, group by group, with explicit parameters.
Tensor run_groups(const SlotMatrices& slots, const ExpertBank& bank, const Tensor& inputs_JD) {
  const int64_t groups = slots.mixture_GE.defined() ? slots.mixture_GE.size(0) : bank.experts();
  std::vector<Tensor> outputs, members;
  for (int64_t g = 0; g < groups; ++g) {
    members.push_back(indices_of(slots.group_J.eq(g)).to(inputs_JD.device()));
    outputs.push_back(run_group(slots, bank, g, inputs_JD.index_select(0, members.back())));
  }
  return at::cat(outputs).index_select(0, at::argsort(at::cat(members)));
}

// F of banks that only know their own forward: the slots lie expert by expert, so the groups become offsets.
Tensor run_bank(const SlotMatrices& slots, const ExpertBank& bank, const Tensor& inputs_JD, const SparsePlan* plan,
                const ExecuteInput& input) {
  const Tensor offsets_E1 = at::searchsorted(slots.group_J.cpu(), at::arange(bank.experts() + 1, at::kLong));
  return bank.forward({.rows_ND = inputs_JD, .offsets_E1 = offsets_E1, .plan = plan, .input_TD = input.x_TD,
                       .sequence_T = input.sequence_T, .cu_seqlens_B1 = input.cu_seqlens_B1, .cache = input.cache,
                       .training = input.training},
                      0);
}

Tensor evaluate(const SlotMatrices& slots, const ExpertBank& bank, const Tensor& x_TD, const SparsePlan* plan,
                const ExecuteInput& input) {
  const Tensor inputs_JD = slots.read_TJ.to(x_TD.scalar_type()).t().matmul(x_TD);
  const Tensor outputs_JD = bank.has_forward_expert() ? run_groups(slots, bank, inputs_JD)
                                                    : run_bank(slots, bank, inputs_JD, plan, input);
  return slots.write_TJ.to(outputs_JD.scalar_type()).matmul(outputs_JD);
}

Tensor reference_sparse(const SparsePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  const Tensor row_T1 = at::arange(plan.rows, plan.token_N.options()).unsqueeze(1);
  const Tensor read_TJ = row_T1.eq(plan.token_N.unsqueeze(0)).to(plan.gate_N.device(), plan.gate_N.scalar_type());
  return evaluate({.read_TJ = read_TJ, .group_J = plan.expert_N, .mixture_GE = {}, .write_TJ = read_TJ.mul(plan.gate_N)}, bank,
                  input.x_TD, &plan, input);
}

// [0, output width], on the graph of the input.
Tensor no_rows(const ExpertBank& bank, const ExecuteInput& input) {
  return input.x_TD.matmul(at::zeros({input.x_TD.size(1), bank.output_width(0)}, input.x_TD.options().requires_grad(false)));
}

Tensor reference_merge(const MergePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  if (input.x_TD.size(0) == 0) return no_rows(bank, input);  // there may be no group to run
  const Tensor identity_TT = at::eye(input.x_TD.size(0), input.x_TD.options());
  return evaluate({.read_TJ = identity_TT, .group_J = plan.group_of_token_T, .mixture_GE = plan.alpha_GE,
                   .write_TJ = identity_TT}, bank, input.x_TD, nullptr, input);
}

Tensor soft_sequence(const SoftPlan& plan, const SoftMatrices& matrices, const ExpertBank& bank, const ExecuteInput& input) {
  const Tensor slot_S = at::arange(plan.experts * plan.slots_per_expert, plan.sequence_T.options());
  return evaluate({.read_TJ = matrices.dispatch_MS, .group_J = slot_S.floor_divide(plan.slots_per_expert), .mixture_GE = {},
                   .write_TJ = matrices.combine_MS}, bank, input.x_TD.index_select(0, matrices.row_M), nullptr, input);
}

Tensor reference_soft(const SoftPlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  if (input.x_TD.size(0) == 0) return no_rows(bank, input);  // nor a sequence
  std::vector<Tensor> outputs, rows;
  for (int64_t b = 0; b < plan.sequences; ++b) {
    const SoftMatrices matrices = soft_matrices(plan, b);
    outputs.push_back(soft_sequence(plan, matrices, bank, input));
    rows.push_back(matrices.row_M);
  }
  return at::cat(outputs).index_select(0, at::argsort(at::cat(rows)));  // back to the order of the input
}

Tensor soft_noise(const SoftPlan& plan, const Tensor& row_M, const Tensor& like_MS) {
  const Tensor rows = row_M.cpu();
  if (plan.noise_TS.defined()) return plan.noise_TS.cpu().narrow(1, 0, like_MS.size(1)).index_select(0, rows).to(like_MS);
  return normal_rows(plan.noise_key, plan.sequence_key_T.index_select(0, rows), plan.position_T.index_select(0, rows),
                     like_MS.size(1), like_MS.scalar_type()).to(like_MS.device());
}

// Float32 or better, whatever the rows' dtype.
Tensor soft_logits(const SoftPlan& plan, const Tensor& row_M) {
  const at::ScalarType dtype = plan.query_TD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Tensor query_MD = plan.query_TD.index_select(0, row_M).to(dtype);
  const Tensor logits_MS = query_MD.matmul(plan.key_SD.to(dtype).t()).mul(plan.scale.to(dtype));
  return plan.noise_std > 0 ? logits_MS.add(soft_noise(plan, row_M, logits_MS), plan.noise_std) : logits_MS;
}

// Weights along `axis`: over the rows for dispatch (0), over the slots for combine (1).
Tensor soft_weights(SlotWeights mode, const Tensor& logits_MS, int64_t axis) {
  if (mode == SlotWeights::kSoft) return at::log_softmax(logits_MS, axis).exp();
  if (mode == SlotWeights::kIdentity) return at::eye(logits_MS.size(0), logits_MS.size(1), logits_MS.options());
  return at::full(logits_MS.sizes(), 1.0 / static_cast<double>(std::max<int64_t>(1, logits_MS.size(axis))), logits_MS.options());
}

// Zeros for the slots that the plan's key lacks.
Tensor with_all_slots(const SoftPlan& plan, const Tensor& weights_MS) {
  const int64_t missing = plan.experts * plan.slots_per_expert - weights_MS.size(1);
  return missing == 0 ? weights_MS : at::constant_pad_nd(weights_MS, {0, missing});
}

// C summed over all rows, a block of them at a time. Even and paired weights give every slot the same.
Tensor soft_expert_weights_E(const SoftPlan& plan) {
  constexpr int64_t block = 1024;
  const int64_t rows = plan.query_TD.size(0), slots = plan.key_SD.size(0);
  const auto options = plan.query_TD.options().dtype(at::kDouble);
  Tensor weight_S = at::full({slots}, static_cast<double>(rows) / static_cast<double>(slots), options);
  if (plan.combine == SlotWeights::kSoft) weight_S.zero_();
  for (int64_t first = 0; plan.combine == SlotWeights::kSoft && first < rows; first += block) {
    const Tensor row_M = at::arange(first, std::min(rows, first + block), options.dtype(at::kLong));
    weight_S.add_(soft_weights(plan.combine, soft_logits(plan, row_M), 1).sum(0, false, at::kDouble));
  }
  return with_all_slots(plan, weight_S.unsqueeze(0)).view({plan.experts, plan.slots_per_expert}).sum(1).cpu();
}

Tensor merge_expert_weights_E(const MergePlan& plan) {
  const Tensor rows_G = at::bincount(plan.group_of_token_T, {}, plan.alpha_GE.size(0)).to(at::kDouble);
  return plan.alpha_GE.to(at::kDouble).cpu().mul(rows_G.cpu().unsqueeze(1)).sum(0);
}

}  // namespace

Tensor expert_weights_E(const Plan& plan) {
  const at::NoGradGuard no_grad;
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) return soft_expert_weights_E(*soft);
  const auto* merge = std::get_if<MergePlan>(&plan);
  return merge ? merge_expert_weights_E(*merge) : Tensor();
}

SoftMatrices soft_matrices(const SoftPlan& plan, int64_t sequence) {
  const Tensor row_M = indices_of(plan.sequence_T.eq(sequence)).to(plan.query_TD.device());
  const Tensor logits_MS = soft_logits(plan, row_M);
  return {.row_M = row_M, .dispatch_MS = with_all_slots(plan, soft_weights(plan.dispatch, logits_MS, 0)),
          .combine_MS = with_all_slots(plan, soft_weights(plan.combine, logits_MS, 1))};
}

Tensor execute_reference(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  if (const auto* sparse = std::get_if<SparsePlan>(&plan)) return reference_sparse(*sparse, bank, input);
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) return reference_soft(*soft, bank, input);
  return reference_merge(std::get<MergePlan>(plan), bank, input);
}

}  // namespace moelab
