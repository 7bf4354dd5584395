// The two losses of StableMoE: spec/routers.md 1.3 and 3.5.
#include "tests/losses/plain_losses.h"

#include "core/error.h"
#include "tests/support/route_case.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinAbs;

namespace {

constexpr double kFourDigits = 5e-5;
const Rows kStableLogits = {{1, 0}, {2, 0}, {.5, .4}, {-1, 1}};
const Rows kStableDistilled = {{.2, .1}, {0, .3}, {.5, -.5}, {0, 0}};
const Choices kStableChoices = {{0}, {0}, {0}, {1}};

// What a router of both stages hands to its losses; `learns` = stage 1.
RouteOutput stable_decision(const Tensor& logits_TE, const Tensor& distilled_TE, const Tensor& choice_TK, bool learns = true) {
  RouteOutput out = decision_of(choice_TK, logits_TE.sigmoid().gather(1, choice_TK),
                                {{}, {}, logits_TE.softmax(1), logits_TE, logits_TE, {}});
  out.statistics["distilled"] = distilled_TE;
  out.statistics["stage1"] = at::full({choice_TK.size(0), 1}, learns ? 1 : 0, logits_TE.options().requires_grad(false));
  return out;
}

RouteOutput stable_oracle(bool learns = true) {
  return stable_decision(tensor_of(kStableLogits), tensor_of(kStableDistilled), choices_of(kStableChoices), learns);
}

double stable_value(const char* loss, const RouteOutput& out, int64_t experts = 2) {
  return value_of(*make_loss(loss), input_of(out.gate_TK.size(0)), out, experts).item<double>();
}

double plain_sigmoid(double s) { return 1 / (1 + std::exp(-s)); }

double plain_stable_balance(const Rows& logits, const Choices& choices) {
  const size_t experts = logits.front().size();
  std::vector<double> count(experts), sum(experts);
  for (size_t t = 0; t < choices.size(); ++t) {
    count[choices[t][0]] += 1;
    sum[choices[t][0]] += plain_sigmoid(logits[t][choices[t][0]]);
  }
  const double mean = static_cast<double>(choices.size()) / experts;
  double value = 0;
  for (size_t e = 0; e < experts; ++e) value += (count[e] - mean) / mean * sum[e];
  return value;
}

}  // namespace

TEST_CASE("3.5 oracle: the balance loss is 0.7516, with the paper's 0.3 it is 0.2255") {
  const double value = stable_value("stablemoe_balance", stable_oracle());
  CHECK_THAT(value, WithinAbs(0.7516, kFourDigits));
  CHECK_THAT(0.3 * value, WithinAbs(0.2255, kFourDigits));
  CHECK_THAT(value, WithinAbs(plain_stable_balance(kStableLogits, kStableChoices), 1e-14));
}

TEST_CASE("3.5 oracle: its gradients are .0983, .0525, .1175 at expert 0 and -.0983 at expert 1, counts being constants") {
  const Tensor logits_TE = tensor_of(kStableLogits).requires_grad_(true);
  const RouteOutput out = stable_decision(logits_TE, tensor_of(kStableDistilled), choices_of(kStableChoices));
  value_of(*make_loss("stablemoe_balance"), input_of(4), out, 2).backward();
  const Rows printed = {{.0983, 0}, {.0525, 0}, {.1175, 0}, {0, -.0983}}, found = rows_of(logits_TE.grad());
  for (size_t t = 0; t < 4; ++t)
    for (size_t e = 0; e < 2; ++e) CHECK_THAT(found[t][e], WithinAbs(printed[t][e], kFourDigits));
}

TEST_CASE("3.5 oracle: the distillation loss sums to 2.5052") {
  CHECK_THAT(stable_value("distillation", stable_oracle()), WithinAbs(2.5052, kFourDigits));
  double sum = 0;
  const Rows p = plain_softmax(kStableDistilled);
  for (size_t t = 0; t < 4; ++t) sum -= std::log(p[t][kStableChoices[t][0]]);
  CHECK_THAT(stable_value("distillation", stable_oracle()), WithinAbs(sum, 1e-13));
}

TEST_CASE("3.5 the distillation loss reaches the distilled scores alone, as probability minus choice") {
  const Tensor logits_TE = tensor_of(kStableLogits).requires_grad_(true),
               distilled_TE = tensor_of(kStableDistilled).requires_grad_(true);
  value_of(*make_loss("distillation"), input_of(4), stable_decision(logits_TE, distilled_TE, choices_of(kStableChoices)), 2)
      .backward();
  CHECK_FALSE(logits_TE.grad().defined());
  Rows expected = plain_softmax(kStableDistilled);
  for (size_t t = 0; t < 4; ++t) expected[t][kStableChoices[t][0]] -= 1;
  CHECK(relative_error(distilled_TE.grad(), tensor_of(expected)) < 1e-14);
}

TEST_CASE("3.5 with equal counts the balance loss and its gradient are 0") {
  const Tensor logits_TE = tensor_of(kStableLogits).requires_grad_(true);
  const RouteOutput out = stable_decision(logits_TE, tensor_of(kStableDistilled), choices_of({{0}, {1}, {0}, {1}}));
  const Tensor value = value_of(*make_loss("stablemoe_balance"), input_of(4), out, 2);
  value.backward();
  CHECK(value.item<double>() == 0);
  CHECK(logits_TE.grad().abs().max().item<double>() == 0);
}

TEST_CASE("1.3 the balance loss is signed: below 0 where the fuller expert has the lower scores") {
  const Rows logits = {{-3, 0}, {-3, 0}, {-3, 0}, {0, 5}};
  const double value =
      stable_value("stablemoe_balance", stable_decision(tensor_of(logits), tensor_of(logits), choices_of(kStableChoices)));
  CHECK(value < 0);
  CHECK_THAT(value, WithinAbs(plain_stable_balance(logits, kStableChoices), 1e-14));
}

TEST_CASE("3.5 both losses and their gradients are 0 in stage 2") {
  for (const char* name : {"stablemoe_balance", "distillation"}) {
    const Tensor logits_TE = tensor_of(kStableLogits).requires_grad_(true),
                 distilled_TE = tensor_of(kStableDistilled).requires_grad_(true);
    const RouteOutput out = stable_decision(logits_TE, distilled_TE, choices_of(kStableChoices), /*learns=*/false);
    const Tensor value = value_of(*make_loss(name), input_of(4), out, 2);
    value.backward();
    CHECK(value.item<double>() == 0);
    for (const Tensor& leaf : {logits_TE, distilled_TE})
      if (leaf.grad().defined()) CHECK(leaf.grad().abs().max().item<double>() == 0);
  }
}

TEST_CASE("rows dropped by the capacity count in the balance loss (spec 3.5)") {
  RouteOutput out = stable_oracle();
  out.assignment.kept_TK = at::zeros({4, 1}, at::kBool);
  CHECK_THAT(stable_value("stablemoe_balance", out), WithinAbs(0.7516, kFourDigits));
}

TEST_CASE("both losses are sums over rows: 0 without rows and still on the graph") {
  for (const char* name : {"stablemoe_balance", "distillation"}) {
    const auto loss = make_loss(name);
    CHECK(loss->reduces_by_sum());
    const Tensor none_TE = at::zeros({0, 2}, at::kDouble).requires_grad_(true);
    const Tensor value = value_of(*loss, input_of(0), stable_decision(none_TE, none_TE, at::zeros({0, 1}, at::kLong)), 2);
    CHECK(value.numel() == 1);
    CHECK(value.item<double>() == 0);
    CHECK(value.requires_grad());
  }
}

TEST_CASE("landmarks per row: balance 0 and (E-1)/2 at zero logits, distillation ln E and 0") {
  const Landmarks balance = make_loss("stablemoe_balance")->landmarks(8, 1),
                  distillation = make_loss("distillation")->landmarks(8, 1);
  CHECK(balance.balance == 0);
  CHECK(balance.collapse == 3.5);
  CHECK_THAT(distillation.balance, WithinAbs(std::log(8.0), 1e-14));
  CHECK(distillation.collapse == 0);
  const Tensor zeros_TE = at::zeros({16, 8}, at::kDouble);
  const RouteOutput collapsed = stable_decision(zeros_TE, zeros_TE, at::zeros({16, 1}, at::kLong));
  CHECK_THAT(stable_value("stablemoe_balance", collapsed, 8) / 16, WithinAbs(3.5, 1e-12));
  CHECK_THAT(stable_value("distillation", collapsed, 8) / 16, WithinAbs(std::log(8.0), 1e-12));
}

TEST_CASE("the mean load counts the experts that may be chosen, not the room to grow") {
  const auto router =
      build_router({.name = "softmax_topk", .width = 3, .experts = 2, .max_experts = 3, .options = {{"k", int64_t{1}}}});
  const auto loss = make_loss("stablemoe_balance");
  const RouteInput in = input_of(4);
  const Rows logits = {{1, 0, -1e9}, {2, 0, -1e9}, {.5, .4, -1e9}, {-1, 1, -1e9}};
  const RouteOutput out = stable_decision(tensor_of(logits), tensor_of(logits), choices_of(kStableChoices));
  const auto statistics = collect_statistics(*loss, LossScope::kStep, {in, out, *router, 3}).front();
  CHECK_THAT(loss->value(statistics, *router).item<double>(), WithinAbs(0.7516, kFourDigits));
}

TEST_CASE("distillation is refused where there is no distilled router, the balance loss where there are no choices or logits") {
  auto& losses = Registry<LossEntry>::instance();
  RouterFacts facts;
  CHECK(losses.find("distillation").refuses(facts) == "it teaches a distilled router, and this one has none");
  CHECK(losses.find("stablemoe_balance").refuses(facts).empty());
  facts.distils = true;
  CHECK(losses.find("distillation").refuses(facts).empty());
  facts.has_scores = false;
  CHECK_FALSE(losses.find("stablemoe_balance").refuses(facts).empty());
  facts.plan = PlanForm::kSoft;
  CHECK_FALSE(losses.find("stablemoe_balance").refuses(facts).empty());
  const RouteOutput bare = decision_of(choices_of(kStableChoices), at::zeros({4, 1}, at::kDouble), {});
  CHECK_THROWS_AS(value_of(*make_loss("distillation"), input_of(4), bare, 2), Error);
}
