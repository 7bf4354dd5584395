#include "core/execute.h"

#include "core/error.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

Tensor execute_sparse(const SparsePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  return combine_rows(map_pairs(plan, bank, dispatch_rows(input.x_TD, plan), input), plan);
}

// Group after group through its merged expert; groups without rows cost nothing.
Tensor execute_merge(const MergePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  const Tensor& group_T = plan.group_of_token_T;
  const Tensor order_T = group_T.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor rows_TD = input.x_TD.index_select(0, order_T.to(input.x_TD.device()));
  const Tensor count_G = at::bincount(group_T, {}, plan.alpha_GE.size(0)).cpu();
  const auto* count = count_G.const_data_ptr<int64_t>();
  std::vector<Tensor> outputs;
  for (int64_t g = 0, first = 0; g < count_G.numel(); first += count[g++])
    if (count[g] > 0)
      outputs.push_back(
          bank.forward_with(bank.merge(plan.alpha_GE.select(0, g)), rows_TD.narrow(0, first, count[g])));
  return at::cat(outputs).index_select(0, order_T.argsort().to(rows_TD.device()));
}

// The slots of all sequences, expert by expert, through the bank at once: [B,S,D] to [B,S,output width].
Tensor run_slots(const SoftPlan& plan, const ExpertBank& bank, const Tensor& slots_BSD, const ExecuteInput& input) {
  const int64_t sequences = slots_BSD.size(0), experts = plan.experts, slots = plan.slots_per_expert;
  const Tensor by_expert = slots_BSD.view({sequences, experts, slots, -1}).transpose(0, 1);
  const Tensor rows_ND = by_expert.reshape({experts * sequences * slots, slots_BSD.size(2)});
  const Tensor offsets_E1 = at::arange(experts + 1, at::kLong).mul(sequences * slots);
  const Tensor outputs_ND = bank.forward({.rows_ND = rows_ND, .offsets_E1 = offsets_E1, .input_TD = input.x_TD,
                                          .sequence_T = input.sequence_T, .cu_seqlens_B1 = input.cu_seqlens_B1,
                                          .cache = input.cache, .training = input.training}, 0);
  return outputs_ND.reshape({experts, sequences, slots, -1}).transpose(0, 1).reshape({sequences, experts * slots, -1});
}

Tensor execute_soft(const SoftPlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  std::vector<SoftMatrices> matrices;
  std::vector<Tensor> slots, outputs, rows;
  for (int64_t b = 0; b < plan.sequences; ++b) {
    matrices.push_back(soft_matrices(plan, b));
    const Tensor x_MD = input.x_TD.index_select(0, matrices.back().row_M);
    slots.push_back(matrices.back().dispatch_MS.to(x_MD.scalar_type()).t().matmul(x_MD));
    rows.push_back(matrices.back().row_M);
  }
  const Tensor outputs_BSD = run_slots(plan, bank, at::stack(slots), input);
  for (int64_t b = 0; b < plan.sequences; ++b)
    outputs.push_back(matrices[b].combine_MS.to(outputs_BSD.scalar_type()).matmul(outputs_BSD.select(0, b)));
  return at::cat(outputs).index_select(0, at::cat(rows).argsort());
}

PlanForm form_of(const Plan& plan) {
  if (std::holds_alternative<SparsePlan>(plan)) return PlanForm::kSparse;
  return std::holds_alternative<SoftPlan>(plan) ? PlanForm::kSoft : PlanForm::kMerge;
}

// The experts' gradients are then zero, not missing.
Tensor without_rows(const ExpertBank& bank, const ExecuteInput& input) {
  const Tensor offsets_E1 = at::zeros({bank.experts() + 1}, at::kLong);
  return bank.forward({.rows_ND = input.x_TD, .offsets_E1 = offsets_E1, .input_TD = input.x_TD, .sequence_T = input.sequence_T,
                       .cu_seqlens_B1 = input.cu_seqlens_B1, .cache = input.cache, .training = input.training}, 0);
}

}  // namespace

Tensor map_pairs(const SparsePlan& plan, const ExpertBank& bank, const Tensor& rows_ND, const ExecuteInput& input, int stage) {
  check_invariant(plan.experts == bank.experts(), "the plan and the bank '" + bank.name() + "' differ in their number of experts");
  check_invariant(rows_ND.size(0) == plan.token_N.numel(), "map_pairs: one row per pair expected");
  return bank.forward({.rows_ND = rows_ND, .offsets_E1 = plan.offsets_E1, .plan = &plan, .input_TD = input.x_TD,
                       .sequence_T = input.sequence_T, .cu_seqlens_B1 = input.cu_seqlens_B1, .cache = input.cache,
                       .training = input.training},
                      stage);
}

Tensor execute(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input, Execution execution) {
  if (const std::string reason = bank.refuses(form_of(plan)); !reason.empty()) usage_error(reason);
  if (execution == Execution::kReference) return execute_reference(plan, bank, input);
  if (const auto* sparse = std::get_if<SparsePlan>(&plan)) return execute_sparse(*sparse, bank, input);
  if (input.x_TD.size(0) == 0) return without_rows(bank, input);  // there may be no sequence and no group
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) return execute_soft(*soft, bank, input);
  return execute_merge(std::get<MergePlan>(plan), bank, input);
}

}  // namespace moelab
