// The conformance kit of experts: what every bank has to hold, whoever wrote it. As for routers, a property is decided by facts,
// never by a name; to add one, write its check and one row of the table at the end of a verify_expert_*.cpp.
#pragma once

#include "core/execute.h"
#include "experiments/verify_kit.h"

#include <random>

namespace moelab {

// What a check looks at: an entry with some of its options set.
struct ExpertSubject {
  const ExpertEntry& entry;
  std::string label;  // "" for the defaults, else "activation = gelu"
  std::map<std::string, OptionValue> options = {};
  int64_t cases = 20;
  int64_t seed = 0;
};

struct ExpertProperty {
  std::string name;
  std::string doc;
  std::string (*not_applicable)(const ExpertSubject&);  // why it says nothing about these experts, "" = it does
  void (*check)(const ExpertSubject&);                  // throws what is wrong, with sizes and seed
};

std::vector<ExpertProperty> expert_properties();
std::vector<ExpertProperty> expert_value_properties();
std::vector<ExpertProperty> expert_state_properties();

// Every property over the defaults and every other setting. An exception is a failure of the property that met it.
std::vector<Finding> verify_expert(const ExpertEntry& entry, const VerifySettings& settings);

// Sizes of one case.
struct ExpertCase {
  int64_t rows = 9;
  int64_t experts = 4;
  int64_t k = 2;
  int64_t width = 8;
  at::ScalarType dtype = at::kDouble;
  int64_t seed = 0;
  std::string text() const;  // "T=9 E=4 k=2 D=8 fp64 seed 0"
};

// Parameters are the initial ones plus noise, so that none is zero.
std::unique_ptr<ExpertBank> kit_bank(const ExpertSubject& subject, const ExpertCase& at);
std::unique_ptr<ExpertBank> initial_bank(const ExpertSubject& subject, const ExpertCase& at, RandomKey init, int64_t first = 0);
// The defaults have to build at any number of experts; other settings may be for some alone.
bool expert_has_size(const ExpertSubject& subject, const ExpertCase& at);

Tensor kit_rows(const ExpertCase& at, const std::string& what, std::vector<int64_t> shape);  // normal draws

// A plan with the leaves that its gradients reach.
struct KitPlan {
  Plan plan;
  std::vector<NamedTensor> leaves;
};
enum class Load { kRandom, kOneTakesAll, kSomeEmpty };
KitPlan sparse_plan(const ExpertCase& at, Load load);
KitPlan soft_plan(const ExpertCase& at, const Tensor& x_TD);
KitPlan merge_plan(const ExpertCase& at);

void must(bool holds, const std::string& what, const ExpertCase& at);
void must_agree(const Tensor& a, const Tensor& b, double tolerance, const std::string& what, const ExpertCase& at);

}  // namespace moelab
