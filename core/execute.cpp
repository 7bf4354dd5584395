#include "core/execute.h"

#include "core/error.h"

#include <spdlog/spdlog.h>

#include <mutex>
#include <set>

namespace moelab {
namespace {

// One line per (form, kind of experts), however many layers and steps meet it.
void note_slow_path(PlanForm form, const std::string& experts) {
  static std::mutex mutex;
  static std::set<std::pair<PlanForm, std::string>> noted;
  const std::lock_guard lock(mutex);
  if (noted.insert({form, experts}).second)
    spdlog::info("{} plans over '{}' experts have no fast path: the reference executor runs (correct, slow)", to_string(form),
                 experts);
}

Tensor execute_sparse(const SparsePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  return combine_rows(map_pairs(plan, bank, dispatch_rows(input.x_TD, plan), input), plan);
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
  if (bank.stages() != 1)
    usage_error("experts '" + bank.name() + "' work in " + std::to_string(bank.stages()) +
                " stages around code of their module; place them in a site that runs the stages itself");
  const auto* sparse = std::get_if<SparsePlan>(&plan);
  if (execution == Execution::kAuto && sparse != nullptr) return execute_sparse(*sparse, bank, input);
  if (execution == Execution::kAuto) note_slow_path(static_cast<PlanForm>(plan.index()), bank.name());
  return execute_reference(plan, bank, input);
}

}  // namespace moelab
