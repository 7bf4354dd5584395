#include "core/error.h"
#include "core/plan.h"

#include "tests/support/route_case.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <functional>
#include <limits>

using namespace moelab;

namespace {

Tensor plan_bools(std::vector<int64_t> values, at::IntArrayRef shape) {
  return at::tensor(values, at::kLong).view(shape).to(at::kBool);
}

// Rows 0, 1, 2 of two choices: one pair dropped, one refused, one not chosen.
Assignment plan_small_assignment() {
  return {at::tensor({2, 0, 0, 1, 2, -1}, at::kLong).view({3, 2}), plan_bools({1, 1, 0, 1, 1, 0}, {3, 2}),
          plan_bools({0, 0, 1, 0, 0, 0}, {3, 2})};
}

SparsePlan plan_small() {
  return make_sparse_plan(plan_small_assignment(), numbers({{.1, .2}, {.3, .4}, {.5, .6}}), 3);
}

struct Corruption {
  const char* rule;
  std::function<void(SparsePlan&)> corrupt;
};

void plan_set(Tensor& tensor, int64_t index, int64_t value) { tensor.view({-1})[index] = value; }

const std::vector<Corruption> kCorruptions{
    {"another number of rows", [](SparsePlan& p) { p.rows = 4; }},
    {"another number of experts", [](SparsePlan& p) { p.experts = 2; }},
    {"a gate is missing", [](SparsePlan& p) { p.gate_N = p.gate_N.slice(0, 1); }},
    {"an expert is missing", [](SparsePlan& p) { p.expert_N = p.expert_N.slice(0, 1); }},
    {"offsets are one short", [](SparsePlan& p) { p.offsets_E1 = p.offsets_E1.slice(0, 1).clone(); }},
    {"offsets do not start at 0", [](SparsePlan& p) { plan_set(p.offsets_E1, 0, 1); }},
    {"offsets do not end at N", [](SparsePlan& p) { plan_set(p.offsets_E1, 3, 3); }},
    {"offsets fall", [](SparsePlan& p) { plan_set(p.offsets_E1, 1, 3); }},
    {"a pair lies in another expert's block", [](SparsePlan& p) { plan_set(p.expert_N, 0, 1); }},
    {"a row is negative", [](SparsePlan& p) { plan_set(p.token_N, 0, -1); }},
    {"a row is past the end", [](SparsePlan& p) { plan_set(p.token_N, 3, 3); }},
    {"an expert's rows are not ascending", [](SparsePlan& p) { plan_set(p.token_N, 2, 2), plan_set(p.token_N, 3, 0); }},
    {"an expert has a row twice", [](SparsePlan& p) { plan_set(p.token_N, 3, 0); }},
    {"a gate is NaN", [](SparsePlan& p) { p.gate_N[0] = std::numeric_limits<double>::quiet_NaN(); }},
    {"a gate is infinite", [](SparsePlan& p) { p.gate_N[1] = std::numeric_limits<double>::infinity(); }},
    {"a slot holds another row", [](SparsePlan& p) { plan_set(p.slot_TK, 1, 1); }},
    {"a slot is past the end", [](SparsePlan& p) { plan_set(p.slot_TK, 0, 4); }},
    {"two choices share a slot", [](SparsePlan& p) { plan_set(p.slot_TK, 1, 2); }},
    {"a kept pair has no slot", [](SparsePlan& p) { plan_set(p.slot_TK, 0, -1); }},
};

}  // namespace

TEST_CASE("a sparse plan sorts the kept pairs by expert, then by row, and lists the dropped ones") {
  const SparsePlan plan = plan_small();
  CHECK(plan.token_N.equal(at::tensor({0, 1, 0, 2}, at::kLong)));
  CHECK(plan.expert_N.equal(at::tensor({0, 1, 2, 2}, at::kLong)));
  CHECK(plan.gate_N.equal(at::tensor({.2, .4, .1, .5}, at::kDouble)));
  CHECK(plan.offsets_E1.equal(at::tensor({0, 1, 2, 4}, at::kLong)));
  CHECK(plan.slot_TK.equal(at::tensor({2, 0, -1, 1, 3, -1}, at::kLong).view({3, 2})));
  CHECK(plan.dropped_token_M.equal(at::tensor({1}, at::kLong)));
  CHECK(plan.dropped_expert_M.equal(at::tensor({0}, at::kLong)));
  CHECK_NOTHROW(validate(plan, 3, 3));
}

TEST_CASE("validate finds every way to break a sparse plan") {
  for (const Corruption& corruption : kCorruptions) {
    INFO(corruption.rule);
    SparsePlan plan = plan_small();
    corruption.corrupt(plan);
    CHECK_THROWS(validate(plan, 3, 3));
  }
}

TEST_CASE("gates of a sparse plan stay on the graph, those of pairs not kept get no gradient") {
  Tensor gate_TK = numbers({{.1, .2}, {.3, .4}, {.5, .6}}).requires_grad_(true);
  make_sparse_plan(plan_small_assignment(), gate_TK, 3).gate_N.sum().backward();
  CHECK(gate_TK.grad().equal(numbers({{1, 1}, {0, 1}, {1, 0}})));
}

TEST_CASE("a plan without rows is valid") {
  const Assignment none{at::empty({0, 2}, at::kLong), at::empty({0, 2}, at::kBool), at::empty({0, 2}, at::kBool)};
  const SparsePlan plan = make_sparse_plan(none, at::empty({0, 2}, at::kDouble), 4);
  CHECK_NOTHROW(validate(plan, 0, 4));
  CHECK(plan.offsets_E1.equal(at::zeros({5}, at::kLong)));
}

TEST_CASE("validate checks soft plans") {
  SoftPlan plan;
  plan.experts = 2;
  plan.slots_per_expert = 2;
  plan.query_TD = random_tensor(1, {3, 5});
  plan.key_SD = random_tensor(2, {4, 5});
  plan.sequence_T = at::zeros({3}, at::kLong);
  CHECK_NOTHROW(validate(plan, 3, 2));
  CHECK_THROWS(validate(plan, 4, 2));
  CHECK_THROWS(validate(plan, 3, 3));
  SoftPlan few_slots = plan;
  few_slots.key_SD = plan.key_SD.slice(0, 1);
  CHECK_THROWS(validate(few_slots, 3, 2));
  SoftPlan broken = plan;
  broken.key_SD = plan.key_SD.div(0);
  CHECK_THROWS(validate(broken, 3, 2));
}

TEST_CASE("validate checks merge plans") {
  const MergePlan plan{numbers({{.5, .5}, {1, 0}}), at::tensor({0, 1, 1}, at::kLong)};
  CHECK_NOTHROW(validate(plan, 3, 2));
  CHECK_THROWS(validate(plan, 2, 2));
  CHECK_THROWS(validate(plan, 3, 3));
  CHECK_THROWS(validate(MergePlan{plan.alpha_GE, at::tensor({0, 1, 2}, at::kLong)}, 3, 2));
  CHECK_THROWS(validate(MergePlan{plan.alpha_GE.div(0), plan.group_of_token_T}, 3, 2));
}
