// The worked numbers that spec/routers.md 2 shares between routers, and the plain loops that tests compare with.
#pragma once

#include "tests/support/route_case.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace moelab {

using Rows = std::vector<std::vector<double>>;

// Logits of 4 rows and 3 experts, spec/routers.md 2.1. With weight = identity the input is the logits.
inline const Rows kOracleLogits{{2, 1, 0}, {1.5, 1.4, -1}, {.2, .1, 0}, {3, -1, 2}};

// Oracle numbers are printed to four digits.
inline bool printed_digits_agree(const Tensor& found, const Tensor& printed) {
  return found.sizes() == printed.sizes() && (found - printed).abs().max().item<double>() < 5.1e-5;
}

inline std::unique_ptr<Router> oracle_router(RouterCase wanted) {
  wanted.width = wanted.experts = 3;
  std::unique_ptr<Router> router = build_router(wanted);
  set_tensor(*router, "weight", at::eye(3, at::kDouble));
  return router;
}

inline OptionValue word(const char* text) { return std::string(text); }

inline Tensor longs_of(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

inline std::vector<double> slow_softmax(const std::vector<double>& z) {
  double sum = 0;
  std::vector<double> p;
  for (const double value : z) sum += std::exp(value);
  for (const double value : z) p.push_back(std::exp(value) / sum);
  return p;
}

// Position of the rank-th largest, ties to the lowest.
inline int64_t slow_argmax(const std::vector<double>& z, int64_t rank = 0) {
  for (size_t e = 0; e < z.size(); ++e) {
    int64_t before = 0;
    for (size_t other = 0; other < z.size(); ++other) before += z[other] > z[e] || (z[other] == z[e] && other < e);
    if (before == rank) return static_cast<int64_t>(e);
  }
  return -1;
}

inline Rows slow_linear(const Tensor& x_TD, const Tensor& weight_ED) {
  Rows logits(x_TD.size(0), std::vector<double>(weight_ED.size(0), 0));
  for (int64_t t = 0; t < x_TD.size(0); ++t)
    for (int64_t e = 0; e < weight_ED.size(0); ++e)
      for (int64_t d = 0; d < x_TD.size(1); ++d) logits[t][e] += x_TD[t][d].item<double>() * weight_ED[e][d].item<double>();
  return logits;
}

// E · Σ_e f_e P_e, f over the first `counted` of the router's choices.
inline double slow_balance(const RouteOutput& out, int64_t counted, const Rows& probs) {
  const Tensor& choice_TK = out.assignment.choice_TK;
  const auto experts = static_cast<int64_t>(probs[0].size()), rows = choice_TK.size(0);
  double value = 0;
  for (int64_t e = 0; e < experts; ++e) {
    double f = 0, p = 0;
    for (int64_t t = 0; t < rows; ++t) {
      p += probs[t][e] / static_cast<double>(rows);
      for (int64_t rank = 0; rank < counted; ++rank) f += (choice_TK[t][rank].item<int64_t>() == e) / static_cast<double>(rows);
    }
    value += f * p;
  }
  return value * static_cast<double>(experts);
}

// A fixed mixture of the gates and of the probabilities that losses read: what a gradient check differentiates.
inline Tensor routing_objective(const Router& router, const RouteCase& input) {
  const RouteOutput out = route(router, input);
  const Tensor& gate_N = sparse(out).gate_N;
  Tensor value = gate_N.mul(random_tensor(71, gate_N.sizes())).sum();
  if (out.scores.loss_TE.defined()) value = value + out.scores.loss_TE.mul(random_tensor(72, out.scores.loss_TE.sizes())).sum();
  return value;
}

// Largest gradient error over x and every trainable parameter, with the selection frozen at that of the starting point.
inline double frozen_gradient_error(const Router& router, RouteCase input) {
  input.in.x_TD = input.in.x_TD.clone().requires_grad_(true);
  const Assignment selection = route(router, input).assignment;
  input.force(selection);
  const auto value = [&] { return routing_objective(router, input); };
  double worst = gradient_error(value, input.in.x_TD);
  for (const NamedTensor& parameter : router.trainable()) worst = std::max(worst, gradient_error(value, parameter.tensor));
  return worst;
}

}  // namespace moelab
