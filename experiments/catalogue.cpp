#include "experiments/catalogue.h"

#include "core/dataset.h"
#include "core/diagnostics.h"
#include "core/expert.h"
#include "core/loss.h"
#include "core/model/model.h"
#include "core/router.h"
#include "trainers/objective.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

const char* plan_word(PlanForm form) {
  switch (form) {
    case PlanForm::kSparse: return "sparse";
    case PlanForm::kSoft: return "soft";
    case PlanForm::kMerge: return "merge";
  }
  return "?";
}

Json facts_json(const RouterEntry& entry) {
  const RouterFacts& f = entry.facts;
  return {{"plan", plan_word(f.plan)},
          {"learned", f.learned},
          {"noisy_in_training", f.noisy_in_training},
          {"random_in_eval", f.random_in_eval},
          {"stateful", f.stateful},
          {"changes_experts", f.changes_experts},
          {"variable_k", f.variable_k},
          {"needs_token_ids", f.needs_token_ids},
          {"needs_segments", f.needs_segments},
          {"needs_domain", f.needs_domain},
          {"needs_global_batch", f.needs_global_batch},
          {"mixes_ranks", f.mixes_ranks},
          {"batch_independent", f.batch_independent},
          {"batch_independent_eval", f.batch_independent_eval},
          {"reads_prompt", f.reads_prompt},
          {"looks_ahead", f.looks_ahead},
          {"straight_through", f.straight_through},
          {"differentiable_gate", f.differentiable_gate},
          {"permutation_equivariant", f.permutation_equivariant},
          {"decodes", f.decodes},
          {"passes", f.passes},
          {"fixed_k", f.fixed_k},
          {"has_scores", f.has_scores},
          {"probabilities", to_string(f.probabilities)},
          {"distils", f.distils},
          {"time_ordered", f.time_ordered},
          {"in_evaluation", to_string(f.in_evaluation)}};
}

Json facts_json(const ExpertEntry& entry) {
  const auto bank = make_experts(entry.name, default_expert_spec(entry, 8, 2));
  return {{"stages", bank->stages()}, {"merges", bank->has_forward_with()}, {"recomputes", entry.recomputes}};
}

Json facts_json(const LossEntry& entry) {
  const auto loss = entry.make(Options(entry.options), RouterEntry{});
  return {{"reduction", loss->reduces_by_sum() ? "sum" : "mean"}, {"pooled_over_layers", loss->pooled_over_layers()}};
}

Json facts_json(const ObjectiveEntry& entry) { return {{"passes", make_objective(entry.name)->passes()}}; }
Json facts_json(const DatasetEntry& entry) {
  return {{"holds", to_string(entry.holds)}, {"needs_preparation", static_cast<bool>(entry.prepare)}};
}
Json facts_json(const ModelEntry& entry) { return {{"reads", to_string(entry.reads)}, {"causal", entry.causal}}; }

// Entries differ in what they have: a data set, for one, cites nothing.
template <class Entry>
Json entry_json(const Entry& entry) {
  std::string citation;
  Json options = Json::array();
  if constexpr (requires { entry.citation; }) citation = entry.citation;
  if constexpr (requires { entry.options; }) options = options_json(entry.options);
  return {
      {"name", entry.name}, {"title", entry.title}, {"citation", citation}, {"facts", facts_json(entry)}, {"options", options}};
}

template <class Entry>
Json list_of() {
  Json entries = Json::array();
  for (const Entry& entry : Registry<Entry>::instance().all()) entries.push_back(entry_json(entry));
  return entries;
}

Json list_of_metrics() {
  std::vector<MetricDoc> docs = metric_docs();
  std::sort(docs.begin(), docs.end(), [](const MetricDoc& a, const MetricDoc& b) { return a.name < b.name; });
  Json entries = Json::array();
  for (const MetricDoc& doc : docs)
    entries.push_back({{"name", doc.name},
                       {"title", doc.doc},
                       {"citation", ""},
                       {"facts", {{"range", doc.range}}},
                       {"options", Json::array()}});
  return entries;
}

Json bound_json(double bound) { return std::isfinite(bound) ? Json(bound) : Json(nullptr); }

Json value_json(const OptionValue& value) {
  return std::visit([](const auto& v) { return Json(v); }, value);
}

// With what its range and its choices do not say.
std::string option_doc(const OptionSpec& spec) {
  const std::string below = spec.max_excluded ? fmt::format("; less than {}", spec.max) : "";
  const std::string readers = spec.readers.empty() ? "" : fmt::format(" (read {})", readers_text(spec));
  return spec.doc + below + readers;
}

std::vector<std::string> names_of(const Json& entries) {
  std::vector<std::string> names;
  for (const Json& entry : entries) names.push_back(entry.at("name"));
  return names;
}

}  // namespace

ExpertSpec default_expert_spec(const ExpertEntry& entry, int64_t width, int64_t experts) {
  ExpertSpec spec;
  spec.width = width;
  spec.experts = experts;
  spec.init = random_key(0, "describe");
  spec.options = Options(entry.options);
  return spec;
}

const std::vector<Kind>& catalogue() {
  static const std::vector<Kind> kinds = {
      {"routers", list_of<RouterEntry>, router_details},          {"experts", list_of<ExpertEntry>, expert_details},
      {"losses", list_of<LossEntry>, loss_details},               {"objectives", list_of<ObjectiveEntry>, objective_details},
      {"datasets", list_of<DatasetEntry>, dataset_details},       {"models", list_of<ModelEntry>, model_details},
      {"metrics", list_of_metrics, metric_details},
  };
  return kinds;
}

const Kind& find_kind(const std::string& name) {
  std::vector<std::string> names;
  for (const Kind& kind : catalogue()) {
    if (kind.name == name || kind.name == name + "s") return kind;  // "router" is understood too
    names.push_back(kind.name);
  }
  const std::string hint = did_you_mean(name, names);
  usage_error(fmt::format("there is no kind '{}'{} kinds: {}", name, hint.empty() ? ";" : hint, fmt::join(names, ", ")));
}

Json describe(const Kind& kind, const std::string& name) {
  const Json entries = kind.list();
  for (const Json& entry : entries) {
    if (entry.at("name") != name) continue;
    Json whole = entry;
    whole.update(kind.details(name));
    return whole;
  }
  const std::vector<std::string> names = names_of(entries);
  const std::string hint = did_you_mean(name, names);
  usage_error(
      fmt::format("'{}' is none of the {}{} there are {}", name, kind.name, hint.empty() ? ";" : hint, fmt::join(names, ", ")));
}

Json options_json(const OptionSpecs& specs) {
  Json options = Json::array();
  for (const OptionSpec& spec : specs)
    options.push_back({{"name", spec.name},
                       {"type", type_name(spec.default_value)},
                       {"default", value_json(spec.default_value)},
                       {"min", bound_json(spec.min)},
                       {"max", bound_json(spec.max)},
                       {"choices", spec.choices},
                       {"doc", option_doc(spec)}});
  return options;
}

std::string option_range(const Json& option) {
  const Json &low = option.at("min"), &high = option.at("max");
  if (!option.at("choices").empty())
    return fmt::format("one of {}", fmt::join(option.at("choices").get<std::vector<std::string>>(), ", "));
  if (!low.is_null() && !high.is_null()) return fmt::format("between {} and {}", low.get<double>(), high.get<double>());
  if (!low.is_null()) return fmt::format("at least {}", low.get<double>());
  return high.is_null() ? "" : fmt::format("at most {}", high.get<double>());
}

}  // namespace moelab
