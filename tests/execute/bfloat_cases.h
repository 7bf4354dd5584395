// Plans and feed-forward banks in bfloat16 beside the same numbers in double, and how much of its bound a result uses up.
#pragma once

#include "execute_support.h"
#include "tests/support/bfloat_bounds.h"

#include <ATen/ops/sub.h>
#include <catch2/catch_test_macros.hpp>

namespace moelab::testing {

constexpr int64_t kWidth = 16, kHidden = 32, kExperts = 4;

// One plan in two precisions: leaves and rows of `high` are those of `low`, exactly.
struct TwoCases {
  PlanCase low, high;
};

// Leaves are what the plan holds: the gates of its pairs, alpha.
inline TwoCases two_cases(std::mt19937_64& draw, PlanForm form, int i) {
  PlanCase low = form == PlanForm::kSparse ? sparse_case(draw, i, kExperts, kWidth, at::kFloat)
                 : form == PlanForm::kSoft ? soft_case(draw, i, kExperts, kWidth, at::kFloat)
                                           : merge_case(draw, i, kExperts, kWidth, at::kFloat);
  low.x_TD = low.x_TD.detach().to(at::kBFloat16).requires_grad_();
  if (auto* soft = std::get_if<SoftPlan>(&low.plan)) soft->noise_std = 0;
  cut_at_plan(low);
  return {low, in_double(low)};
}

inline std::unique_ptr<ExpertBank> low_bank(const char* activation, int64_t seed = 1) {
  return ffn_bank(kWidth, kExperts, kHidden, activation, true, at::kBFloat16, seed);
}

// A bank of the same weights in float64.
inline std::unique_ptr<ExpertBank> high_bank(const ExpertBank& low, const char* activation) {
  auto high = ffn_bank(kWidth, kExperts, kHidden, activation, true, at::kDouble);
  copy_parameters(low, *high);
  return high;
}

struct Reached {
  double worst = 0;  // the largest share of its bound that an entry uses up; infinite for NaN
  double error = 0;  // the largest relative error of a tensor
};

inline Reached reached(const std::vector<Tensor>& found, const std::vector<Bounded>& bounds) {
  Reached all;
  REQUIRE(found.size() == bounds.size());
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].numel() == 0) continue;
    REQUIRE(found[i].sizes() == bounds[i].value.sizes());
    const Tensor error = found[i].to(at::kDouble).sub(bounds[i].value).abs();
    const double share = error.div(bounds[i].error.add(1e-30)).max().item<double>();
    all.worst = std::isnan(share) ? std::numeric_limits<double>::infinity() : std::max(all.worst, share);
    all.error = std::max(all.error, relative_error(found[i], bounds[i].value));
  }
  return all;
}

}  // namespace moelab::testing
