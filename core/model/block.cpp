#include "core/model/block.h"

#include <ATen/ops/ones.h>

#include <fmt/format.h>

namespace moelab {
namespace {

SiteResult site_result(LayerOutput layer) {
  RouteOutput& routed = layer.routed;
  return {std::move(layer.statistics), std::move(layer.record), std::move(routed.assignment), std::move(routed.deltas),
          std::move(routed.carry)};
}

// Expert rows that a token costs: k of a sparse plan (all experts where k varies: an upper bound), its share of the slots of
// a soft plan, one merged expert.
double expert_rows_per_token(const MoELayer& moe, int64_t context) {
  const Router& router = *moe.site().router;
  const RouterFacts facts = router.facts();
  const RouterSpec& spec = router.spec();
  if (facts.plan == PlanForm::kMerge) return 1;
  if (facts.plan == PlanForm::kSoft) {
    const int64_t slots = spec.options.declared("slots_per_expert") ? spec.options.integer("slots_per_expert") : 1;
    return static_cast<double>(slots * spec.experts) / static_cast<double>(context);
  }
  const int64_t k = choices_per_row(facts, spec);
  return static_cast<double>(k > 0 ? k : spec.experts);
}

double mean_flops_per_row(const ExpertBank& bank) {
  double sum = 0;
  for (int64_t e = 0; e < bank.experts(); ++e) sum += bank.flops_per_row(e);
  return sum / static_cast<double>(bank.experts());
}

}  // namespace

int64_t choices_per_row(const RouterFacts& facts, const RouterSpec& spec, Mode mode) {
  if (facts.plan_in(mode) != PlanForm::kSparse || facts.variable_k) return 0;
  if (mode != Mode::kTrain && facts.in_evaluation == InEvaluation::kAllExperts) return spec.experts;
  return facts.fixed_k == 0 && spec.options.declared("k") ? spec.k() : facts.fixed_k;
}

Block::Block(int64_t index, const BlockSettings& settings) : sees_future_(settings.sees_future) {
  const auto ones_D = [&] { return at::ones({settings.width}, at::TensorOptions().dtype(settings.dtype)); };
  if (settings.attention) norm_attention_D_ = add_parameter("norm_attention", ones_D());
  norm_experts_D_ = add_parameter(settings.moe ? "norm_moe" : "norm_dense", ones_D());
  if (settings.attention) {
    attention_ = std::make_shared<SelfAttention>(*settings.attention);
    add_child("attention", attention_);
  }
  if (settings.moe) {
    moe_ = std::make_shared<MoELayer>(fmt::format("layers.{}.moe", index), *settings.moe);
    add_child("moe", moe_);
  } else {
    dense_ = make_experts(settings.dense->expert, settings.dense->spec);
    add_child("dense", dense_);
  }
}

BlockOutput Block::forward(const Tensor& x_BLD, const BatchRows& rows, RouteInput in, const BlockState& state) const {
  Tensor middle_BLD = x_BLD;
  if (attention_) middle_BLD = x_BLD.add(attention_->forward(rms_norm(x_BLD, norm_attention_D_), state.first, state.attention));
  const Tensor normed_BLD = rms_norm(middle_BLD, norm_experts_D_);
  if (moe_) return routed(middle_BLD, normed_BLD, rows, std::move(in), state);
  const Tensor y_TD = dense_->forward_with(dense_->parameters_of(0), rows.gather(normed_BLD));
  return {middle_BLD.add(rows.scatter(y_TD)), std::nullopt};
}

BlockOutput Block::routed(const Tensor& x_BLD, const Tensor& normed_BLD, const BatchRows& rows, RouteInput in,
                          const BlockState& state) const {
  RouteState fresh;
  in.x_TD = rows.gather(normed_BLD);
  LayerOutput layer = moe_->forward(in, state.router ? *state.router : fresh, state.experts);
  const Tensor y_BLD = rows.scatter(layer.y_TD);
  return {x_BLD.add(y_BLD), site_result(std::move(layer))};
}

int64_t Block::active_parameters() const {
  if (!moe_) return parameter_count();
  const ExpertBank& bank = *moe_->site().bank;
  const Router& router = *moe_->site().router;
  const int64_t k = choices_per_row(router.facts(), router.spec());
  if (k == 0) return parameter_count();
  return parameter_count() - bank.parameter_count() + k * bank.parameter_count() / bank.experts();
}

double Block::flops_per_row(int64_t context) const {
  const double attention = attention_ ? attention_->flops_per_row(context) : 0;
  if (!moe_) return attention + dense_->flops_per_row(0);
  const ExpertBank& bank = *moe_->site().bank;
  const auto every_row = static_cast<double>(moe_->parameter_count() - bank.parameter_count());  // router and shared experts
  return attention + 2 * every_row + expert_rows_per_token(*moe_, context) * mean_flops_per_row(bank);
}

}  // namespace moelab
