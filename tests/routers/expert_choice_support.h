// What the tests of expert choice share: routers whose logits are their input, and the choice by plain comparison.
#pragma once

#include "tests/routers/oracle.h"

#include <set>

namespace moelab {

using Pairs = std::set<std::pair<int64_t, int64_t>>;  // (row, expert)
using ChoiceOptions = std::map<std::string, OptionValue>;

inline CapacityPolicy each_takes(int64_t rows) { return {.mode = CapacityPolicy::Mode::kAbsolute, .value = rows}; }

inline CapacityPolicy share(double factor, CapacityPolicy::Round round = CapacityPolicy::Round::kCeil) {
  return {.mode = CapacityPolicy::Mode::kFactor, .factor = factor, .round = round};
}

// Weight = identity, so that x is the logits.
inline std::unique_ptr<Router> choosing(int64_t experts, CapacityPolicy capacity, ChoiceOptions options = {},
                                        NoiseSpec noise = {}) {
  auto router = build_router({.name = "expert_choice",
                              .width = experts,
                              .experts = experts,
                              .options = std::move(options),
                              .noise = noise,
                              .capacity = capacity});
  set_tensor(*router, "weight", at::eye(experts, at::kDouble));
  return router;
}

inline Pairs pairs_of(const RouteOutput& out) {
  Pairs pairs;
  for (int64_t n = 0; n < sparse(out).token_N.numel(); ++n)
    pairs.insert({sparse(out).token_N[n].item<int64_t>(), sparse(out).expert_N[n].item<int64_t>()});
  return pairs;
}

inline Rows rows_of(const Tensor& values_TE) {
  Rows rows;
  for (int64_t t = 0; t < values_TE.size(0); ++t) {
    const Tensor row = values_TE[t].contiguous();
    rows.emplace_back(row.const_data_ptr<double>(), row.const_data_ptr<double>() + row.numel());
  }
  return rows;
}

inline Rows softmax_rows(const Tensor& z_TE) {
  Rows s = rows_of(z_TE);
  for (auto& row : s) row = slow_softmax(row);
  return s;
}

// Each expert's `places` rows of `group` by plain comparison: fewer than `places` rows come before it.
inline Pairs slow_choice(const Rows& s, const std::vector<int64_t>& group, int64_t places) {
  Pairs pairs;
  for (size_t e = 0; e < s[0].size(); ++e)
    for (const int64_t t : group) {
      int64_t before = 0;
      for (const int64_t o : group) before += s[o][e] > s[t][e] || (s[o][e] == s[t][e] && o < t);
      if (before < places) pairs.insert({t, static_cast<int64_t>(e)});
    }
  return pairs;
}

inline std::vector<int64_t> per_row(const RouteOutput& out, int64_t rows) {
  std::vector<int64_t> count(rows, 0);
  for (const auto& [row, expert] : pairs_of(out)) ++count[row];
  return count;
}

}  // namespace moelab
