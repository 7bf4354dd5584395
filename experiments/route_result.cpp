#include "experiments/route_result.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace moelab {
namespace {

void add_sparse(RouteResults& results, const SparsePlan& plan, const RoutedRows& rows) {
  results.push_back({"token", rows.index_T.index_select(0, plan.token_N)});
  results.push_back({"expert", plan.expert_N});
  results.push_back({"gate", plan.gate_N});
  results.push_back({"offsets", plan.offsets_E1});
  results.push_back({"dropped_token", rows.index_T.index_select(0, plan.dropped_token_M)});
  results.push_back({"dropped_expert", plan.dropped_expert_M});
}

// Materialised: each row's weights on the slots of its own sequence, and what the experts read.
void add_soft(RouteResults& results, const SoftPlan& plan, const RoutedRows& rows) {
  const int64_t slots = plan.experts * plan.slots_per_expert;
  Tensor dispatch_TS = at::zeros({rows.in.rows(), slots}, plan.query_TD.options().requires_grad(false));
  Tensor combine_TS = dispatch_TS.clone();
  std::vector<Tensor> slots_of_sequence;
  for (int64_t b = 0; b < plan.sequences; ++b) {
    const SoftMatrices matrices = soft_matrices(plan, b);
    dispatch_TS.index_copy_(0, matrices.row_M, matrices.dispatch_MS.detach());
    combine_TS.index_copy_(0, matrices.row_M, matrices.combine_MS.detach());
    const Tensor x_MD = rows.in.x_TD.detach().index_select(0, matrices.row_M);
    slots_of_sequence.push_back(matrices.dispatch_MS.detach().t().matmul(x_MD));
  }
  results.push_back({"dispatch", rows.in_file_rows(dispatch_TS)});
  results.push_back({"combine", rows.in_file_rows(combine_TS)});
  const Tensor none_BSD = at::zeros({0, slots, rows.in.x_TD.size(1)}, dispatch_TS.options());
  results.push_back({"slots", slots_of_sequence.empty() ? none_BSD : at::stack(slots_of_sequence)});
}

// Groups renumbered in the order of their first row; rows of padding belong to none: -1.
void add_merge(RouteResults& results, const MergePlan& plan, const RoutedRows& rows) {
  const Tensor plan_group_T = plan.group_of_token_T.contiguous();
  Tensor group_T = at::empty({rows.in.rows()}, at::kLong);
  std::vector<int64_t> new_of_old(static_cast<size_t>(plan.alpha_GE.size(0)), -1);
  std::vector<Tensor> alpha;
  for (int64_t t = 0; t < rows.in.rows(); ++t) {
    const int64_t old = plan_group_T.const_data_ptr<int64_t>()[t];
    if (new_of_old[old] < 0) {
      new_of_old[old] = static_cast<int64_t>(alpha.size());
      alpha.push_back(plan.alpha_GE.detach().select(0, old));
    }
    group_T.mutable_data_ptr<int64_t>()[t] = new_of_old[old];
  }
  results.push_back({"alpha", alpha.empty() ? plan.alpha_GE.detach().slice(0, 0, 0) : at::stack(alpha)});
  results.push_back({"group_of_token", rows.in_file_rows(group_T, -1)});
}

// As the router documents the probe; an undocumented one counts as per row where it is a matrix of as many rows.
bool is_per_row(const std::string& name, const Tensor& value, const Router& router, int64_t rows) {
  for (const ProbeDoc& doc : router.entry().probes)
    if (doc.name == name) return doc.shape.starts_with("[T");
  return value.dim() == 2 && value.size(0) == rows;
}

Tensor at_least_one_axis(const Tensor& value) { return value.dim() == 0 ? value.reshape({1}) : value; }

}  // namespace

void add_plan(RouteResults& results, const LayerOutput& out, const RoutedRows& rows) {
  const Plan& plan = out.routed.plan;
  if (const auto* sparse = std::get_if<SparsePlan>(&plan)) add_sparse(results, *sparse, rows);
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) add_soft(results, *soft, rows);
  if (const auto* merge = std::get_if<MergePlan>(&plan)) add_merge(results, *merge, rows);
}

void add_probes(RouteResults& results, const RouteOutput& routed, const Router& router, const RoutedRows& rows) {
  for (const auto& [name, value] : routed.probes) {
    const bool per_row = is_per_row(name, value, router, rows.in.rows());
    results.push_back({"probe." + name, per_row ? rows.in_file_rows(value) : at_least_one_axis(value)});
  }
}

std::vector<Tensor> loss_values(const LayerOutput& out, const Site& site) {
  std::vector<Tensor> values;
  for (const TermStatistics& one : out.statistics)
    values.push_back(local_value(site.losses[one.term], one.per_scope, *site.router).reshape({1}));
  return values;
}

void add_gradients(RouteResults& results, const RouteLayer& layer, const Tensor& x_TD, const Tensor& objective,
                   const std::set<std::string>& without_axis) {
  if (objective.requires_grad()) objective.backward();
  const auto gradient_of = [](const Tensor& leaf) { return leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf); };
  results.push_back({"grad.x", gradient_of(x_TD)});
  std::vector<NamedTensor> gradients = layer.module().parameters();
  for (NamedTensor& parameter : gradients) parameter.tensor = gradient_of(parameter.tensor);
  add_state(results, "grad.", outside_names(layer, gradients), without_axis);
}

void add_state(RouteResults& results, const std::string& prefix, const std::vector<NamedTensor>& tensors,
               const std::set<std::string>& without_axis) {
  for (const NamedTensor& entry : tensors) {
    const Tensor value = entry.tensor.detach().clone();
    results.push_back({prefix + entry.name, without_axis.count(entry.name) ? value.squeeze(0) : value});
  }
}

}  // namespace moelab
