#include "core/model/adapters.h"

#include "core/error.h"
#include "core/grouped.h"
#include "core/layer_tables.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

namespace moelab {
namespace {

std::string last_word(const std::string& map) { return map.substr(map.rfind('.') + 1); }

std::vector<std::string> names_of(const std::vector<LinearShape>& linears) {
  std::vector<std::string> names;
  for (const LinearShape& linear : linears) names.push_back(linear.name);
  return names;
}

std::set<std::string> words_in(const std::string& text) {
  std::set<std::string> words;
  std::string word;
  for (const char c : text + ",") {
    if (c == ' ') continue;
    if (c != ',') word += c;
    else if (!word.empty()) words.insert(std::exchange(word, ""));
  }
  return words;
}

// One expert on the maps of one decision: what plans may be refused for.
std::shared_ptr<ExpertBank> sample_adapter(const AdapterSettings& settings) {
  ExpertSpec spec = settings.layer.expert_spec;
  spec.experts = 1;
  spec.linears = settings.linears;
  if (!settings.one_decision && !spec.linears.empty()) spec.linears.resize(1);
  return make_experts(settings.layer.expert, spec);
}

bool is_named(const std::string& map, const std::string& word) {
  return word == "all" || word == map || map.starts_with(word + ".");
}

std::vector<LinearShape> targeted(const Table& expert, const std::set<std::string>& wanted,
                                  const std::vector<LinearShape>& linears) {
  std::vector<LinearShape> targets;
  for (const LinearShape& linear : linears)
    if (std::any_of(wanted.begin(), wanted.end(), [&](const std::string& word) { return is_named(linear.name, word); }))
      targets.push_back(linear);
  for (const std::string& word : wanted)
    if (std::none_of(targets.begin(), targets.end(), [&](const LinearShape& map) { return is_named(map.name, word); }))
      expert.fail("targets", fmt::format("'{}' names no linear map of a block; it has {}; or write all, attention, dense, or ffn",
                                         word, fmt::join(names_of(linears), ", ")));
  return targets;
}

// Of a block that whole feed-forward layers stand in, the maps of attention are left.
void refuse_beside_feed_forward(const Table& expert, const AdapterSettings& settings) {
  if (!settings.feed_forward || settings.linears.empty()) return;
  for (const LinearShape& map : settings.linears)
    if (map.name.starts_with("dense."))
      expert.fail("targets", fmt::format("ffn adapts {} already; beside it write attention, or maps of it", map.name));
  if (settings.one_decision)
    expert.fail("decision",
                "one decision serves linear maps alone, or a feed-forward layer alone; use decision = \"linear\", which "
                "gives ffn a router and each map one");
}

AdapterBank& adapter_bank(const MoELayer& layer) {
  auto* bank = dynamic_cast<AdapterBank*>(layer.site().bank.get());
  check_invariant(bank != nullptr, "experts '" + layer.settings().expert + "' stand on linear maps, but are no AdapterBank");
  return *bank;
}

// A weight for every expert of a place.
std::vector<double> weights_at(const MoELayer& layer, const FoldedExperts& experts) {
  const int64_t own = layer.site().bank->experts();
  std::vector<double> weight_E = experts.weight_E;
  if (experts.expert) {
    if (*experts.expert < 0 || *experts.expert >= own)
      usage_error(
          fmt::format("{} has the experts 0 to {}, but expert {} is asked for", layer.site().path, own - 1, *experts.expert));
    weight_E.assign(static_cast<size_t>(own), 0);
    weight_E[static_cast<size_t>(*experts.expert)] = 1;
  }
  if (static_cast<int64_t>(weight_E.size()) != own)
    usage_error(fmt::format("{} has {} experts, but {} weights are given", layer.site().path, own, weight_E.size()));
  return weight_E;
}

int64_t only_expert(const MoELayer& layer, const FoldedExperts& experts) {
  const std::vector<double> weight_E = weights_at(layer, experts);
  const auto one = std::find(weight_E.begin(), weight_E.end(), 1.0);
  if (one == weight_E.end() || std::count(weight_E.begin(), weight_E.end(), 0.0) + 1 != layer.site().bank->experts())
    usage_error(
        fmt::format("{}: a weighted sum of whole feed-forward layers is no feed-forward layer of their size; fold one "
                    "expert with weight 1",
                    layer.site().path));
  return one - weight_E.begin();
}

Tensor weighted_delta(const AdapterBank& bank, size_t map, const std::vector<double>& weight_E) {
  Tensor sum_OI;
  for (int64_t e = 0; e < bank.experts(); ++e) {
    const Tensor delta_OI = bank.dense_deltas(e).at(map).mul(weight_E[static_cast<size_t>(e)]);
    sum_OI = sum_OI.defined() ? sum_OI.add(delta_OI) : delta_OI;
  }
  return sum_OI;
}

}  // namespace

AdapterSettings read_adapters(const Table& expert, LayerSettings layer, const std::vector<LinearShape>& linears) {
  const Options& options = layer.expert_spec.options;
  for (const char* of_base : {"activation", "width", "bias"})
    if (options.declared(of_base) && options.was_set(of_base))
      expert.fail(of_base, fmt::format("'{}' is the base's, which is the model's own layer: [model] describes it", of_base));
  AdapterSettings settings;
  settings.one_decision = options.text("decision") == "layer";
  std::set<std::string> words = words_in(options.text("targets"));
  if (words.empty()) expert.fail("targets", "nothing of a block is named");
  settings.feed_forward = words.erase("ffn") > 0;
  settings.linears = targeted(expert, words, linears);
  settings.layer = std::move(layer);
  refuse_beside_feed_forward(expert, settings);
  const RouterFacts facts = make_router(settings.layer.router, settings.layer.router_spec)->facts();
  refuse_unfit_plans(expert, settings.one_decision ? "decision" : "name", settings.layer, facts,
                     [&] { return sample_adapter(settings); });
  return settings;
}

BlockAdapters::BlockAdapters(const std::string& path, const AdapterSettings& settings,
                             const std::shared_ptr<const DenseMaps>& dense)
    : one_decision_(settings.one_decision) {
  if (settings.feed_forward) lay_feed_forward(path, settings.layer, dense);
  if (one_decision_ && !settings.linears.empty()) lay(path, "block", settings.layer, settings.linears);
  else for (const LinearShape& linear : settings.linears) lay(path, last_word(linear.name), settings.layer, {linear});
}

void BlockAdapters::lay_feed_forward(const std::string& path, LayerSettings settings,
                                     const std::shared_ptr<const DenseMaps>& dense) {
  settings.expert_spec.base = dense;
  feed_forward_ = std::make_shared<MoELayer>(path + ".adapters.ffn", std::move(settings));
  feed_forward_maps_ = dense->form().maps();
  add_child("ffn", feed_forward_);
}

void BlockAdapters::lay(const std::string& path, const std::string& name, LayerSettings settings,
                        const std::vector<LinearShape>& linears) {
  settings.router_spec.width = settings.expert_spec.width = linears.front().in;
  settings.router_spec.init = settings.router_spec.init.with(name);
  settings.expert_spec.init = settings.expert_spec.init.with(name);
  for (const LinearShape& linear : linears)
    settings.expert_spec.linears.push_back({last_word(linear.name), linear.in, linear.out});
  const auto layer = std::make_shared<MoELayer>(fmt::format("{}.adapters.{}", path, name), std::move(settings));
  add_child(name, layer);
  for (size_t stage = 0; stage < linears.size(); ++stage)
    laid_.push_back({linears[stage].name, layer, &adapter_bank(*layer), stage});
}

std::vector<MoELayer*> BlockAdapters::sites() const {
  std::vector<MoELayer*> all;
  for (const Laid& laid : laid_)
    if (all.empty() || all.back() != laid.layer.get()) all.push_back(laid.layer.get());
  if (feed_forward_) all.push_back(feed_forward_.get());  // beside it, only attention has adapters
  return all;
}

bool BlockAdapters::adapts(const std::string& map) const {
  return std::any_of(laid_.begin(), laid_.end(), [&](const Laid& laid) { return laid.map == map; });
}

Tensor BlockAdapters::delta(Pass& pass, const std::string& map, const Tensor& x_TD) const {
  const auto laid = std::find_if(laid_.begin(), laid_.end(), [&](const Laid& one) { return one.map == map; });
  if (laid == laid_.end()) return {};
  if (!one_decision_) return pass.walk.run(*laid->layer, x_TD);
  if (!pass.plan) pass.plan = pass.walk.decide(*laid->layer, x_TD).plan;
  const GroupedProductGuard products(product_of(laid->layer->settings().execution));
  return laid->bank->delta(*pass.plan, laid->stage, pass.walk.input(x_TD));
}

Tensor BlockAdapters::feed_forward(Pass& pass, const Tensor& x_TD) const { return pass.walk.run(*feed_forward_, x_TD); }

std::vector<NamedTensor> BlockAdapters::folded(const FoldedExperts& experts) const {
  const at::NoGradGuard no_grad;
  std::vector<NamedTensor> all;
  for (const Laid& laid : laid_)
    all.push_back({laid.map, weighted_delta(*laid.bank, laid.stage, weights_at(*laid.layer, experts))});
  if (!feed_forward_) return all;
  const std::vector<Tensor> deltas = adapter_bank(*feed_forward_).dense_deltas(only_expert(*feed_forward_, experts));
  for (size_t map = 0; map < deltas.size(); ++map) all.push_back({"dense." + feed_forward_maps_.at(map), deltas[map]});
  return all;
}

}  // namespace moelab
