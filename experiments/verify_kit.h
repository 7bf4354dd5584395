// The conformance kit: what every router has to hold, whoever wrote it. A property is decided by facts, never by a name. To add
// one, write its check and one row of the table at the end of a verify_*.cpp.
#pragma once

#include "core/router.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moelab {

// One way to set a router up: its defaults, or one choice changed.
struct Variant {
  std::string label;  // "" for the defaults, else "softmax = after"
  std::map<std::string, OptionValue> options = {};
  NoiseSpec noise = {};
  int64_t room = 0;  // experts that are not there yet: max_experts - experts
};

// What a check looks at.
struct Subject {
  const RouterEntry& entry;
  Variant variant;
  RouterFacts facts;   // of an instance with this variant
  bool hands_on = false;  // it hands something on to the next layer's router
  int64_t cases = 20;  // random cases of the executors' property
  int64_t seed = 0;
};

struct Property {
  std::string name;
  std::string doc;
  std::string (*not_applicable)(const Subject&);  // the reason why it says nothing about this router, "" = it does
  void (*check)(const Subject&);                  // throws what is wrong, with shapes and seed
  bool once = false;                              // it varies the options itself, so the defaults are enough
};

// Every property, in the order of the report.
std::vector<Property> router_properties();

// The tables of each file.
std::vector<Property> plan_properties();
std::vector<Property> fact_properties();
std::vector<Property> capacity_properties();
std::vector<Property> value_properties();
std::vector<Property> split_properties();
std::vector<Property> state_properties();
std::vector<Property> stage_properties();
std::vector<Property> order_properties();
std::vector<Property> symmetry_properties();
std::vector<Property> loss_properties();

enum class Verdict { kPass, kFail, kNotApplicable };
const char* to_string(Verdict verdict);  // as in the JSON: pass, fail, n/a

struct Finding {
  std::string kind;
  std::string name;
  std::string property;
  Verdict verdict = Verdict::kPass;
  std::string reason;  // of fail and n/a
};

struct VerifySettings {
  int64_t cases = 20;
  int64_t seed = 0;
  std::vector<std::string> only = {};  // names of properties; empty = all
  bool defaults_only = false;          // no other variants
};

// Every property over every variant. An exception is a failure of the property that met it, never of the kit.
std::vector<Finding> verify_router(const RouterEntry& entry, const VerifySettings& settings);

// What an option may be beside its default, where that is one of few: the other truth, the other words.
std::vector<OptionValue> other_values(const OptionSpec& spec);

// The defaults, then each other choice of each option alone, then the entry's own settings, then each kind of noise, then room
// for more experts. What the router refuses as a usage error is left out.
std::vector<Variant> variants_of(const RouterEntry& entry);

}  // namespace moelab
