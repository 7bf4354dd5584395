#include "experiments/expert_compat.h"

#include "core/error.h"
#include "core/layer_tables.h"
#include "experiments/text_table.h"
#include "experiments/verify_case.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

namespace moelab {
namespace {

// What a router may ask of experts, by its facts.
struct Wish {
  const char* label;
  bool (*holds)(const RouterFacts&);
  std::map<std::string, OptionValue> options = {};  // where the router declares them
  bool drops = false;
};

bool as_in_training(const RouterFacts& f) { return f.in_evaluation == InEvaluation::kAsInTraining; }

bool plainly_sparse(const RouterFacts& f) { return f.plan == PlanForm::kSparse && !f.variable_k && as_in_training(f); }

const std::map<std::string, OptionValue> kAfterFirstStep{
    {"window_start", int64_t{0}}, {"window_update", int64_t{1}}, {"window_period", int64_t{2}}};

const Wish kWishes[] = {
    {"k experts per row", plainly_sparse},
    {"a capacity that drops", plainly_sparse, {}, /*drops=*/true},
    {"a varying number",
     [](const RouterFacts& f) { return f.plan == PlanForm::kSparse && f.variable_k && !f.capacity_is_choice; }},
    {"experts choose rows", [](const RouterFacts& f) { return f.capacity_is_choice; }},
    {"soft plan", [](const RouterFacts& f) { return f.plan == PlanForm::kSoft; }},
    {"merge plan", [](const RouterFacts& f) { return f.plan == PlanForm::kMerge; }},
    {"experts that come and go", [](const RouterFacts& f) { return f.changes_experts; }, kAfterFirstStep},
    {"several passes", [](const RouterFacts& f) { return f.passes > 1; }},
    {"all experts in evaluation", [](const RouterFacts& f) { return f.in_evaluation == InEvaluation::kAllExperts; }},
    {"averaged experts in evaluation", [](const RouterFacts& f) { return f.in_evaluation == InEvaluation::kMergedExperts; }},
};

// The fewer other demands a router has, the plainer it is.
int64_t demands(const RouterFacts& f, const Variant& variant) {
  const bool flags[] = {!f.learned,        f.noisy_in_training,  f.random_in_eval, f.stateful,
                        f.needs_token_ids, f.needs_segments,     f.needs_domain,   f.needs_global_batch,
                        f.looks_ahead,     !f.batch_independent, !f.decodes,       !f.has_scores};
  return std::count(std::begin(flags), std::end(flags), true) + static_cast<int64_t>(variant.options.size());
}

std::vector<Variant> optioned_variants(const RouterEntry& entry) {
  std::vector<Variant> variants{{}};
  for (const OptionSpec& spec : entry.options)
    for (const OptionValue& value : other_values(spec)) variants.push_back({.label = spec.name, .options = {{spec.name, value}}});
  return variants;
}

std::optional<CompatFact> plainest_router(const Wish& wish) {
  std::optional<CompatFact> best;
  int64_t fewest = 0;
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all())
    for (const Variant& variant : optioned_variants(entry)) {
      if (!builds(entry, variant, {})) continue;
      const RouterFacts facts = kit_router(entry, variant, {})->facts();
      const int64_t own = demands(facts, variant);
      if (!wish.holds(facts) || (best && own >= fewest)) continue;
      best = CompatFact{wish.label,
                        entry.name,
                        variant.options,
                        facts.plan_in(Mode::kTrain),
                        facts.plan_in(Mode::kEval),
                        facts.changes_experts,
                        wish.drops,
                        facts.passes > 1};
      for (const auto& [name, value] : wish.options)
        if (find_option(entry.options, name)) best->options[name] = value;
      fewest = own;
    }
  return best;
}

std::vector<ExpertPart> parts_of_row(const CompatExperts& experts) {
  std::vector<ExpertPart> parts;
  for (const auto& [kind, count] : experts.groups) {
    const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(kind);
    Options options(entry.options);
    for (const OptionSpec& spec : entry.options)
      if (const auto own = experts.options.find(spec.name); parts.empty() && own != experts.options.end())
        options.set(spec, own->second);
    parts.push_back({kind, count, std::move(options)});
  }
  return parts;
}

std::unique_ptr<ExpertBank> bank_of_row(const CompatExperts& experts) {
  ExpertSpec spec;
  spec.width = kCompatWidth;
  spec.experts = kCompatExperts;
  for (int64_t map = 0; map < experts.maps; ++map)
    spec.linears.push_back({fmt::format("map{}", map), kCompatWidth, kCompatWidth});
  return make_mixed_experts(parts_of_row(experts), spec);
}

ExpertPlace place_of_row(const CompatExperts& experts) {
  return Registry<ExpertEntry>::instance().find(experts.groups.front().first).place;
}

// Each style of attention heads is a module of its own.
void append_heads(std::vector<CompatExperts>& rows, const ExpertEntry& entry) {
  const auto is_style = [](const OptionSpec& spec) { return spec.name == "style"; };
  const auto style = std::find_if(entry.options.begin(), entry.options.end(), is_style);
  if (style == entry.options.end()) rows.push_back({entry.name, {{entry.name, kCompatExperts}}, {}, "attention"});
  else
    for (const std::string& word : style->choices)
      rows.push_back({fmt::format("{}, {}", entry.name, word), {{entry.name, kCompatExperts}}, {{"style", word}}, "attention"});
}

void append_adapters(std::vector<CompatExperts>& rows, const ExpertEntry& entry) {
  const auto row = [&](const char* what, std::map<std::string, OptionValue> options, int64_t maps) {
    rows.push_back(
        {fmt::format("{} on {}", entry.name, what), {{entry.name, kCompatExperts}}, std::move(options), "adapters", maps});
  };
  row("feed-forward layers", {}, 0);
  row("linear maps", {{"targets", std::string("dense")}}, 1);
  row("linear maps of one decision", {{"targets", std::string("dense")}, {"decision", std::string("layer")}}, 2);
}

std::string router_text(const CompatFact& fact) {
  std::string text = fact.router;
  for (const auto& [name, value] : fact.options) text += fmt::format(", {} = {}", name, to_text(value));
  return text + (fact.passes ? ", objective paired_consistency" : "") + (fact.drops ? ", capacity 0.5" : "") +
         (fact.grows ? ", two places free" : "");
}

}  // namespace

std::vector<CompatExperts> compat_experts() {
  std::vector<CompatExperts> rows;
  for (const ExpertEntry& entry : Registry<ExpertEntry>::instance().all())
    if (entry.place == ExpertPlace::kFeedForward) rows.push_back({entry.name, {{entry.name, kCompatExperts}}});
    else if (entry.place == ExpertPlace::kAttention) append_heads(rows, entry);
    else append_adapters(rows, entry);
  rows.push_back({"ffn of unequal widths", {{"ffn", kCompatExperts}}, {{"widths", std::vector<int64_t>{8, 16, 16, 32}}}});
  rows.push_back({"ffn + zero + identity + constant", {{"ffn", 1}, {"zero", 1}, {"identity", 1}, {"constant", 1}}});
  return rows;
}

std::vector<CompatFact> compat_facts() {
  std::vector<CompatFact> facts;
  for (const Wish& wish : kWishes)
    if (const auto fact = plainest_router(wish)) facts.push_back(*fact);
  return facts;
}

std::string compat_refusal(const CompatExperts& experts, const CompatFact& fact) {
  try {
    const auto bank = bank_of_row(experts);
    const std::string reason = refused_plan(place_of_row(experts), *bank, fact.train);
    return reason.empty() ? refused_plan(place_of_row(experts), *bank, fact.eval) : reason;
  } catch (const Error& error) {
    return error.what();  // not with their default options
  }
}

std::string compat_tables(const CompatExperts& experts, const CompatFact& fact) {
  const std::string& table = experts.table;
  std::string text = fmt::format("[{}]\nexperts = {}\n", table, kCompatExperts - (fact.grows ? 2 : 0));
  if (fact.grows) text += fmt::format("max_experts = {}\n", kCompatExperts);
  if (fact.drops) text += fmt::format("[{}.capacity]\nmode = \"factor\"\nfactor = 0.5\n", table);
  text += fmt::format("[{}.router]\nname = \"{}\"\n", table, fact.router);
  for (const auto& [name, value] : fact.options) text += fmt::format("{} = {}\n", name, to_text(value));
  for (size_t g = 0; g < experts.groups.size(); ++g) {
    const auto& [kind, count] = experts.groups[g];
    text += table == "moe" ? fmt::format("[[moe.expert.group]]\nname = \"{}\"\ncount = {}\n", kind, count)
                           : fmt::format("[{}.expert]\nname = \"{}\"\n", table, kind);
    if (g > 0) continue;
    for (const auto& [name, value] : experts.options) text += fmt::format("{} = {}\n", name, to_text(value));
  }
  if (fact.passes) text += "[objective]\nname = \"paired_consistency\"\n";
  return text;
}

std::string compat_markdown() {
  const std::vector<CompatFact> facts = compat_facts();
  TextRows rows{{"experts"}};
  for (const CompatFact& fact : facts) rows.front().push_back(fact.label);
  std::vector<std::string> reasons;
  for (const CompatExperts& experts : compat_experts()) {
    rows.push_back({experts.label});
    for (const CompatFact& fact : facts) {
      const std::string reason = compat_refusal(experts, fact);
      const auto known = std::find(reasons.begin(), reasons.end(), reason);
      if (!reason.empty()) rows.back().push_back(fmt::format("no ({})", known - reasons.begin() + 1));
      else rows.back().emplace_back("yes");
      if (!reason.empty() && known == reasons.end()) reasons.push_back(reason);
    }
  }
  std::string text = markdown_table(rows) + "\nRouters that stand for the columns:";
  for (const CompatFact& fact : facts)
    text += fmt::format("{} {} (`{}`)", &fact == &facts.front() ? "" : ";", fact.label, router_text(fact));
  text += ".\n";
  for (size_t i = 0; i < reasons.size(); ++i)
    text += fmt::format("{}({}) {}\n", i == 0 ? "\nRefused, in these words:\n\n" : "\n", i + 1, reasons[i]);
  return text;
}

}  // namespace moelab
