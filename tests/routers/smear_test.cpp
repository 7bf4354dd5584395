#include "tests/routers/oracle.h"
#include "tests/support/merging_bank.h"
#include "tests/support/sparse_cases.h"

#include "core/error.h"
#include "core/execute.h"

using namespace moelab;

namespace {

const MergePlan& smear_plan(const RouteOutput& out) { return std::get<MergePlan>(out.plan); }

std::unique_ptr<Router> smear_router(int64_t experts = 3, int64_t max_experts = 0) {
  auto router = build_router({.name = "smear", .width = 4, .experts = experts, .max_experts = max_experts});
  const Tensor weight_ED = find_tensor(*router, "weight");
  set_tensor(*router, "weight", random_tensor(1, weight_ED.sizes()));
  return router;
}

}  // namespace

TEST_CASE("smear mixes the experts of each sequence by the softmax of W times its mean row, in plain loops") {
  const std::vector<int64_t> sequence{1, 0, 1, 1, 0};
  const Tensor x_TD = random_tensor(2, {5, 4});
  const auto router = smear_router();
  const Rows z = slow_linear(x_TD, find_tensor(*router, "weight").detach());
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    RouteCase input = RouteCase(x_TD).sequences(sequence);
    input.in.mode = mode;
    const RouteOutput out = route(*router, input);
    CHECK(smear_plan(out).group_of_token_T.equal(longs_of(sequence)));
    for (int64_t b = 0; b < 2; ++b) {
      std::vector<double> mean(3, 0);
      const auto rows = static_cast<double>(std::count(sequence.begin(), sequence.end(), b));
      for (int64_t t = 0; t < 5; ++t)
        for (int64_t e = 0; e < 3; ++e) mean[e] += sequence[t] == b ? z[t][e] / rows : 0;
      CHECK(relative_error(smear_plan(out).alpha_GE[b], at::tensor(slow_softmax(mean), at::kDouble)) < 1e-10);
      for (int64_t t = 0; t < 5; ++t)
        if (sequence[t] == b) CHECK(relative_error(out.probes.at("logits")[t], at::tensor(mean, at::kDouble)) < 1e-10);
    }
  }
}

TEST_CASE("smear with identical experts equals the dense expert, and one-hot weights equal that expert") {
  const Tensor x_TD = random_tensor(2, {6, 4});
  const auto bank = testing::ffn_bank(4, 3, 5, "swiglu", true, at::kDouble);
  const auto router = smear_router();
  set_tensor(*router, "weight", at::zeros({3, 4}, at::kDouble));
  find_tensor(*router, "weight").detach()[2] = 1e4;
  const Tensor positive_TD = x_TD.abs();
  CHECK(relative_error(execute(route(*router, RouteCase(positive_TD)).plan, *bank, {.x_TD = positive_TD}),
                       bank->forward_with(bank->parameters_of(2), positive_TD)) < 1e-10);
  bank->clone_expert(0, 1), bank->clone_expert(0, 2);
  CHECK(relative_error(execute(route(*smear_router(), RouteCase(x_TD)).plan, *bank, {.x_TD = x_TD}),
                       bank->forward_with(bank->parameters_of(0), x_TD)) < 1e-10);
}

TEST_CASE("smear looks at its whole sequence and at no other, and says so") {
  const Tensor x_TD = random_tensor(2, {6, 4});
  const auto router = smear_router();
  const auto alpha_of = [&](const Tensor& rows) {
    return smear_plan(route(*router, RouteCase(rows).sequences({0, 0, 0, 1, 1, 1}))).alpha_GE;
  };
  Tensor changed_TD = x_TD.clone();
  changed_TD[2] += 1;
  CHECK_FALSE(alpha_of(changed_TD)[0].equal(alpha_of(x_TD)[0]));
  CHECK(alpha_of(changed_TD)[1].equal(alpha_of(x_TD)[1]));
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    for (const int64_t prompt : {0, 4}) CHECK_FALSE(causality(router->facts(), {}, mode, 0, prompt).causal);
  CHECK_FALSE(router->facts().decodes);
}

TEST_CASE("smear gives experts that are not there yet no weight, and refuses noise and rows that are not finite") {
  const Tensor x_TD = random_tensor(2, {6, 4});
  const Tensor alpha_GE = smear_plan(route(*smear_router(2, 4), RouteCase(x_TD))).alpha_GE;
  CHECK(alpha_GE.slice(1, 2).eq(0).all().item<bool>());
  CHECK(relative_error(alpha_GE.sum(1), at::ones({1}, at::kDouble)) < 1e-12);
  CHECK_THROWS_AS(build_router({.name = "smear", .noise = {.kind = NoiseSpec::Kind::kNormal}}), Error);
  Tensor bad_TD = x_TD.clone();
  bad_TD[3][1] = INFINITY;
  CHECK_THROWS_AS(route(*smear_router(), RouteCase(bad_TD)), Error);
}

TEST_CASE("smear's gradients equal finite differences; no rows and one expert are no special case") {
  const auto router = smear_router();
  const auto bank = testing::ffn_bank(4, 3, 5, "gelu", true, at::kDouble);
  RouteCase input = RouteCase(random_tensor(2, {6, 4}).requires_grad_(true)).sequences({0, 1, 0, 1, 1, 0});
  const Tensor weight_TD = random_tensor(3, {6, 4});
  const auto value = [&] { return execute(route(*router, input).plan, *bank, {.x_TD = input.in.x_TD}).mul(weight_TD).sum(); };
  CHECK(gradient_error(value, input.in.x_TD) < 1e-7);
  CHECK(gradient_error(value, find_tensor(*router, "weight")) < 1e-7);
  const Tensor none_TD = at::zeros({0, 4}, at::kDouble);
  CHECK(execute(route(*router, RouteCase(none_TD)).plan, *bank, {.x_TD = none_TD}).sizes() == at::IntArrayRef({0, 4}));
  CHECK(smear_plan(route(*smear_router(1), RouteCase(random_tensor(2, {6, 4})))).alpha_GE.eq(1).all().item<bool>());
}
