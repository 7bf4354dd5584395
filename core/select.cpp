#include "core/select.h"

#include "core/error.h"
#include "core/row_loops.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <fmt/format.h>

#include <limits>
#include <map>

namespace moelab {
namespace {

// Autocast must not reach the router's arithmetic: bfloat16 inputs become float32, float64 stays.
Tensor at_least_float(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

void check_noise_shape(const Tensor& noise, int64_t rows, int64_t columns) {
  const bool fits = columns == 1 ? noise.numel() == rows : noise.dim() == 2 && noise.size(0) == rows && noise.size(1) == columns;
  if (!fits) usage_error(fmt::format("noise has {} elements, but this router draws [{}, {}]", noise.numel(), rows, columns));
}

using RowDraw = Tensor (*)(RandomKey, const Tensor&, const Tensor&, int64_t, at::ScalarType);

Tensor raw_draw(const RouteInput& in, int64_t columns, RowDraw draw) {
  const at::ScalarType dtype = at_least_float(in.routed()).scalar_type();
  if (!in.noise.defined()) return draw(in.random.with("noise"), in.sequence_key_T, in.position_T, columns, dtype);
  check_noise_shape(in.noise, in.rows(), columns);
  return in.noise.to(dtype).reshape({in.rows(), columns});
}

template <class Score>
void topk_rows(const Tensor& score_TE, int64_t k, Tensor& best_TK) {
  const auto* score = score_TE.const_data_ptr<Score>();
  auto* best = best_TK.mutable_data_ptr<int64_t>();
  const int64_t rows = score_TE.size(0), columns = score_TE.size(1);
  for (int64_t t = 0; t < rows; ++t) topk_of_row(score + t * columns, columns, k, best + t * k);
}

// Outcome of the capacity, or the one that was recorded.
Assignment assignment_of(const RouteInput& in, const RouterSpec& spec, const Chosen& chosen) {
  if (in.forced) return *in.forced;
  Tensor allowed_TK = chosen.choice_TK.ge(0);
  if (chosen.allowed_TK.defined()) allowed_TK = allowed_TK.logical_and(chosen.allowed_TK);
  const Tensor kept_TK = served(spec.capacity(in.mode), in, chosen.choice_TK, allowed_TK, chosen.priority_TK,
                                spec.max_experts, chosen.choice_TK.size(1));
  return {chosen.choice_TK, kept_TK, allowed_TK.logical_and(kept_TK.logical_not())};
}

}  // namespace

void require_finite(const Tensor& tensor, const char* name, const RouteInput& in) {
  if (tensor.numel() == 0 || tensor.detach().isfinite().all().item<bool>()) return;
  diverged_error(fmt::format("non-finite {} in the router of layer {} at step {}", name, in.layer, in.step));
}

Tensor router_logits(const Tensor& x_TD, const Tensor& weight_ED) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return at_least_float(x_TD).matmul(at_least_float(weight_ED).t());
}

Tensor stable_topk(const Tensor& score_TE, int64_t k) {
  const Tensor score = at_least_float(score_TE.detach()).contiguous();
  check_invariant(k >= 0 && k <= score.size(1), "stable_topk: k is outside 0 … E");
  if (!score.device().is_cpu()) return std::get<1>(score.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true)).slice(1, 0, k);
  Tensor best_TK = at::empty({score.size(0), k}, at::kLong);
  if (k == 0) return best_TK;
  if (score.scalar_type() == at::kDouble) topk_rows<double>(score, k, best_TK);
  else topk_rows<float>(score, k, best_TK);
  return best_TK;
}

Tensor chosen_topk(const RouteInput& in, const Tensor& score_TE, int64_t k) {
  return in.forced ? in.forced->choice_TK : stable_topk(score_TE, k);
}

Tensor raw_normal(const RouteInput& in, int64_t columns) { return raw_draw(in, columns, normal_rows); }
Tensor raw_uniform(const RouteInput& in, int64_t columns) { return raw_draw(in, columns, uniform_rows); }
Tensor raw_gumbel(const RouteInput& in, int64_t columns) { return raw_draw(in, columns, gumbel_rows); }

NoisyLogits noisy_logits(const RouteInput& in, const Tensor& weight_ED, const NoiseSpec& noise) {
  const Tensor& x_TD = in.routed();
  NoisyLogits logits;
  logits.clean_TE = router_logits(x_TD, weight_ED);
  logits.noisy_TE = logits.clean_TE;
  if (!in.training()) return logits;
  if (noise.kind == NoiseSpec::Kind::kNormal && noise.std > 0) {
    logits.std_TE = at::ones_like(logits.clean_TE.detach()).mul_(noise.std);
    logits.noisy_TE = logits.clean_TE.add(raw_normal(in, weight_ED.size(0)).mul(noise.std));
  }
  if (noise.kind == NoiseSpec::Kind::kJitter && noise.epsilon > 0) {
    const Tensor factor_TD = raw_uniform(in, x_TD.size(1)).mul(2 * noise.epsilon).add(1 - noise.epsilon);
    logits.noisy_TE = router_logits(at_least_float(x_TD).mul(factor_TD), weight_ED);
  }
  return logits;
}

Tensor stop_gradient(const RouteInput& in, const char* name, const Tensor& value) {
  return in.held ? in.held->try_emplace(name, value.detach()).first->second : value.detach();
}

Tensor gather_choices(const Tensor& score_TE, const Tensor& choice_TK) {
  const Tensor gathered_TK = score_TE.gather(1, choice_TK.clamp_min(0));
  return gathered_TK.masked_fill(choice_TK.lt(0), 0);
}

Tensor softmax_of_choices(const Tensor& logits_TE, const Tensor& choice_TK) {
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  return logits_TE.gather(1, choice_TK.clamp_min(0)).masked_fill(choice_TK.lt(0), kNever).softmax(1);
}

std::vector<Tensor> rows_by_key(const Tensor& key_T) {
  std::map<int64_t, std::vector<int64_t>> rows_of;
  for (int64_t t = 0; t < key_T.numel(); ++t) rows_of[key_T.const_data_ptr<int64_t>()[t]].push_back(t);
  std::vector<Tensor> groups;
  for (const auto& [key, rows] : rows_of) groups.push_back(at::tensor(rows, at::kLong));
  return groups;
}

Tensor softmax_over_rows(const Tensor& logits_TE, const std::vector<Tensor>& groups) {
  if (groups.empty()) return logits_TE.softmax(0);
  std::vector<Tensor> shares;
  for (const Tensor& row_N : groups) shares.push_back(logits_TE.index_select(0, row_N).softmax(0));
  return at::cat(shares).index_select(0, at::cat(groups).argsort());
}

Tensor renormalised(const Tensor& gate_TK, const Tensor& counted_TK) {
  const Tensor sum_T1 = gate_TK.masked_fill(counted_TK.logical_not(), 0).sum(1, /*keepdim=*/true);
  return gate_TK.div(sum_T1.add(1e-9));
}

RouteOutput finish_sparse(const RouteInput& in, const RouterSpec& spec, Chosen chosen, Scores scores) {
  RouteOutput out;
  out.assignment = assignment_of(in, spec, chosen);
  Tensor gate_TK = chosen.gate_TK;
  if (spec.renormalise() == Renormalise::kBeforeDrop) gate_TK = renormalised(gate_TK, out.assignment.choice_TK.ge(0));
  out.gate_TK = gate_TK;
  if (spec.renormalise() == Renormalise::kAfterDrop) gate_TK = renormalised(gate_TK, out.assignment.kept_TK);
  out.plan = make_sparse_plan(out.assignment, gate_TK, spec.max_experts);
  out.k = out.assignment.choice_TK.size(1);
  out.places = total_places(spec.capacity(in.mode), in, spec.max_experts, out.k);
  if (scores.clean_TE.defined()) out.probes["logits"] = scores.clean_TE;
  if (scores.loss_TE.defined()) out.probes["probs"] = scores.loss_TE;
  out.scores = std::move(scores);
  return out;
}

RouteOutput finish_unscored(const RouteInput& in, const RouterSpec& spec, const Tensor& choice_TK) {
  const at::ScalarType dtype = at_least_float(in.routed()).scalar_type();
  const Tensor gate_TK = at::full(choice_TK.sizes(), 1.0 / static_cast<double>(choice_TK.size(1)), dtype);
  return finish_sparse(in, spec, {choice_TK, gate_TK, gate_TK, {}}, {});
}

}  // namespace moelab
