#include "core/execute.h"

#include "core/error.h"
#include "core/execute_merge.h"
#include "core/execute_soft.h"
#include "core/grouped.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace moelab {
namespace {

ExpertContext context_of(const ExecuteInput& input) {
  return {.rows_ND = {}, .input_TD = input.x_TD, .sequence_T = input.sequence_T, .cu_seqlens_B1 = input.cu_seqlens_B1,
          .cache = input.cache, .training = input.training, .recompute = input.recompute};
}

void check_sizes(const SparsePlan& plan, const ExpertBank& bank) {
  check_invariant(plan.experts == bank.experts(),
                  "the plan and the bank '" + bank.name() + "' differ in their number of experts");
}

Tensor execute_sparse(const SparsePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  if (grouped_product() == GroupedProduct::kAuto) {
    check_sizes(plan, bank);
    ExpertContext context = context_of(input);
    context.offsets_E1 = plan.offsets_E1;
    context.plan = &plan;
    const Tensor y_TD = bank.forward_layer(context);
    if (y_TD.defined()) return y_TD;
  }
  return combine_rows(map_pairs(plan, bank, dispatch_rows(input.x_TD, plan), input), plan);
}

// The slots of all sequences, expert by expert, through the bank at once: [B,S,D] to [B,S,output width].
Tensor run_slots(const SoftPlan& plan, const ExpertBank& bank, const Tensor& slots_BSD, const ExecuteInput& input) {
  const int64_t sequences = slots_BSD.size(0), experts = plan.experts, slots = plan.slots_per_expert;
  const Tensor by_expert = slots_BSD.view({sequences, experts, slots, -1}).transpose(0, 1);
  const Tensor rows_ND = by_expert.reshape({experts * sequences * slots, slots_BSD.size(2)});
  const Tensor offsets_E1 = at::arange(experts + 1, at::kLong).mul(sequences * slots);
  ExpertContext context = context_of(input);
  context.rows_ND = rows_ND;
  context.offsets_E1 = offsets_E1;
  const Tensor outputs_ND = bank.forward(context, 0);
  return outputs_ND.reshape({experts, sequences, slots, -1}).transpose(0, 1).reshape({sequences, experts * slots, -1});
}

// Slots that the plan's key lacks read nothing.
Tensor all_slots(const SoftPlan& plan, const Tensor& slots_SD) {
  const int64_t missing = plan.experts * plan.slots_per_expert - slots_SD.size(0);
  return missing == 0 ? slots_SD : at::constant_pad_nd(slots_SD, {0, 0, 0, missing});
}

Tensor execute_soft(const SoftPlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  std::vector<SoftSequence> sequences;
  std::vector<Tensor> slots, outputs, rows;
  for (int64_t b = 0; b < plan.sequences; ++b) {
    sequences.push_back(sequence_of(plan, b));
    rows.push_back(sequences.back().row_M);
    slots.push_back(all_slots(plan, fill_slots(sequences.back(), input.x_TD.index_select(0, rows.back()))));
  }
  const Tensor outputs_BSW = run_slots(plan, bank, at::stack(slots), input);
  for (int64_t b = 0; b < plan.sequences; ++b)
    outputs.push_back(read_slots(sequences[static_cast<size_t>(b)], outputs_BSW.select(0, b).narrow(0, 0, plan.key_SD.size(0))));
  return at::cat(outputs).index_select(0, at::cat(rows).argsort());
}

PlanForm form_of(const Plan& plan) {
  if (std::holds_alternative<SparsePlan>(plan)) return PlanForm::kSparse;
  return std::holds_alternative<SoftPlan>(plan) ? PlanForm::kSoft : PlanForm::kMerge;
}

// The experts' gradients are then zero, not missing.
Tensor without_rows(const ExpertBank& bank, const ExecuteInput& input) {
  ExpertContext context = context_of(input);
  context.rows_ND = input.x_TD;
  context.offsets_E1 = at::zeros({bank.experts() + 1}, at::kLong);
  return bank.forward(context, 0);
}

}  // namespace

GroupedProduct product_of(Execution execution) {
  switch (execution) {
    case Execution::kLoop: return GroupedProduct::kLoop;
    case Execution::kGrouped: return GroupedProduct::kGrouped;
    case Execution::kBmm: return GroupedProduct::kBmm;
    case Execution::kReference:
      return GroupedProduct::kReference;
    default: return GroupedProduct::kAuto;
  }
}

Tensor map_pairs(const SparsePlan& plan, const ExpertBank& bank, const Tensor& rows_ND, const ExecuteInput& input, int stage) {
  check_sizes(plan, bank);
  check_invariant(rows_ND.size(0) == plan.token_N.numel(), "map_pairs: one row per pair expected");
  ExpertContext context = context_of(input);
  context.rows_ND = rows_ND;
  context.offsets_E1 = plan.offsets_E1;
  context.plan = &plan;
  return bank.forward(context, stage);
}

const std::vector<std::string>& execution_words() {
  static const std::vector<std::string> words{"auto", "loop", "grouped", "bmm", "reference"};
  return words;
}

Execution execution_of(const std::string& word) {
  const std::vector<std::string>& words = execution_words();
  const auto found = std::find(words.begin(), words.end(), word);
  check_invariant(found != words.end(), "execution '" + word + "'");
  return static_cast<Execution>(found - words.begin());  // words are in the order of the enumeration
}

Tensor execute(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input, Execution execution) {
  if (const std::string reason = bank.refuses(form_of(plan)); !reason.empty()) usage_error(reason);
  if (execution == Execution::kReference) return execute_reference(plan, bank, input);
  const GroupedProductGuard guard(product_of(execution));
  if (const auto* sparse = std::get_if<SparsePlan>(&plan)) return execute_sparse(*sparse, bank, input);
  if (input.x_TD.size(0) == 0) return without_rows(bank, input);  // there may be no sequence and no group
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) return execute_soft(*soft, bank, input);
  return execute_merge(std::get<MergePlan>(plan), bank, input);
}

}  // namespace moelab
