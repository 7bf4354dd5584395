#include "experiments/verify_kit.h"

#include "core/error.h"
#include "experiments/verify_case.h"

#include <fmt/format.h>

#include <algorithm>

namespace moelab {

std::vector<OptionValue> other_values(const OptionSpec& spec) {
  if (const bool* flag = std::get_if<bool>(&spec.default_value)) return {!*flag};
  std::vector<OptionValue> others;
  for (const std::string& choice : spec.choices)
    if (OptionValue(choice) != spec.default_value) others.emplace_back(choice);
  return others;
}

namespace {

std::vector<Variant> noise_variants(const RouterEntry& entry) {
  if (!entry.facts.has_scores) return {};
  return {{.label = "noise = none", .noise = {.kind = NoiseSpec::Kind::kNone}},
          {.label = "noise = normal", .noise = {.kind = NoiseSpec::Kind::kNormal, .std = 0.5, .std_given = true}},
          {.label = "noise = jitter", .noise = {.kind = NoiseSpec::Kind::kJitter, .epsilon = 0.1, .epsilon_given = true}}};
}

std::string label_of(const std::map<std::string, OptionValue>& settings) {
  std::string label;
  for (const auto& [name, value] : settings) label += fmt::format("{}{} = {}", label.empty() ? "" : ", ", name, to_text(value));
  return label;
}

// Some settings are for batches of one shape alone. Other failures are for the properties to find.
bool refuses_any_batch(const RouterEntry& entry, const Variant& variant) {
  try {
    RouteState state;
    kit_router(entry, variant, {})->route(kit_input({}), state);
  } catch (const Error& error) {
    return error.code() == ExitCode::kUsage;
  } catch (const std::exception&) {
  }
  return false;
}

bool hands_on(const Router& router) {
  try {
    RouteState state;
    return router.route(kit_input({}), state).carry.defined();
  } catch (const std::exception&) {
    return false;  // for the properties to find
  }
}

Subject subject_of(const RouterEntry& entry, const Variant& variant, const VerifySettings& settings) {
  const std::shared_ptr<Router> router = kit_router(entry, variant, {});
  return {entry, variant, router->facts(), hands_on(*router), settings.cases, settings.seed};
}

// "" = held.
std::string failure_of(const Property& property, const Subject& subject) {
  try {
    property.check(subject);
    return "";
  } catch (const std::exception& error) {
    const std::string text = error.what(), line = text.substr(0, text.find('\n'));
    return subject.variant.label.empty() ? line : fmt::format("with {}: {}", subject.variant.label, line);
  }
}

Finding judge(const Property& property, const std::vector<Subject>& subjects) {
  Finding finding{"router", subjects.front().entry.name, property.name, Verdict::kNotApplicable, ""};
  for (const Subject& subject : subjects) {
    const std::string outside = property.not_applicable(subject);
    if (!outside.empty() && finding.reason.empty()) finding.reason = outside;
    if (!outside.empty()) continue;
    finding.verdict = Verdict::kPass;
    const std::string failure = failure_of(property, subject);
    if (!failure.empty()) return {finding.kind, finding.name, finding.property, Verdict::kFail, failure};
    if (property.once) break;
  }
  if (finding.verdict == Verdict::kPass) finding.reason.clear();
  return finding;
}

bool wanted(const Property& property, const VerifySettings& settings) {
  return settings.only.empty() || std::count(settings.only.begin(), settings.only.end(), property.name) > 0;
}

std::vector<Finding> cannot_be_built(const RouterEntry& entry, const VerifySettings& settings, const std::string& why) {
  std::vector<Finding> findings;
  for (const Property& property : router_properties())
    if (wanted(property, settings))
      findings.push_back({"router", entry.name, property.name, Verdict::kFail, "it cannot be built: " + why});
  return findings;
}

}  // namespace

const char* to_string(Verdict verdict) {
  switch (verdict) {
    case Verdict::kPass: return "pass";
    case Verdict::kFail: return "fail";
    case Verdict::kNotApplicable: return "n/a";
  }
  return "?";
}

std::vector<Property> router_properties() {
  std::vector<Property> all;
  for (const auto& table : {plan_properties(), fact_properties(), capacity_properties(), value_properties(),
                            split_properties(), state_properties(), stage_properties(), order_properties(),
                            symmetry_properties(), loss_properties()})
    all.insert(all.end(), table.begin(), table.end());
  return all;
}

std::vector<Variant> variants_of(const RouterEntry& entry) {
  std::vector<Variant> variants{{}};
  for (const OptionSpec& spec : entry.options)
    for (const OptionValue& value : other_values(spec))
      variants.push_back({.label = fmt::format("{} = {}", spec.name, to_text(value)), .options = {{spec.name, value}}});
  for (const auto& settings : entry.verified_with) variants.push_back({.label = label_of(settings), .options = settings});
  for (Variant& noisy : noise_variants(entry)) variants.push_back(std::move(noisy));
  variants.push_back({.label = "max_experts above experts", .room = 2});
  std::erase_if(variants, [&](const Variant& variant) {
    return !variant.label.empty() && (!builds(entry, variant, {}) || refuses_any_batch(entry, variant));
  });
  return variants;
}

std::vector<Finding> verify_router(const RouterEntry& entry, const VerifySettings& settings) try {
  std::vector<Variant> variants = settings.defaults_only ? std::vector<Variant>{{}} : variants_of(entry);
  std::vector<Subject> subjects;
  for (const Variant& variant : variants) subjects.push_back(subject_of(entry, variant, settings));
  std::vector<Finding> findings;
  for (const Property& property : router_properties())
    if (wanted(property, settings)) findings.push_back(judge(property, subjects));
  return findings;
} catch (const std::exception& error) {
  return cannot_be_built(entry, settings, error.what());
}

}  // namespace moelab
