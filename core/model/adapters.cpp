#include "core/model/adapters.h"

#include "core/error.h"
#include "core/layer_tables.h"

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

// What is dropped is drawn per row of the layer, which only the experts' own way through a sparse plan knows.
void refuse_unread_dropout(const Table& expert, const AdapterSettings& settings) {
  const LayerSettings& layer = settings.layer;
  const Options& options = layer.expert_spec.options;
  if (!options.declared("dropout") || options.real("dropout") == 0) return;
  const bool sparse = make_router(layer.router, layer.router_spec)->facts().plan_in(Mode::kTrain) == PlanForm::kSparse;
  if (sparse && (settings.one_decision || layer.execution == Execution::kAuto)) return;
  expert.fail("dropout",
              fmt::format("experts '{}': dropout is drawn per row of the layer, which takes a router with a sparse plan "
                          "and execution = \"auto\"; set dropout = 0",
                          layer.expert));
}

bool is_named(const std::string& map, const std::string& word) {
  return word == "all" || word == map || map.starts_with(word + ".");
}

std::vector<LinearShape> targeted(const Table& expert, const std::string& words, const std::vector<LinearShape>& linears) {
  const std::set<std::string> wanted = words_in(words);
  std::vector<LinearShape> targets;
  for (const LinearShape& linear : linears)
    if (std::any_of(wanted.begin(), wanted.end(), [&](const std::string& word) { return is_named(linear.name, word); }))
      targets.push_back(linear);
  for (const std::string& word : wanted)
    if (std::none_of(targets.begin(), targets.end(), [&](const LinearShape& map) { return is_named(map.name, word); }))
      expert.fail("targets",
                  fmt::format("'{}' names no linear map of a block; it has {}; or write all, attention, dense, or ffn alone",
                              word, fmt::join(names_of(linears), ", ")));
  if (targets.empty()) expert.fail("targets", "no linear map is named");
  return targets;
}

AdapterBank& adapter_bank(const MoELayer& layer) {
  auto* bank = dynamic_cast<AdapterBank*>(layer.site().bank.get());
  check_invariant(bank != nullptr, "experts '" + layer.settings().expert + "' stand on linear maps, but are no AdapterBank");
  return *bank;
}

}  // namespace

AdapterSettings read_adapters(const Table& expert, LayerSettings layer, const std::vector<LinearShape>& linears) {
  const Options& options = layer.expert_spec.options;
  for (const char* of_base : {"activation", "width", "bias"})
    if (options.declared(of_base) && options.was_set(of_base))
      expert.fail(of_base, fmt::format("'{}' is the base's, which is the model's own layer: [model] describes it", of_base));
  const std::string targets = options.text("targets");
  AdapterSettings settings{std::move(layer), targets == "ffn" ? std::vector<LinearShape>{} : targeted(expert, targets, linears),
                           false};
  settings.one_decision = settings.layer.expert_spec.options.text("decision") == "layer";
  refuse_unfit_plans(expert, settings.one_decision ? "decision" : "name", settings.layer,
                     [&] { return sample_adapter(settings); });
  refuse_unread_dropout(expert, settings);
  return settings;
}

BlockAdapters::BlockAdapters(const std::string& path, const AdapterSettings& settings,
                             const std::shared_ptr<const DenseMaps>& dense)
    : one_decision_(settings.one_decision) {
  if (settings.linears.empty()) {
    LayerSettings layer = settings.layer;
    layer.expert_spec.base = dense;
    feed_forward_ = std::make_shared<MoELayer>(path + ".adapters.ffn", std::move(layer));
    add_child("ffn", feed_forward_);
    return;
  }
  if (one_decision_) lay(path, "block", settings.layer, settings.linears);
  else for (const LinearShape& linear : settings.linears) lay(path, last_word(linear.name), settings.layer, {linear});
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
  if (feed_forward_) return {feed_forward_.get()};
  std::vector<MoELayer*> all;
  for (const Laid& laid : laid_)
    if (all.empty() || all.back() != laid.layer.get()) all.push_back(laid.layer.get());
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
  return laid->bank->delta(*pass.plan, laid->stage, pass.walk.input(x_TD));
}

Tensor BlockAdapters::feed_forward(Pass& pass, const Tensor& x_TD) const { return pass.walk.run(*feed_forward_, x_TD); }

}  // namespace moelab
