#include "core/plan.h"

#include "core/error.h"

#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace moelab {
namespace {

const at::TensorOptions kInt64 = at::TensorOptions().dtype(at::kLong);

// The rule is put into words only where it is broken: these checks run for every pair of every step.
template <class... Parts>
void require(bool holds, fmt::format_string<Parts...> rule, Parts&&... parts) {
  if (!holds) check_invariant(false, "plan: " + fmt::format(rule, std::forward<Parts>(parts)...));
}

void require_finite_plan(const Tensor& tensor, const char* name) {
  require(tensor.numel() == 0 || tensor.detach().isfinite().all().item<bool>(), "{} is not finite", name);
}

bool contains(const Tensor& flags_TK, bool flag) {
  if (flags_TK.numel() == 0) return false;  // without rows there may be no memory to look at
  return std::memchr(flags_TK.const_data_ptr<bool>(), flag, static_cast<size_t>(flags_TK.numel())) != nullptr;
}

// Pairs in the order of rows, then of choices, for which `marked` holds.
void list_pairs(const Tensor& choice_TK, const Tensor& marked_TK, Tensor& token_M, Tensor& expert_M) {
  const int64_t rows = choice_TK.size(0), k = choice_TK.size(1);
  const auto* choice = choice_TK.const_data_ptr<int64_t>();
  const auto* marked = marked_TK.const_data_ptr<bool>();
  const int64_t count = contains(marked_TK, true) ? std::count(marked, marked + rows * k, true) : 0;  // mostly there are none
  token_M = at::empty({count}, kInt64);
  expert_M = at::empty({count}, kInt64);
  auto* token = token_M.mutable_data_ptr<int64_t>();
  auto* expert = expert_M.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, i = 0; count > 0 && t < rows; ++t)
    for (const int64_t end = i + k; i < end; ++i)
      if (marked[i]) *token++ = t, *expert++ = choice[i];
}

// offsets_E1 of the kept pairs. One that is not kept may have no expert, -1: it adds nothing to the entry before the first.
Tensor kept_offsets(const Tensor& choice_TK, const Tensor& kept_TK, bool all_kept, int64_t experts) {
  const int64_t pairs = choice_TK.numel();
  const auto* choice = choice_TK.const_data_ptr<int64_t>();
  const auto* kept = kept_TK.const_data_ptr<bool>();
  // Two tables by turns: a count need not wait for the one before it where both are the same expert's.
  std::vector<int64_t> even(experts + 1, 0), odd(experts + 1, 0);
  for (int64_t i = 0; all_kept && i + 1 < pairs; i += 2) ++even[choice[i] + 1], ++odd[choice[i + 1] + 1];
  if (all_kept && pairs % 2 == 1) ++even[choice[pairs - 1] + 1];
  for (int64_t i = 0; !all_kept && i < pairs; ++i) even[choice[i] + 1] += kept[i];
  Tensor offsets_E1 = at::empty({experts + 1}, kInt64);
  auto* offsets = offsets_E1.mutable_data_ptr<int64_t>();
  int64_t sum = 0;
  for (int64_t e = 0; e <= experts; ++e) offsets[e] = sum += even[e] + odd[e];
  return offsets_E1;
}

// token_N, slot_TK and, beside them, the gates: every pair is read and written once.
template <bool kAllKept, class Gate>
void place_pairs(const Tensor& choice_TK, const Tensor& kept_TK, const Gate* __restrict gate, SparsePlan& plan,
                 Gate* __restrict placed) {
  const int64_t rows = choice_TK.size(0), k = choice_TK.size(1);
  const auto* __restrict choice = choice_TK.const_data_ptr<int64_t>();
  const auto* __restrict kept = kept_TK.const_data_ptr<bool>();
  const auto* offsets = plan.offsets_E1.const_data_ptr<int64_t>();
  std::vector<int64_t> places(offsets, offsets + plan.experts);
  int64_t* __restrict next = places.data();
  auto* __restrict token = plan.token_N.mutable_data_ptr<int64_t>();
  auto* __restrict slot = plan.slot_TK.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, i = 0; t < rows; ++t)
    for (const int64_t end = i + k; i < end; ++i) {
      if (!kAllKept && !kept[i]) {
        slot[i] = -1;
        continue;
      }
      const int64_t n = next[choice[i]]++;
      slot[i] = n;
      token[n] = t;
      placed[n] = gate[i];
    }
}

template <class Gate>
void place_pairs(const Tensor& choice_TK, const Tensor& kept_TK, const Gate* gate, SparsePlan& plan, Gate* placed) {
  if (plan.token_N.numel() == choice_TK.numel()) place_pairs<true>(choice_TK, kept_TK, gate, plan, placed);
  else place_pairs<false>(choice_TK, kept_TK, gate, plan, placed);
}

// gate_N = gate_TK where there is a slot; fills the plan's tokens and slots on the way.
struct PlacedPairs : torch::autograd::Function<PlacedPairs> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& gate_TK, const Tensor& choice_TK,
                        const Tensor& kept_TK, SparsePlan* plan) {
    Tensor gate_N = at::empty(plan->token_N.sizes(), gate_TK.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gate_N.scalar_type(), "place_pairs", [&] {
      place_pairs(choice_TK, kept_TK, gate_TK.const_data_ptr<scalar_t>(), *plan, gate_N.mutable_data_ptr<scalar_t>());
    });
    ctx->save_for_backward({plan->slot_TK});
    return gate_N;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    if (at::GradMode::is_enabled()) usage_error("plan: second derivatives are not supported; use create_graph = false");
    const Tensor slot_TK = ctx->get_saved_variables()[0], grad_N = grads[0].contiguous();
    Tensor grad_TK = at::empty(slot_TK.sizes(), grad_N.options());
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, grad_N.scalar_type(), "placed_pairs_backward", [&] {
      const auto* slot = slot_TK.const_data_ptr<int64_t>();
      const auto* placed = grad_N.const_data_ptr<scalar_t>();
      auto* inside = grad_TK.mutable_data_ptr<scalar_t>();
      for (int64_t i = 0; i < slot_TK.numel(); ++i) inside[i] = slot[i] >= 0 ? placed[slot[i]] : scalar_t(0);
    });
    return {grad_TK, Tensor(), Tensor(), Tensor()};
  }
};

// The decision is made on the CPU; gates may live elsewhere.
Tensor placed_gates(const Tensor& choice_TK, const Tensor& kept_TK, const Tensor& gate_TK, SparsePlan& plan) {
  if (gate_TK.is_cpu()) return PlacedPairs::apply(gate_TK.contiguous(), choice_TK, kept_TK, &plan);
  const Tensor place_TK = at::arange(choice_TK.numel(), kInt64).view(choice_TK.sizes());
  Tensor order_N = at::empty(plan.token_N.sizes(), kInt64);
  place_pairs(choice_TK, kept_TK, place_TK.const_data_ptr<int64_t>(), plan, order_N.mutable_data_ptr<int64_t>());
  return gate_TK.reshape({-1}).index_select(0, order_N.to(gate_TK.device()));
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
      require(expert[n] == e, "pair {} lies in expert {}'s block but says {}", n, e, expert[n]);
      require(token[n] >= 0 && token[n] < rows, "pair {} names row {}", n, token[n]);
      require(n == offsets[e] || token[n - 1] < token[n], "expert {}'s rows are not ascending and distinct", e);
    }
  }
  const Tensor slot = plan.slot_TK.contiguous();
  const auto* slots = slot.const_data_ptr<int64_t>();
  std::vector<bool> taken(pairs, false);
  int64_t placed = 0;
  for (int64_t i = 0; i < slot.numel(); ++i) {
    if (slots[i] < 0) continue;
    require(slots[i] < pairs && token[slots[i]] == i / slot.size(1), "slot of row {} holds another row", i / slot.size(1));
    require(!taken[slots[i]], "two choices of row {} share a slot", i / slot.size(1));
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
  SparsePlan plan;
  plan.rows = choice_TK.size(0);
  plan.experts = experts;
  plan.offsets_E1 = kept_offsets(choice_TK, kept_TK, !contains(kept_TK, false), experts);
  const auto* offsets = plan.offsets_E1.const_data_ptr<int64_t>();
  plan.token_N = at::empty({offsets[experts]}, kInt64);
  plan.expert_N = at::empty({offsets[experts]}, kInt64);
  plan.slot_TK = at::empty(choice_TK.sizes(), kInt64);
  auto* expert = plan.expert_N.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < experts; ++e) std::fill(expert + offsets[e], expert + offsets[e + 1], e);
  plan.gate_N = placed_gates(choice_TK, kept_TK, gate_TK, plan);
  list_pairs(choice_TK, assignment.dropped_TK.contiguous(), plan.dropped_token_M, plan.dropped_expert_M);
  return plan;
}

}  // namespace moelab
