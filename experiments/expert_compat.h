// Which experts work with which routers: every kind of expert wherever in a block it stands, and banks of several kinds, against
// the facts of routers that ask something of experts. The table of experts/README.md, and what a test trains cell by cell.
#pragma once

#include "core/expert.h"
#include "core/router.h"

#include <string>
#include <vector>

namespace moelab {

struct CompatExperts {
  std::string label;                                    // "ffn", "ffn of unequal widths"
  std::vector<std::pair<std::string, int64_t>> groups;  // kinds and how many of each
  std::map<std::string, OptionValue> options = {};      // of the first group
  std::string table = "moe";                            // the one that describes them
  int64_t maps = 0;                                     // linear maps of one decision; 0 = a whole layer
};

struct CompatFact {
  std::string label;                                // "merge plan"
  std::string router;                               // one that has it, the plainest
  std::map<std::string, OptionValue> options = {};  // of that router
  PlanForm train = PlanForm::kSparse, eval = PlanForm::kSparse;
  bool grows = false;  // there is room for two experts more than it starts with
  bool drops = false;  // a capacity refuses half of the pairs
  bool passes = false;  // several a step, tied by the objective
};

constexpr int64_t kCompatWidth = 32, kCompatExperts = 4;

std::vector<CompatExperts> compat_experts();
std::vector<CompatFact> compat_facts();

// Why these experts are refused with such a router, in one line; "" = they work.
std::string compat_refusal(const CompatExperts& experts, const CompatFact& fact);

// The tables of that cell, to be laid on an experiment that has none of its kind: experiments/base/vectors_tiny.toml, or
// lm_tiny.toml for attention heads.
std::string compat_tables(const CompatExperts& experts, const CompatFact& fact);

// The table, with the reasons below it.
std::string compat_markdown();

}  // namespace moelab
