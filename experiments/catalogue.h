// What moelab knows, as data: one JSON object per plugin or metric. `list`, `describe`, the generated tables and the shell
// completion read nothing else.
#pragma once

#include "core/expert.h"
#include "core/params.h"
#include "experiments/json.h"

#include <string>
#include <vector>

namespace moelab {

struct Kind {
  std::string name;  // "routers"
  // {name, title, citation, facts, options}, one object per entry, sorted by name.
  Json (*list)();
  // What `describe` says beyond that: heading -> a text, a list of texts, or a list of flat objects.
  Json (*details)(const std::string& name);
};

const std::vector<Kind>& catalogue();
const Kind& find_kind(const std::string& name);  // Error(kUsage) with the nearest

// The entry of `list` with this name, followed by the details.
Json describe(const Kind& kind, const std::string& name);

Json options_json(const OptionSpecs& specs);
std::string option_range(const Json& option);  // "at least 1", "one of a, b", ""

// The facts of a router that are worth a sentence.
std::vector<std::string> router_facts_in_words(const Json& facts);

// An instance of an expert with default options is needed to say how large it is.
ExpertSpec default_expert_spec(const ExpertEntry& entry, int64_t width, int64_t experts);

// The details of each kind (details.cpp).
Json router_details(const std::string& name);
Json expert_details(const std::string& name);
Json loss_details(const std::string& name);
Json objective_details(const std::string& name);
Json dataset_details(const std::string& name);
Json model_details(const std::string& name);
Json metric_details(const std::string& name);

}  // namespace moelab
