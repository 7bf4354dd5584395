// Seeded cases of every plan form, what executors make of them, and how far two of them are apart.
#pragma once

#include "core/execute.h"
#include "tests/support/sparse_cases.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace moelab::testing {

struct ExecutorUse {
  const char* name;
  Execution execution;
  bool recompute = false;
};
inline const ExecutorUse kUses[] = {{"auto", Execution::kAuto},
                                    {"auto, recomputed", Execution::kAuto, true},
                                    {"loop", Execution::kLoop},
                                    {"grouped", Execution::kGrouped},
                                    {"bmm", Execution::kBmm}};

inline int64_t between(std::mt19937_64& draw, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(draw);
}

// A plan, the rows that it is for, and the leaves that it hangs on beside them.
struct PlanCase {
  Plan plan;
  Tensor x_TD;
  std::vector<Tensor> leaves;
};

inline SparseCase one_takes_all(std::mt19937_64& draw, int64_t rows, int64_t experts, at::ScalarType dtype) {
  const Tensor choice_TK = at::full({rows, 1}, between(draw, 0, experts - 1), at::kLong), all_TK = at::ones({rows, 1}, at::kBool);
  const Tensor gate_TK = random_leaf(draw, {rows, 1}, dtype);
  return {make_sparse_plan({choice_TK, all_TK, all_TK.logical_not()}, gate_TK, experts), gate_TK};
}

// By turns: anything, no rows, one expert for all, every expert for all, a few choices; now and then rows for several blocks.
inline SparseCase sparse_of_kind(std::mt19937_64& draw, int kind, int64_t experts, int64_t most_rows, at::ScalarType dtype) {
  const int64_t rows = between(draw, 1, most_rows);
  switch (kind % 5) {
    case 1:
      return random_sparse_case(draw, 0, experts, 1, 0, dtype);
    case 2:
      return one_takes_all(draw, kind % 125 == 2 ? 700 : rows, experts, dtype);
    case 3:
      return random_sparse_case(draw, rows, experts, experts, 0, dtype);
    case 4:
      return random_sparse_case(draw, kind % 125 == 4 ? 900 : rows, experts, 1, 0.3, dtype);
    default:
      return random_sparse_case(draw, rows, experts, between(draw, 1, experts), 0.1, dtype);
  }
}

inline PlanCase sparse_case(std::mt19937_64& draw, int kind, int64_t experts, int64_t width, at::ScalarType dtype) {
  const SparseCase sparse = sparse_of_kind(draw, kind, experts, 24, dtype);
  return {sparse.plan, random_leaf(draw, {sparse.plan.rows, width}, dtype), {sparse.gate_TK}};
}

// Any modes, noise and number of sequences, some of them empty; the last experts may have no slot. By turns no rows, and slots of
// one expert alone.
inline PlanCase soft_case(std::mt19937_64& draw, int kind, int64_t experts, int64_t width, at::ScalarType dtype) {
  const int64_t rows = kind % 5 == 1 ? 0 : between(draw, 1, 24), slots = between(draw, 1, 3), sequences = between(draw, 1, 4);
  const int64_t present = kind % 5 == 2 ? 1 : between(draw, std::max<int64_t>(1, experts - 1), experts);
  const Tensor sequence_T = at::arange(rows, at::kLong).mul(7).remainder(sequences);
  SoftPlan plan{.experts = experts,
                .slots_per_expert = slots,
                .query_TD = random_leaf(draw, {rows, width}, dtype),
                .key_SD = random_leaf(draw, {present * slots, width}, dtype),
                .scale = random_leaf(draw, {1}, dtype),
                .sequence_T = sequence_T,
                .sequences = sequences + between(draw, 0, 1),
                .noise_std = between(draw, 0, 1) ? 0.5 : 0,
                .noise_TS = {},
                .noise_key = random_key(3, "noise"),
                .position_T = at::arange(rows, at::kLong),
                .sequence_key_T = sequence_T,
                .dispatch = static_cast<SlotWeights>(between(draw, 0, 2)),
                .combine = static_cast<SlotWeights>(between(draw, 0, 2))};
  return {plan, random_leaf(draw, {rows, width}, dtype), {plan.key_SD, plan.scale, plan.query_TD}};
}

// Groups out of order, more than are merged at once, some without rows. By turns no rows, one expert with all the weight, some
// experts without any.
inline PlanCase merge_case(std::mt19937_64& draw, int kind, int64_t experts, int64_t width, at::ScalarType dtype) {
  const int64_t groups = between(draw, 1, 6), rows = kind % 5 == 1 ? 0 : between(draw, 1, 24);
  const Tensor score_GE = random_leaf(draw, {groups, experts}, dtype);
  const Tensor shut_E = at::zeros({experts}, dtype);
  if (kind % 5 == 2) shut_E.narrow(0, 1, experts - 1).fill_(-std::numeric_limits<double>::infinity());
  if (kind % 5 == 3) shut_E.narrow(0, 0, experts / 2).fill_(-std::numeric_limits<double>::infinity());
  const Tensor group_T = at::arange(rows, at::kLong).mul(5).remainder(groups);
  return {MergePlan{.alpha_GE = score_GE.add(shut_E).softmax(1), .group_of_token_T = group_T},
          random_leaf(draw, {rows, width}, dtype),
          {score_GE}};
}

// y, then the gradients of ⟨y, grad_y⟩ with respect to the leaves, the bank's parameters and x.
inline std::vector<Tensor> outcomes(const PlanCase& at, const ExpertBank& bank, const Tensor& grad_y_TD, const ExecutorUse& use) {
  std::vector<Tensor> leaves = at.leaves;
  for (const NamedTensor& entry : bank.parameters()) leaves.push_back(entry.tensor);
  leaves.push_back(at.x_TD);
  for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  std::vector<Tensor> values{execute(at.plan, bank, {.x_TD = at.x_TD, .recompute = use.recompute}, use.execution)};
  // Experts that are zero have no gradient; a cut graph shows in the zeros that follow.
  if (values[0].requires_grad()) values[0].backward(grad_y_TD, /*retain_graph=*/true);
  values[0] = values[0].detach();
  for (const Tensor& leaf : leaves) values.push_back(leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf));
  return values;
}

inline std::vector<Tensor> reference_outcomes(const PlanCase& at, const ExpertBank& bank, const Tensor& grad_y_TD) {
  return outcomes(at, bank, grad_y_TD, {"reference", Execution::kReference});
}

// A gradient this much smaller than the largest one may be zero but for rounding (a softmax over one entry, or over slots that
// all hold the same), and each executor rounds in its own way. With the tolerances below, 1e-10 and 1e-5, the floor is some tens
// of units in the last place of the largest one: a gradient of the scale sums a few hundred such terms.
constexpr double kZeroInDouble = 1e-4, kZeroInFloat = 1e-2;

inline double largest_entry(const Tensor& t) { return t.numel() == 0 ? 0.0 : t.detach().abs().max().item<double>(); }

// The largest error, each tensor's against its own size, or the size that `least` gives where that is larger; infinite for NaN,
// and where shapes or numbers of tensors differ.
inline double worst_of(const std::vector<Tensor>& a, const std::vector<Tensor>& b, double zero = kZeroInDouble,
                       const std::vector<double>& least = {}) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  if (a.size() != b.size()) return kInfinite;
  double largest = 0, worst = 0;
  for (const Tensor& tensor : b) largest = std::max(largest, largest_entry(tensor));
  for (size_t i = 0; i < b.size(); ++i) {
    const double size = largest_entry(b[i]), error = relative_error(a[i], b[i]);  // against max(size, 1e-30)
    if (std::isinf(error)) return kInfinite;
    const double against = std::max({size, zero * largest, i < least.size() ? least[i] : 0, 1e-30});
    worst = std::max(worst, error * std::max(size, 1e-30) / against);
  }
  return worst;
}

// The gradient of a soft plan's scale is one number, Σ query ∘ ∂query / scale, and may cancel to anything: its size is that of
// the terms.
inline std::vector<double> sizes_of_terms(const PlanCase& at, const std::vector<Tensor>& exact) {
  const auto* soft = std::get_if<SoftPlan>(&at.plan);
  if (soft == nullptr) return {};
  const Tensor terms = exact[3].mul(soft->query_TD.detach()).abs().sum();  // y, key, scale, query
  return {0, 0, terms.item<double>() / std::abs(soft->scale.item<double>())};
}

// Makes the plan's own tensors the leaves: the gates of its pairs, its alpha.
inline void cut_at_plan(PlanCase& at) {
  if (auto* merge = std::get_if<MergePlan>(&at.plan)) at.leaves = {merge->alpha_GE = merge->alpha_GE.detach().requires_grad_()};
  if (auto* sparse = std::get_if<SparsePlan>(&at.plan)) at.leaves = {sparse->gate_N = sparse->gate_N.detach().requires_grad_()};
}

// The same case with other leaves, convert(leaf) in the place of each. The plan is cut, and draws no noise where the precision
// changes.
template <class Convert>
PlanCase converted(const PlanCase& from, Convert convert) {
  PlanCase to{from.plan, convert(from.x_TD), {}};
  for (const Tensor& one : from.leaves) to.leaves.push_back(convert(one));
  if (auto* soft = std::get_if<SoftPlan>(&to.plan))
    soft->key_SD = to.leaves[0], soft->scale = to.leaves[1], soft->query_TD = to.leaves[2];
  if (auto* merge = std::get_if<MergePlan>(&to.plan)) merge->alpha_GE = to.leaves[0];
  if (auto* sparse = std::get_if<SparsePlan>(&to.plan)) sparse->gate_N = to.leaves[0];
  return to;
}

inline PlanCase in_double(const PlanCase& low) {
  return converted(low, [](const Tensor& t) { return t.detach().to(at::kDouble).requires_grad_(); });
}

// Gives `to` the parameters of `from`, the base's too.
inline void copy_parameters(const ExpertBank& from, const ExpertBank& to) {
  const auto copy = [](const Module& source, const Module& target) {
    const std::vector<NamedTensor> values = source.parameters(), places = target.parameters();
    for (size_t i = 0; i < places.size(); ++i) places[i].tensor.detach().copy_(values[i].tensor.detach());
  };
  copy(from, to);
  if (from.base()) copy(*from.base(), *to.base());
}

}  // namespace moelab::testing
