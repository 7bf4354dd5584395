// Every kind of experts on every form of plan by every executor: values and all gradients are those of the reference executor.
// Kinds are those registered, each in all its settings; beside them unequal widths and banks that mix kinds.
#include "execute_support.h"
#include "kinds_of_banks.h"

#include "core/error.h"
#include "core/grouped.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

constexpr int kSweptPlans = 500;  // of each kind and form, half of them in float

struct Swept {
  std::string text;  // bank, plan
  PlanCase at;
  const ExpertBank& bank;
  bool recomputes;
  Tensor grad_y_TD;

  // visit(use, values) for every executor that does something of its own.
  template <class Visit>
  void by_every_executor(Visit visit) const {
    for (const ExecutorUse& use : kUses)
      if (recomputes || !use.recompute) visit(use, outcomes(at, bank, grad_y_TD, use));
  }
};

void check_double(const Swept& one) {
  const std::vector<Tensor> plain = reference_outcomes(one.at, one.bank, one.grad_y_TD);
  const std::vector<double> least = sizes_of_terms(one.at, plain);
  one.by_every_executor([&](const ExecutorUse& use, const std::vector<Tensor>& values) {
    INFO(one.text << ", double, " << use.name);
    REQUIRE(worst_of(values, plain, kZeroInDouble, least) <= 1e-10);
  });
}

// Against the reference in double, with the same numbers. Where terms cancel, float's own reference is off by more than 1e-5: no
// executor can be asked for less than that, and eight times as much is the sum in another order.
void check_float(const Swept& one, const ExpertBank& high_bank) {
  copy_parameters(one.bank, high_bank);
  const std::vector<Tensor> exact = reference_outcomes(in_double(one.at), high_bank, one.grad_y_TD.to(at::kDouble));
  const std::vector<double> least = sizes_of_terms(one.at, exact);
  const auto error_of = [&](const std::vector<Tensor>& values) { return worst_of(values, exact, kZeroInFloat, least); };
  one.by_every_executor([&](const ExecutorUse& use, const std::vector<Tensor>& values) {
    const double error = error_of(values);
    const double rounding = error <= 1e-5 ? 0 : error_of(reference_outcomes(one.at, one.bank, one.grad_y_TD));
    INFO(one.text << ", float, " << use.name << "; the reference's rounding " << rounding);
    REQUIRE(rounding < 1e-3);
    REQUIRE(error <= std::max(1e-5, 8 * rounding));
  });
}

bool reads_recompute(const std::vector<PartCase>& parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [](const PartCase& part) { return Registry<ExpertEntry>::instance().find(part.kind).recomputes; });
}

// How many of the plans the bank took.
int sweep(const std::string& name, const DrawParts& draw_parts, PlanForm form) {
  std::vector<int> words(name.begin(), name.end());
  words.push_back(static_cast<int>(form));
  std::seed_seq seed(words.begin(), words.end());
  std::mt19937_64 draw(seed);
  int taken = 0;
  for (int i = 0; i < kSweptPlans; ++i) {
    const at::ScalarType dtype = i % 2 == 0 ? at::kDouble : at::kFloat;
    const int64_t experts = between(draw, i % 10 == 0 ? 1 : 2, 6), bank_seed = between(draw, 1, 1000);
    const std::vector<PartCase> parts = draw_parts(draw, experts);
    const auto bank = mixed_bank(parts, kRowWidth, dtype, bank_seed);
    if (!bank->refuses(form).empty()) continue;
    ++taken;
    shake(draw, *bank);
    Swept one{name + " (" + bank->groups().front().kind + "), " + to_string(form) + " plan " + std::to_string(i),
              case_of(draw, form, i, experts, dtype),
              *bank,
              form != PlanForm::kMerge && reads_recompute(parts),
              {}};
    one.grad_y_TD = random_leaf(draw, {one.at.x_TD.size(0), bank->output_width(0)}, dtype, false);
    if (auto* soft = std::get_if<SoftPlan>(&one.at.plan); soft && dtype == at::kFloat) soft->noise_std = 0;
    if (dtype == at::kFloat) cut_at_plan(one.at);
    if (dtype == at::kDouble) check_double(one);
    else check_float(one, *mixed_bank(parts, kRowWidth, at::kDouble, bank_seed));
  }
  return taken;
}

// Both stages of one decision with the module's code between them; `map` is a stage of the pairs' rows.
template <class Map>
std::vector<Tensor> two_stages(const PlanCase& at, const ExpertBank& bank, const Tensor& grad_y_TD, Map map) {
  const SparsePlan& plan = std::get<SparsePlan>(at.plan);
  std::vector<Tensor> leaves{at.x_TD, at.leaves[0]};
  for (const NamedTensor& entry : bank.parameters()) leaves.push_back(entry.tensor);
  for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  const Tensor y_TD = combine_rows(map(map(dispatch_rows(at.x_TD, plan), 0).tanh(), 1), plan);
  y_TD.backward(grad_y_TD, /*retain_graph=*/true);
  std::vector<Tensor> values{y_TD.detach()};
  for (const Tensor& leaf : leaves) values.push_back(leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf));
  return values;
}

void sweep_all(PlanForm form) {
  for (const auto& [name, parts] : all_banks()) {
    const int taken = sweep(name, parts, form);
    CAPTURE(name, taken);
    if (form != PlanForm::kMerge) CHECK(taken == kSweptPlans);
    else if (name == "zero" || name == "identity") CHECK(taken == 0);  // nothing to mix
    else CHECK(taken > 0);                                             // banks of one group alone
  }
}

}  // namespace

TEST_CASE("the sweep knows every kind that is registered") {
  const auto banks = all_banks();
  for (const ExpertEntry& entry : Registry<ExpertEntry>::instance().all())
    CHECK(banks.contains(entry.name) == (entry.place != ExpertPlace::kAttention));  // heads: below
}

TEST_CASE("every executor is the reference on every kind of experts: sparse plans") { sweep_all(PlanForm::kSparse); }
TEST_CASE("every executor is the reference on every kind of experts: soft plans") { sweep_all(PlanForm::kSoft); }
TEST_CASE("every executor is the reference on every kind of experts: merge plans") { sweep_all(PlanForm::kMerge); }

// The module computes what is between the stages, and no reference executor takes them: experts one by one stand for it.
TEST_CASE("every product gives both stages of attention heads what each head's own matrices give") {
  std::mt19937_64 draw(71);
  for (int i = 0; i < kSweptPlans; ++i) {
    const at::ScalarType dtype = i % 2 == 0 ? at::kDouble : at::kFloat;
    const int64_t experts = between(draw, 1, 6);
    const auto bank = mixed_bank({{"attention_head", experts, {{"head_size", int64_t{4}}}}}, kRowWidth, dtype, i);
    shake(draw, *bank);
    REQUIRE(bank->stages() == 2);
    const PlanCase at = sparse_case(draw, i, experts, kRowWidth, dtype);
    const SparsePlan& plan = std::get<SparsePlan>(at.plan);
    const Tensor grad_y_TD = random_leaf(draw, at.x_TD.sizes().vec(), dtype, false);
    const auto plain = two_stages(at, *bank, grad_y_TD, [&](const Tensor& rows_ND, int stage) {
      const int64_t* offset = plan.offsets_E1.const_data_ptr<int64_t>();
      std::vector<Tensor> outputs;
      for (int64_t e = 0; e < experts; ++e)
        outputs.push_back(at::linear(rows_ND.narrow(0, offset[e], offset[e + 1] - offset[e]),
                                     bank->parameters_of(e).at(static_cast<size_t>(stage))));
      return at::cat(outputs);
    });
    for (const GroupedProduct product :
         {GroupedProduct::kAuto, GroupedProduct::kLoop, GroupedProduct::kGrouped, GroupedProduct::kBmm}) {
      INFO("plan " << i << ", product " << static_cast<int>(product));
      const GroupedProductGuard guard(product);
      const auto fast = two_stages(at, *bank, grad_y_TD, [&](const Tensor& rows_ND, int stage) {
        return map_pairs(plan, *bank, rows_ND, {.x_TD = at.x_TD}, stage);
      });
      REQUIRE(worst_of(fast, plain) <= (dtype == at::kDouble ? 1e-10 : 1e-5));
    }
  }
}
