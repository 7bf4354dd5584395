// Banks of every kind of experts for sweeps: those registered, each in all its settings; beside them unequal widths and banks
// that mix kinds. And a plan of every form for them.
#pragma once

#include "execute_support.h"
#include "tests/experts/experts_support.h"

#include <functional>
#include <map>

namespace moelab::testing {

constexpr int64_t kRowWidth = 8;  // rows of whole 16 bytes, which the library's grouped product asks for

// Every choice and flag of a kind by itself, and the settings that it names for its checks.
inline std::vector<GivenOptions> settings_of(const ExpertEntry& entry) {
  std::vector<GivenOptions> all{{}};
  for (const OptionSpec& spec : entry.options) {
    if (const bool* flag = std::get_if<bool>(&spec.default_value)) all.push_back({{spec.name, !*flag}});
    for (const std::string& choice : spec.choices) all.push_back({{spec.name, choice}});
  }
  for (const auto& given : entry.verified_with)
    if (!given.contains("widths")) all.push_back(given);  // those stand beside the kinds
  return all;
}

// Widths are drawn where the setting leaves them open; a linear base's is that of the output.
inline PartCase part_of_kind(std::mt19937_64& draw, const ExpertEntry& entry, int64_t experts) {
  const std::vector<GivenOptions> all = settings_of(entry);
  PartCase part{entry.name, experts, all[static_cast<size_t>(between(draw, 0, static_cast<int64_t>(all.size()) - 1))]};
  if (Options(entry.options).declared("width") && !part.options.contains("width"))
    part.options["width"] = 4 * between(draw, 1, 3);
  return part;
}

inline std::vector<const ExpertEntry*> kinds_on_rows(bool as_a_layer) {
  std::vector<const ExpertEntry*> kinds;
  for (const ExpertEntry& entry : Registry<ExpertEntry>::instance().all())
    if (entry.place == ExpertPlace::kFeedForward || (!as_a_layer && entry.place == ExpertPlace::kLinears))
      kinds.push_back(&entry);
  return kinds;
}

inline std::vector<PartCase> unequal_parts(std::mt19937_64& draw, int64_t experts) {
  GivenOptions given = part_of_kind(draw, Registry<ExpertEntry>::instance().find("ffn"), experts).options;
  std::vector<int64_t> widths;
  for (int64_t e = 0; e < experts; ++e) widths.push_back(between(draw, 1, 9));
  given["widths"] = widths;
  return {{"ffn", experts, given}};
}

inline std::vector<PartCase> mixed_parts(std::mt19937_64& draw, int64_t experts) {
  const std::vector<const ExpertEntry*> kinds = kinds_on_rows(/*as_a_layer=*/true);
  std::vector<PartCase> parts;
  for (int64_t e = 0; e < experts; ++e)
    parts.push_back(part_of_kind(draw, *kinds[static_cast<size_t>(between(draw, 0, static_cast<int64_t>(kinds.size()) - 1))], 1));
  return parts;
}

using DrawParts = std::function<std::vector<PartCase>(std::mt19937_64&, int64_t experts)>;

inline std::map<std::string, DrawParts> all_banks() {
  std::map<std::string, DrawParts> banks{{"unequal widths", unequal_parts}, {"mixed kinds", mixed_parts}};
  for (const ExpertEntry* entry : kinds_on_rows(/*as_a_layer=*/false))
    banks[entry->name] = [entry](std::mt19937_64& draw, int64_t experts) {
      return std::vector<PartCase>{part_of_kind(draw, *entry, experts)};
    };
  return banks;
}

// No parameter is at its start: biases and the second factors of adapters begin at zero.
inline void shake(std::mt19937_64& draw, const ExpertBank& bank) {
  for (const NamedTensor& entry : bank.parameters())
    entry.tensor.detach().add_(random_leaf(draw, entry.tensor.sizes().vec(), entry.tensor.scalar_type(), false), 0.3);
}

inline PlanCase case_of(std::mt19937_64& draw, PlanForm form, int kind, int64_t experts, at::ScalarType dtype) {
  if (form == PlanForm::kSoft) return soft_case(draw, kind, experts, kRowWidth, dtype);
  if (form == PlanForm::kMerge) return merge_case(draw, kind, experts, kRowWidth, dtype);
  return sparse_case(draw, kind, experts, kRowWidth, dtype);
}

}  // namespace moelab::testing
