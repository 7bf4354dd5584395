#include "core/loss.h"

#include "core/registry_impl.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace moelab {

template class Registry<LossEntry>;

Loss::~Loss() = default;

Landmarks Loss::landmarks_among(int64_t active, int64_t experts, int64_t k) const {
  Landmarks marks = landmarks(experts, k);
  if (active != experts) marks.balance = std::numeric_limits<double>::quiet_NaN();
  return marks;
}

namespace {

LossStatistics sums_over_all(const std::vector<Tensor>& per_row, int64_t rows) {
  LossStatistics all{{}, rows};
  for (const Tensor& rows_Tn : per_row) all.sums.push_back(rows_Tn.sum(0));
  return all;
}

// [T,n] → [B,n]. On the CPU index_add adds row by row, so the sums do not depend on the thread count.
Tensor sums_by_sequence(const Tensor& rows_Tn, const RouteInput& in) {
  const Tensor empty_Bn = at::zeros({in.sequences, rows_Tn.size(1)}, rows_Tn.options().requires_grad(false));
  return empty_Bn.index_add(0, in.sequence_T.to(rows_Tn.device()), rows_Tn);
}

std::vector<LossStatistics> sums_per_sequence(const std::vector<Tensor>& per_row, const RouteInput& in) {
  std::vector<Tensor> sums;
  for (const Tensor& rows_Tn : per_row) sums.push_back(sums_by_sequence(rows_Tn, in));
  const Tensor rows_B = at::bincount(in.sequence_T, {}, in.sequences);
  std::vector<LossStatistics> sequences;
  for (int64_t b = 0; b < in.sequences; ++b) {
    const int64_t rows = rows_B.const_data_ptr<int64_t>()[b];
    if (rows == 0) continue;
    LossStatistics& one = sequences.emplace_back(LossStatistics{{}, rows});
    for (const Tensor& sums_Bn : sums) one.sums.push_back(sums_Bn.select(0, b));
  }
  return sequences;
}

}  // namespace

std::vector<LossStatistics> collect_statistics(const Loss& loss, LossScope scope, const LossInput& input) {
  const std::vector<Tensor> per_row = loss.row_statistics(input);
  const int64_t rows = input.in.rows();
  if (scope == LossScope::kSequence && rows > 0) return sums_per_sequence(per_row, input.in);
  return {sums_over_all(per_row, rows)};
}

Tensor local_value(const LossTerm& term, const std::vector<LossStatistics>& statistics, const Router& router) {
  if (statistics.size() == 1) return term.loss->value(statistics.front(), router);
  Tensor weighted;
  int64_t rows = 0;
  for (const LossStatistics& one : statistics) {
    const Tensor value = term.loss->value(one, router).mul(one.rows);
    weighted = weighted.defined() ? weighted.add(value) : value;
    rows += one.rows;
  }
  return weighted.div(rows);
}

std::vector<Tensor> statistics_gradient(const Loss& loss, const LossStatistics& total, const Router& router) {
  const at::AutoGradMode with_grad(true);
  LossStatistics leaves{{}, total.rows};
  for (const Tensor& sum : total.sums) leaves.sums.push_back(sum.detach().requires_grad_(true));
  const Tensor value = loss.value(leaves, router);
  // `inputs` keeps the gradient out of router parameters that value() may read.
  if (value.requires_grad() && !leaves.sums.empty()) value.backward({}, std::nullopt, false, at::TensorList(leaves.sums));
  std::vector<Tensor> gradient;
  for (const Tensor& leaf : leaves.sums) gradient.push_back(leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf));
  return gradient;
}

Tensor inner_product(const std::vector<Tensor>& gradient, const LossStatistics& statistics) {
  Tensor sum = at::zeros({});
  for (size_t i = 0; i < gradient.size(); ++i) {
    const Tensor part = gradient[i].mul(statistics.sums[i]).sum();
    sum = i == 0 ? part : sum.add(part);
  }
  return sum;
}

}  // namespace moelab
