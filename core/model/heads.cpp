#include "core/model/heads.h"

#include "core/error.h"
#include "core/grouped.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <cmath>

namespace moelab {
namespace {

Tensor head_weight(RandomKey key, const HeadMap& map, std::vector<int64_t> shape, at::ScalarType dtype) {
  return normal_tensor(key, shape, map.scale / std::sqrt(static_cast<double>(map.in)), dtype);
}

}  // namespace

HeadBank::HeadBank(const ExpertSpec& spec, std::vector<HeadMap> maps, std::vector<size_t> stages)
    : maps_(std::move(maps)), stages_(std::move(stages)), first_(spec.first) {
  groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
  for (const HeadMap& map : maps_) {
    const Tensor weight_EOI = add_parameter(map.name, at::empty({spec.experts, map.out, map.in}, spec.dtype));
    groups_.front().stacked.push_back({map.name, weight_EOI});
  }
  for (int64_t e = 0; e < spec.experts; ++e) reset_expert(e, spec.init);
}

Tensor HeadBank::forward(const ExpertContext& context, int stage) const {
  return grouped_linear(context.rows_ND, weight(stages_.at(static_cast<size_t>(stage))), {}, context.offsets_E1);
}

std::string HeadBank::refuses(PlanForm form) const {
  if (form == PlanForm::kSparse) return ExpertBank::refuses(form);
  return "attention heads are chosen row by row; use a router with a sparse plan";
}

double HeadBank::flops_per_row(int64_t) const {
  double flops = 0;
  for (const HeadMap& map : maps_) flops += 2.0 * static_cast<double>(map.out * map.in);
  return flops;
}

void HeadBank::reset_expert(int64_t expert, RandomKey key) {
  const at::NoGradGuard no_grad;
  for (size_t m = 0; m < maps_.size(); ++m) {
    const Tensor weight_OI = weight(m).select(0, expert);
    weight_OI.copy_(
        head_weight(key.with(maps_[m].name, first_ + expert), maps_[m], weight_OI.sizes().vec(), weight_OI.scalar_type()));
  }
}

SharedHeads::SharedHeads(const ExpertSpec& spec, int64_t heads, const std::vector<HeadMap>& maps) {
  for (const HeadMap& map : maps) {
    const RandomKey key = spec.init.with("shared").with(map.name);
    weights_.push_back(add_parameter(map.name, head_weight(key, map, {heads, map.out, map.in}, spec.dtype)));
  }
}

Tensor project_heads(const Tensor& x_TD, const Tensor& weight_HAD) {
  return at::linear(x_TD, weight_HAD.flatten(0, 1)).view({x_TD.size(0), weight_HAD.size(0), weight_HAD.size(1)});
}

Tensor HeadPass::turned(const Tensor& x_THA, const Tensor& position_T) const {
  return shape_.rotary ? rotate_rows(x_THA, position_T, shape_.rope_base) : x_THA;
}

Tensor HeadPass::attended(const Tensor& q_THA, const Tensor& k_ThA, const Tensor& v_ThA) const {
  const Tensor q_BHLA = heads_first(q_THA);
  const auto for_all = [&](const Tensor& x) { return x.expand({x.size(0), q_BHLA.size(1), x.size(2), x.size(3)}); };
  const Tensor k_BHKA = for_all(kept("k", heads_first(k_ThA))), v_BHKA = for_all(kept("v", heads_first(v_ThA)));
  return grid_.take(attend(q_BHLA, k_BHKA, v_BHKA, shape_.causal, grid_.real_BL()).transpose(1, 2).contiguous());
}

Tensor HeadPass::kept(const char* name, const Tensor& more_BhLA) const {
  if (!cache_) return more_BhLA;
  check_invariant(shape_.causal && !grid_.real_BL().defined(), "decoding goes on from whole rows of causal attention");
  Tensor& all = cache_->kept[name];
  all = all.defined() ? at::cat({all, more_BhLA}, 2) : more_BhLA;
  return all;
}

}  // namespace moelab
