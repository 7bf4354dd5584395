#include "core/model/block.h"

#include <ATen/ops/ones.h>

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

SiteResult site_result(LayerOutput layer) {
  RouteOutput& routed = layer.routed;
  return {std::move(layer.statistics), std::move(layer.record), std::move(routed.assignment), std::move(routed.deltas),
          std::move(routed.carry)};
}

std::vector<SiteResult> site_results(SiteWalk& walk) {
  std::vector<SiteResult> results;
  for (LayerOutput& layer : walk.take()) results.push_back(site_result(std::move(layer)));
  return results;
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

// Of a layer of experts that map rows: its router and shared experts, and the expert rows of a token.
double site_flops(const MoELayer& moe, int64_t context) {
  const ExpertBank& bank = *moe.site().bank;
  const auto every_row = static_cast<double>(moe.parameter_count() - bank.parameter_count());
  return 2 * every_row + expert_rows_per_token(moe, context) * mean_flops_per_row(bank);
}

}  // namespace

int64_t choices_per_row(const RouterFacts& facts, const RouterSpec& spec, Mode mode) {
  if (facts.plan_in(mode) != PlanForm::kSparse || facts.variable_k) return 0;
  if (mode != Mode::kTrain && facts.in_evaluation == InEvaluation::kAllExperts) return spec.experts;
  if (facts.fixed_k == 0 && spec.options.declared("k")) return spec.k();
  return std::min(facts.fixed_k, spec.max_experts);  // one expert cannot be chosen twice
}

Block::Block(int64_t index, const BlockSettings& settings) : sees_future_(settings.sees_future) {
  const auto ones_D = [&] { return at::ones({settings.width}, at::TensorOptions().dtype(settings.dtype)); };
  const std::string path = fmt::format("layers.{}", index);
  if (settings.attention) norm_attention_D_ = add_parameter("norm_attention", ones_D());
  norm_experts_D_ = add_parameter(settings.moe ? "norm_moe" : "norm_dense", ones_D());
  if (settings.attention) add_attention(path, settings);
  if (settings.moe) {
    moe_ = std::make_shared<MoELayer>(path + ".moe", *settings.moe);
    add_child("moe", moe_);
  } else {
    add_dense(settings);
  }
  if (settings.adapters) add_adapters(path, settings);
}

void Block::add_attention(const std::string& path, const BlockSettings& settings) {
  if (!settings.routed_attention) {
    attention_ = std::make_shared<SelfAttention>(*settings.attention);
    return add_child("attention", attention_);
  }
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(settings.routed_attention->expert);
  routed_attention_ = entry.make_attention({path + ".attention", *settings.attention, *settings.routed_attention});
  add_child("attention", routed_attention_);
}

void Block::add_dense(const BlockSettings& settings) {
  dense_ = make_experts(settings.dense->expert, settings.dense->spec);
  add_child("dense", dense_);
}

// What they stand on is frozen.
void Block::add_adapters(const std::string& path, const BlockSettings& settings) {
  for (const NamedTensor& parameter : parameters()) parameter.tensor.requires_grad_(false);
  dense_maps_ = std::make_shared<DenseMaps>(*dense_, activation_named(settings.dense->spec.options.text("activation")));
  adapters_ = std::make_shared<BlockAdapters>(path, *settings.adapters, dense_maps_);
  add_child("adapters", adapters_);
}

BlockOutput Block::forward(const Tensor& x_BLD, const BatchRows& rows, RouteInput in, std::vector<SiteShare> shares,
                           const BlockState& state) const {
  SiteWalk walk(std::move(in), std::move(shares));
  BlockAdapters::Pass pass{walk};
  Tensor middle_BLD = x_BLD;
  if (norm_attention_D_.defined()) middle_BLD = x_BLD.add(attend(rms_norm(x_BLD, norm_attention_D_), rows, pass, state));
  const Tensor y_TD = feed_forward(rows.gather(rms_norm(middle_BLD, norm_experts_D_)), pass);
  return {middle_BLD.add(rows.scatter(y_TD)), site_results(walk)};
}

Tensor Block::attend(const Tensor& x_BLD, const BatchRows& rows, BlockAdapters::Pass& pass, const BlockState& state) const {
  if (routed_attention_) return rows.scatter(routed_attention_->forward(rows.gather(x_BLD), pass.walk, state.attention));
  if (!adapters_) return attention_->forward(x_BLD, state.first, state.attention);
  return attention_->forward(x_BLD, state.first, state.attention, [&](const char* map, const Tensor& in_BLD) {
    const std::string name = std::string("attention.") + map;
    return adapters_->adapts(name) ? rows.scatter(adapters_->delta(pass, name, rows.gather(in_BLD))) : Tensor();
  });
}

Tensor Block::feed_forward(const Tensor& x_TD, BlockAdapters::Pass& pass) const {
  if (moe_) return pass.walk.run(*moe_, x_TD);
  if (!adapters_) return dense_->forward_with(dense_->parameters_of(0), x_TD);
  if (adapters_->replaces_feed_forward()) return adapters_->feed_forward(pass, x_TD);
  const std::vector<std::string> names = dense_maps_->form().maps();
  const auto linear = [&](size_t map, const Tensor& rows_TI) {
    const Tensor y_TO = dense_maps_->linear(map, rows_TI), more_TO = adapters_->delta(pass, "dense." + names[map], rows_TI);
    return more_TO.defined() ? y_TO.add(more_TO) : y_TO;
  };
  return linear(dense_maps_->form().last(), dense_maps_->form().hidden(x_TD, linear));
}

std::vector<MoELayer*> Block::sites() const {
  std::vector<MoELayer*> all;
  if (routed_attention_) all = routed_attention_->sites();
  if (adapters_)
    for (MoELayer* site : adapters_->sites()) all.push_back(site);
  if (moe_) all.push_back(moe_.get());
  return all;
}

int64_t Block::active_parameters() const {
  int64_t active = parameter_count();
  for (const MoELayer* site : sites()) {
    const ExpertBank& bank = *site->site().bank;
    const Router& router = *site->site().router;
    const int64_t k = choices_per_row(router.facts(), router.spec());
    if (k > 0) active += k * bank.parameter_count() / bank.experts() - bank.parameter_count();
  }
  return active;
}

double Block::flops_per_row(int64_t context) const {
  double flops = attention_ ? attention_->flops_per_row(context) : 0;
  if (routed_attention_) flops += routed_attention_->flops_per_row(context);
  if (dense_) flops += dense_->flops_per_row(0);
  if (adapters_)
    for (const MoELayer* site : adapters_->sites()) flops += site_flops(*site, context);
  return moe_ ? flops + site_flops(*moe_, context) : flops;
}

}  // namespace moelab
