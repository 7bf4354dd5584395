#include "core/merging.h"

#include "core/error.h"

#include <ATen/ops/bincount.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

namespace moelab {

Tensor GroupSums::mean_GD() const { return sum_GD.div(count_G.clamp_min(1).unsqueeze(1)); }

GroupSums sums_over_groups(const Tensor& x_TD, const Tensor& group_T, int64_t groups) {
  const Tensor rows_TD = x_TD.scalar_type() == at::kDouble ? x_TD : x_TD.to(at::kFloat);
  const Tensor none_GD = at::zeros({groups, rows_TD.size(1)}, rows_TD.options().requires_grad(false));
  return {none_GD.index_add(0, group_T.to(rows_TD.device()), rows_TD), at::bincount(group_T, {}, groups).to(rows_TD.options())};
}

RouteOutput finish_merge(const Tensor& logits_GE, const Tensor& group_T) {
  RouteOutput out;
  const Tensor alpha_GE = logits_GE.softmax(1), row_T = group_T.to(logits_GE.device());
  const Tensor logits_TE = logits_GE.index_select(0, row_T), probs_TE = alpha_GE.index_select(0, row_T);
  out.plan = MergePlan{.alpha_GE = alpha_GE, .group_of_token_T = group_T};
  out.probes["logits"] = logits_TE;
  out.probes["probs"] = probs_TE;
  out.scores = {logits_TE, probs_TE, probs_TE, logits_TE, logits_TE, {}};
  return out;
}

void require_no_noise(const RouterSpec& spec, const char* router) {
  if (spec.noise.kind == NoiseSpec::Kind::kPaper || spec.noise.kind == NoiseSpec::Kind::kNone) return;
  usage_error(fmt::format("[moe.noise] kind: the router '{}' merges experts and draws no noise; use \"none\"", router));
}

}  // namespace moelab
