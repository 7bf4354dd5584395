// bfloat16 executors against a running bound (tests/support/bfloat_bounds.h): every entry of y and of every gradient stays
// within what the roundings on its way can do.
#include "bfloat_cases.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

constexpr int kPlans = 20;  // of each form

// Twenty plans of one form by every executor; gives the largest shares that were met.
Reached check_form(PlanForm form) {
  static const char* const activations[] = {"relu", "gelu", "gelu_tanh", "swiglu"};
  std::mt19937_64 draw(16 + static_cast<uint64_t>(form));
  Reached most;
  for (int i = 0; i < kPlans; ++i) {
    const char* activation = activations[i / 5];  // each with every kind of plan
    const TwoCases at = two_cases(draw, form, i);
    const auto low = low_bank(activation, 1 + i),
               high = high_bank(*low, activation);
    const Tensor grad_y_TD = random_leaf(draw, at.low.x_TD.sizes().vec(), at::kBFloat16, false);
    const auto bounds = bfloat_bounds(at.high.plan, *high, activation, at.high.x_TD, grad_y_TD);
    const auto exact = reference_outcomes(at.high, *high, grad_y_TD.to(at::kDouble));
    std::vector<Tensor> values;
    for (const Bounded& bound : bounds) values.push_back(bound.value);
    {
      INFO(to_string(form) << " plan " << i << ", " << activation << ", the bound's own numbers");
      REQUIRE(worst_of(values, exact) <= 1e-10);
    }
    for (const ExecutorUse& use : kUses) {
      INFO(to_string(form) << " plan " << i << ", " << activation << ", " << use.name);
      const Reached one = reached(outcomes(at.low, *low, grad_y_TD, use), bounds);
      CHECK(one.worst <= 1);
      most.worst = std::max(most.worst, one.worst), most.error = std::max(most.error, one.error);
    }
  }
  return most;
}

}  // namespace

// Below the bounds' hundredth they would say nothing; an error of 2⁻⁹ shows that the numbers were short.
TEST_CASE("bfloat16 executors stay within the bound of their roundings, and use some of it") {
  for (const PlanForm form : {PlanForm::kSparse, PlanForm::kSoft, PlanForm::kMerge}) {
    const Reached most = check_form(form);
    CAPTURE(to_string(form), most.worst, most.error);
    CHECK(most.worst > 0.05);
    CHECK(most.error > 0x1p-9);
  }
}

TEST_CASE("the bound finds a bias that is left out and a gate that is doubled") {
  std::mt19937_64 draw(19);
  const TwoCases at = two_cases(draw, PlanForm::kSparse, 0);
  const auto low = low_bank("gelu"), high = high_bank(*low, "gelu");
  const Tensor grad_y_TD = random_leaf(draw, at.low.x_TD.sizes().vec(), at::kBFloat16, false);
  const auto bounds = bfloat_bounds(at.high.plan, *high, "gelu", at.high.x_TD, grad_y_TD);
  CHECK(reached(outcomes(at.low, *low, grad_y_TD, kUses[0]), bounds).worst <= 1);
  at.low.leaves[0].detach().mul_(2);
  CHECK(reached(outcomes(at.low, *low, grad_y_TD, kUses[0]), bounds).worst > 1);
  at.low.leaves[0].detach().div_(2);
  for (const NamedTensor& entry : low->parameters())
    if (entry.name == "b_out") entry.tensor.detach().zero_();
  CHECK(reached(outcomes(at.low, *low, grad_y_TD, kUses[0]), bounds).worst > 1);
}
