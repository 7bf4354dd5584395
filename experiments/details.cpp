// What `describe` says of each kind of plugin beyond its entry in `list`.
#include "experiments/catalogue.h"

#include "core/dataset.h"
#include "core/diagnostics.h"
#include "core/expert.h"
#include "core/layer_tables.h"
#include "core/loss.h"
#include "core/model/block.h"
#include "core/router.h"
#include "trainers/objective.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <cmath>

namespace moelab {
namespace {

// Sizes at which numbers are given as examples.
constexpr int64_t kExampleExperts = 8;
constexpr int64_t kExampleWidth = 16;

Json example_value(double value) { return std::isnan(value) ? Json(nullptr) : Json(value); }

RouterSpec default_spec(const RouterEntry& entry) {
  RouterSpec spec;
  spec.width = kExampleWidth;
  spec.experts = spec.max_experts = kExampleExperts;
  spec.vocabulary = 256;
  spec.init = random_key(0, "describe");
  spec.options = Options(entry.options);
  return spec;
}

Json causality_row(const Router& router, const std::string& setting, const CapacityPolicy& policy, Mode mode) {
  const Causality verdict = causality(router.facts(), policy, mode, choices_per_row(router.facts(), router.spec(), mode));
  return {{"when", fmt::format("{}, {}", to_string(mode), setting)}, {"causal", verdict.causal}, {"reason", verdict.reason}};
}

Json causality_json(const Router& router) {
  const CapacityPolicy none, &paper = router.entry().paper_capacity;
  Json rows = Json::array();
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) rows.push_back(causality_row(router, "default options", none, mode));
  if (paper.mode != CapacityPolicy::Mode::kNone)
    rows.push_back(causality_row(router, "capacity = \"paper\"", paper, Mode::kTrain));
  return rows;
}

std::string settings_text(const std::map<std::string, OptionValue>& settings) {
  std::string text;
  for (const auto& [name, value] : settings) text += fmt::format("{}{} = {}", text.empty() ? "" : ", ", name, to_text(value));
  return text;
}

Json paper_loss_json(const PaperLoss& paper, const RouterEntry& router, int64_t k) {
  const LossEntry& entry = Registry<LossEntry>::instance().find(paper.name);
  Options options(entry.options);
  for (const OptionSpec& spec : entry.options)
    if (const auto given = paper.options.find(spec.name); given != paper.options.end()) options.set(spec, given->second);
  const Landmarks marks = entry.make(options, router)->landmarks(kExampleExperts, k);
  return {{"name", paper.name},
          {"coefficient", paper.coefficient},
          {"at_balance", example_value(marks.balance)},
          {"at_collapse", example_value(marks.collapse)},
          {"options", settings_text(paper.options)}};
}

Json probes_json(const RouterEntry& entry) {
  Json probes = Json::array();
  for (const ProbeDoc& probe : entry.probes)
    probes.push_back({{"name", "probe." + probe.name}, {"shape", probe.shape}, {"doc", probe.doc}});
  return probes;
}

std::string none_if_empty(const std::string& text, const char* none) { return text.empty() ? none : text; }

// Which routers a loss can be attached to, or why not.
Json attachments_json(const LossEntry& loss) {
  Json rows = Json::array();
  for (const RouterEntry& router : Registry<RouterEntry>::instance().all()) {
    const std::string refusal = loss.refuses ? loss.refuses(router.facts) : "";
    rows.push_back({{"router", router.name}, {"attaches", refusal.empty()}, {"reason", refusal}});
  }
  return rows;
}

}  // namespace

Json router_details(const std::string& name) {
  const RouterEntry& entry = Registry<RouterEntry>::instance().find(name);
  const std::unique_ptr<Router> router = make_router(name, default_spec(entry));
  const int64_t k = choices_per_row(router->facts(), router->spec());
  Json losses = Json::array();
  for (const PaperLoss& paper : entry.paper_losses) losses.push_back(paper_loss_json(paper, entry, k));
  Json differences = entry.differences;
  if (entry.differences.empty()) differences = Json::array({"none known"});
  return {{"equation", entry.equation},
          {"differences", differences},
          {"paper_losses", losses},
          {"paper_losses_at", fmt::format("experts = {}, k = {}", kExampleExperts, k == 0 ? "varies" : std::to_string(k))},
          {"causality", causality_json(*router)},
          {"noise", none_if_empty(entry.noise_shape, "none")},
          {"probes", probes_json(entry)}};
}

Json expert_details(const std::string& name) {
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(name);
  const auto bank = make_experts(name, default_expert_spec(entry, kExampleWidth, kExampleExperts));
  Json tensors = Json::array();
  for (const NamedTensor& stacked : bank->groups().front().stacked)
    tensors.push_back(
        {{"name", "experts." + stacked.name}, {"shape", fmt::format("[{}]", fmt::join(stacked.tensor.sizes(), ","))}});
  Json plans = Json::array();
  for (const PlanForm form : {PlanForm::kSparse, PlanForm::kSoft, PlanForm::kMerge}) {
    const std::string reason = refused_plan(entry.place, *bank, form);
    plans.push_back({{"form", to_string(form)}, {"works", reason.empty()}, {"reason", reason}});
  }
  Json differences = entry.differences;
  if (entry.differences.empty()) differences = Json::array({"none known"});
  return {{"equation", entry.equation},
          {"differences", differences},
          {"size", fmt::format("{} parameters and {} FLOPs per row for each expert at width {} with default options",
                               bank->parameters_per_expert(0), bank->flops_per_row(0), kExampleWidth)},
          {"tensors", tensors},
          {"tensors_at", fmt::format("width = {}, experts = {}", kExampleWidth, kExampleExperts)},
          {"plans", plans}};
}

Json loss_details(const std::string& name) {
  const LossEntry& entry = Registry<LossEntry>::instance().find(name);
  const auto loss = entry.make(Options(entry.options), RouterEntry{});
  Json values = Json::array();
  for (const int64_t active : {kExampleExperts, kExampleExperts / 2}) {  // the second half: a layer with room to grow
    for (const int64_t k : {int64_t{1}, int64_t{2}}) {
      const Landmarks marks = loss->landmarks_among(active, kExampleExperts, k);
      values.push_back({{"active", active},
                        {"experts", kExampleExperts},
                        {"k", k},
                        {"at_balance", example_value(marks.balance)},
                        {"at_collapse", example_value(marks.collapse)}});
    }
  }
  return {{"equation", entry.equation},
          {"default_coefficient", entry.coefficient},
          {"values", values},
          {"values_with_room_to_grow", "E is max_experts; balance is an even share for each active expert"},
          {"attaches_to", attachments_json(entry)}};
}

Json objective_details(const std::string& name) {
  return {{"equation", Registry<ObjectiveEntry>::instance().find(name).equation}};
}
Json dataset_details(const std::string& name) { return {{"doc", Registry<DatasetEntry>::instance().find(name).doc}}; }
Json model_details(const std::string& name) { return {{"doc", Registry<ModelEntry>::instance().find(name).doc}}; }

Json metric_details(const std::string& name) {
  for (const MetricDoc& doc : metric_docs())
    if (doc.name == name) return {{"equation", doc.equation}, {"range", doc.range}};
  return Json::object();
}

std::vector<std::string> router_facts_in_words(const Json& facts) {
  struct Sentence {
    const char* fact;
    bool value;
    const char* text;
  };
  static const Sentence sentences[] = {
      {"learned", false, "no gradient reaches its parameters"},
      {"noisy_in_training", true, "draws noise in training"},
      {"random_in_eval", true, "draws random numbers in evaluation too"},
      {"stateful", true, "moves buffers between steps"},
      {"changes_experts", true, "adds and removes experts"},
      {"variable_k", true, "the number of experts varies from row to row"},
      {"needs_token_ids", true, "needs token ids"},
      {"needs_segments", true, "needs segments"},
      {"needs_domain", true, "needs domain labels"},
      {"needs_global_batch", true, "decides over the rows of all ranks"},
      {"mixes_ranks", true, "ranks decide over rows dealt out among them"},
      {"batch_independent", false, "in training a row's decision depends on other rows"},
      {"batch_independent_eval", false, "in evaluation a row's decision depends on other rows"},
      {"reads_prompt", true, "in evaluation it reads a prompt as a whole"},
      {"looks_ahead", true, "reads later tokens"},
      {"straight_through", true, "its gradient is a declared surrogate"},
      {"differentiable_gate", false, "its gates do not depend on scores"},
      {"permutation_equivariant", false, "permuting experts does not permute the plan"},
      {"decodes", false, "cannot decode token by token"},
      {"has_scores", false, "has no scores that losses could read"},
      {"distils", true, "a second router learns its choices"},
      {"time_ordered", true, "depends on no later row"},
  };
  std::vector<std::string> words{facts.at("plan").get<std::string>() + " plan"};
  for (const Sentence& s : sentences)
    if (facts.at(s.fact) == s.value) words.push_back(s.text);
  if (facts.at("passes") != 1) words.push_back(fmt::format("{} forward passes per step", facts.at("passes").get<int64_t>()));
  const std::string evaluation = facts.at("in_evaluation");
  if (evaluation != to_string(InEvaluation::kAsInTraining)) words.push_back("evaluates with " + evaluation);
  if (facts.at("fixed_k") != 0) words.push_back(fmt::format("always {} per row", facts.at("fixed_k").get<int64_t>()));
  return words;
}

}  // namespace moelab
