#include "experiments/expert_compat.h"

#include "core/error.h"
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
};

bool as_in_training(const RouterFacts& f) { return f.in_evaluation == InEvaluation::kAsInTraining; }

const Wish kWishes[] = {
    {"k experts per row", [](const RouterFacts& f) { return f.plan == PlanForm::kSparse && !f.variable_k && as_in_training(f); }},
    {"a varying number",
     [](const RouterFacts& f) { return f.plan == PlanForm::kSparse && f.variable_k && !f.capacity_is_choice; }},
    {"experts choose rows", [](const RouterFacts& f) { return f.capacity_is_choice; }},
    {"soft plan", [](const RouterFacts& f) { return f.plan == PlanForm::kSoft; }},
    {"merge plan", [](const RouterFacts& f) { return f.plan == PlanForm::kMerge; }},
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
      best = CompatFact{wish.label, entry.name, variant.options, facts.plan_in(Mode::kTrain), facts.plan_in(Mode::kEval)};
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
      if (spec.name == "widths" && parts.empty()) options.set(spec, experts.widths);
    parts.push_back({kind, count, std::move(options)});
  }
  return parts;
}

std::string router_text(const CompatFact& fact) {
  std::string text = fact.router;
  for (const auto& [name, value] : fact.options) text += fmt::format(", {} = {}", name, to_text(value));
  return text;
}

}  // namespace

std::vector<CompatExperts> compat_experts() {
  std::vector<CompatExperts> rows;
  for (const ExpertEntry& entry : Registry<ExpertEntry>::instance().all())
    if (entry.place == ExpertPlace::kFeedForward) rows.push_back({entry.name, {{entry.name, kCompatExperts}}});
  rows.push_back({"ffn of unequal widths", {{"ffn", kCompatExperts}}, {8, 16, 16, 32}});
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
  ExpertSpec spec;
  spec.width = kCompatWidth;
  spec.experts = kCompatExperts;
  try {
    const auto bank = make_mixed_experts(parts_of_row(experts), spec);
    const std::string reason = bank->refuses(fact.train);
    return reason.empty() ? bank->refuses(fact.eval) : reason;
  } catch (const Error& error) {
    return error.what();  // not with their default options
  }
}

std::string compat_tables(const CompatExperts& experts, const CompatFact& fact) {
  std::string text = fmt::format("[moe]\nexperts = {}\n[moe.router]\nname = \"{}\"\n", kCompatExperts, fact.router);
  for (const auto& [name, value] : fact.options) text += fmt::format("{} = {}\n", name, to_text(value));
  for (const auto& [kind, count] : experts.groups) {
    text += fmt::format("[[moe.expert.group]]\nname = \"{}\"\ncount = {}\n", kind, count);
    if (!experts.widths.empty()) text += fmt::format("widths = {}\n", to_text(experts.widths));
  }
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
