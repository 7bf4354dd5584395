#include "core/plan.h"

#include "core/error.h"

#include <ATen/ops/empty.h>

#include <fmt/format.h>

#include <algorithm>
#include <vector>

namespace moelab {
namespace {

const at::TensorOptions kInt64 = at::TensorOptions().dtype(at::kLong);

void require(bool holds, const std::string& rule) { check_invariant(holds, "plan: " + rule); }

void require_finite_plan(const Tensor& tensor, const char* name) {
  require(tensor.numel() == 0 || tensor.detach().isfinite().all().item<bool>(), fmt::format("{} is not finite", name));
}

// Pairs in the order of rows, then of choices, for which `marked` holds.
void list_pairs(const Tensor& choice_TK, const Tensor& marked_TK, Tensor& token_M, Tensor& expert_M) {
  const int64_t rows = choice_TK.size(0), k = choice_TK.size(1);
  const auto* choice = choice_TK.const_data_ptr<int64_t>();
  const auto* marked = marked_TK.const_data_ptr<bool>();
  const int64_t count = std::count(marked, marked + rows * k, true);
  token_M = at::empty({count}, kInt64);
  expert_M = at::empty({count}, kInt64);
  auto* token = token_M.mutable_data_ptr<int64_t>();
  auto* expert = expert_M.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, i = 0; count > 0 && t < rows; ++t)
    for (const int64_t end = i + k; i < end; ++i)
      if (marked[i]) *token++ = t, *expert++ = choice[i];
}

// offsets[e] = kept pairs of the experts before e.
std::vector<int64_t> kept_offsets(const int64_t* choice, const bool* kept, int64_t pairs, int64_t experts) {
  std::vector<int64_t> offsets(experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i)
    if (kept[i]) ++offsets[choice[i] + 1];
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  return offsets;
}

void validate_sparse(const SparsePlan& plan, int64_t rows, int64_t experts) {
  const int64_t pairs = plan.token_N.numel();
  require(plan.rows == rows && plan.experts == experts, "sizes differ from the layer's");
  require(plan.expert_N.numel() == pairs && plan.gate_N.numel() == pairs, "token, expert and gate differ in length");
  require(plan.offsets_E1.numel() == experts + 1 && plan.offsets_E1.device().is_cpu(), "offsets need E+1 entries on the CPU");
  require_finite_plan(plan.gate_N, "gate");
  const auto* token = plan.token_N.const_data_ptr<int64_t>();
  const auto* expert = plan.expert_N.const_data_ptr<int64_t>();
  const auto* offsets = plan.offsets_E1.const_data_ptr<int64_t>();
  require(offsets[0] == 0 && offsets[experts] == pairs, "offsets do not span the pairs");
  for (int64_t e = 0; e < experts; ++e) {
    require(offsets[e] <= offsets[e + 1], "offsets fall");
    for (int64_t n = offsets[e]; n < offsets[e + 1]; ++n) {
      require(expert[n] == e, fmt::format("pair {} lies in expert {}'s block but says {}", n, e, expert[n]));
      require(token[n] >= 0 && token[n] < rows, fmt::format("pair {} names row {}", n, token[n]));
      require(n == offsets[e] || token[n - 1] < token[n], fmt::format("expert {}'s rows are not ascending and distinct", e));
    }
  }
  const Tensor slot = plan.slot_TK.contiguous();
  const auto* slots = slot.const_data_ptr<int64_t>();
  std::vector<bool> taken(pairs, false);
  int64_t placed = 0;
  for (int64_t i = 0; i < slot.numel(); ++i) {
    if (slots[i] < 0) continue;
    require(slots[i] < pairs && token[slots[i]] == i / slot.size(1), fmt::format("slot of row {} holds another row", i / slot.size(1)));
    require(!taken[slots[i]], fmt::format("two choices of row {} share a slot", i / slot.size(1)));
    taken[slots[i]] = true;
    ++placed;
  }
  require(placed == pairs, "slots and pairs differ in number");
}

void validate_soft(const SoftPlan& plan, int64_t rows, int64_t experts) {
  require(plan.experts == experts, "sizes differ from the layer's");
  require(plan.query_TD.dim() == 2 && plan.query_TD.size(0) == rows, "query needs one row per token");
  require(plan.key_SD.size(0) <= experts * plan.slots_per_expert && plan.key_SD.size(0) % plan.slots_per_expert == 0,
          "key needs one row per slot of the experts in use");
  require(plan.sequence_T.numel() == rows, "sequence needs one entry per token");
  require_finite_plan(plan.query_TD, "query");
  require_finite_plan(plan.key_SD, "key");
}

void validate_merge(const MergePlan& plan, int64_t rows, int64_t experts) {
  require(plan.alpha_GE.dim() == 2 && plan.alpha_GE.size(1) == experts, "alpha needs one column per expert");
  require(plan.group_of_token_T.numel() == rows, "group_of_token needs one entry per token");
  require_finite_plan(plan.alpha_GE, "alpha");
  const int64_t groups = plan.alpha_GE.size(0);
  if (rows == 0) return;
  require(plan.group_of_token_T.min().item<int64_t>() >= 0 && plan.group_of_token_T.max().item<int64_t>() < groups,
          "group_of_token names a group that is not there");
}

}  // namespace

const char* to_string(PlanForm form) {
  switch (form) {
    case PlanForm::kSparse: return "sparse";
    case PlanForm::kSoft: return "soft";
    case PlanForm::kMerge: return "merge";
  }
  return "?";
}

void validate(const Plan& plan, int64_t rows, int64_t experts) {
  if (const auto* sparse = std::get_if<SparsePlan>(&plan)) validate_sparse(*sparse, rows, experts);
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) validate_soft(*soft, rows, experts);
  if (const auto* merge = std::get_if<MergePlan>(&plan)) validate_merge(*merge, rows, experts);
}

SparsePlan make_sparse_plan(const Assignment& assignment, const Tensor& gate_TK, int64_t experts) {
  const Tensor choice_TK = assignment.choice_TK.contiguous(), kept_TK = assignment.kept_TK.contiguous();
  const int64_t rows = choice_TK.size(0), k = choice_TK.size(1);
  const auto* choice = choice_TK.const_data_ptr<int64_t>();
  const auto* kept = kept_TK.const_data_ptr<bool>();
  std::vector<int64_t> next = kept_offsets(choice, kept, rows * k, experts);
  const int64_t pairs = next[experts];

  SparsePlan plan;
  plan.rows = rows;
  plan.experts = experts;
  plan.offsets_E1 = at::empty({experts + 1}, kInt64);
  std::copy(next.begin(), next.end(), plan.offsets_E1.mutable_data_ptr<int64_t>());
  plan.token_N = at::empty({pairs}, kInt64);
  plan.expert_N = at::empty({pairs}, kInt64);
  plan.slot_TK = at::empty({rows, k}, kInt64);
  Tensor source_N = at::empty({pairs}, kInt64);  // position in [T,K] of each sorted pair
  auto* token = plan.token_N.mutable_data_ptr<int64_t>();
  auto* expert = plan.expert_N.mutable_data_ptr<int64_t>();
  auto* slot = plan.slot_TK.mutable_data_ptr<int64_t>();
  auto* source = source_N.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, i = 0; t < rows; ++t)
    for (const int64_t end = i + k; i < end; ++i) {
      slot[i] = -1;
      if (!kept[i]) continue;
      const int64_t n = slot[i] = next[choice[i]]++;
      token[n] = t;
      source[n] = i;
    }
  for (int64_t e = 0, first = 0; e < experts; first = next[e++]) std::fill(expert + first, expert + next[e], e);
  plan.gate_N = gate_TK.reshape({-1}).index_select(0, source_N);
  list_pairs(choice_TK, assignment.dropped_TK.contiguous(), plan.dropped_token_M, plan.dropped_expert_M);
  return plan;
}

}  // namespace moelab
