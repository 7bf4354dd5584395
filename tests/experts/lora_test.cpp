// Low-rank experts: formulas with one full matrix per expert, the base untouched, merging, folding, dropout, refusals.
#include "core/adapters.h"
#include "core/error.h"
#include "core/feed_forward.h"
#include "core/grouped.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

using namespace moelab;
using namespace moelab::testing;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;

namespace {

using LoraSettings = std::map<std::string, OptionValue>;

ExpertSpec lora_spec(int64_t width, int64_t experts, const LoraSettings& settings) {
  ExpertSpec spec;
  spec.width = width;
  spec.experts = experts;
  spec.dtype = at::kDouble;
  spec.init = random_key(1, "lora");
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find("lora");
  spec.options = Options(entry.options);
  for (const auto& [name, value] : settings)
    for (const OptionSpec& option : entry.options)
      if (option.name == name) spec.options.set(option, value);
  return spec;
}

// B starts at 0, which hides it; every factor gets random values, so do the biases of a base.
std::unique_ptr<ExpertBank> lora_bank(std::mt19937_64& draw, int64_t width, int64_t experts, const LoraSettings& settings) {
  auto bank = make_experts("lora", lora_spec(width, experts, settings));
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : bank->parameters())
    entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), at::kDouble, false));
  if (bank->base())
    for (const NamedTensor& entry : bank->base()->parameters())
      entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), at::kDouble, false));
  return bank;
}

Tensor lora_tensor(const Module& module, const std::string& name) {
  for (const NamedTensor& entry : module.parameters())
    if (entry.name == name) return entry.tensor;
  FAIL("no parameter " << name);
  return {};
}

// Map `map` of expert e as one dense matrix: what the bank never makes.
Tensor full_map(const ExpertBank& bank, const std::string& map, int64_t e, double scale) {
  return lora_tensor(*bank.base(), map)[0] + scale * lora_tensor(bank, map + "_b")[e].mm(lora_tensor(bank, map + "_a")[e]);
}

Tensor plain_swiglu(const Tensor& gate, const Tensor& up, const Tensor& down, const Tensor& x) {
  const Tensor g = gate.mv(x);
  return down.mv(g * g.sigmoid() * up.mv(x));
}

Tensor plain_base(const ExpertBank& bank, const Tensor& x) {
  const Module& base = *bank.base();
  return plain_swiglu(lora_tensor(base, "w_gate")[0], lora_tensor(base, "w_up")[0], lora_tensor(base, "w_down")[0], x);
}

Tensor plain_expert(const ExpertBank& bank, int64_t e, double scale, const Tensor& x) {
  return plain_swiglu(full_map(bank, "w_gate", e, scale), full_map(bank, "w_up", e, scale), full_map(bank, "w_down", e, scale),
                      x);
}

// Row by row, pair by pair: base(x) + Σ gate·(expert(x) - base(x)).
template <class Base, class Expert>
Tensor plain_layer(const SparsePlan& plan, const Tensor& x_TD, Base base, Expert difference) {
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < x_TD.size(0); ++t) rows.push_back(base(x_TD[t]));
  for (int64_t n = 0; n < plan.token_N.numel(); ++n) {
    const int64_t t = plan.token_N[n].item<int64_t>(), e = plan.expert_N[n].item<int64_t>();
    rows[static_cast<size_t>(t)] = rows[static_cast<size_t>(t)] + plan.gate_N[n] * difference(e, x_TD[t]);
  }
  return at::stack(rows);
}

// y and its gradients by every leaf.
std::vector<Tensor> lora_gradients(const Tensor& y_TD, const std::vector<Tensor>& leaves) {
  for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  y_TD.square().sum().backward({}, true);
  std::vector<Tensor> all{y_TD};
  for (const Tensor& leaf : leaves) all.push_back(leaf.grad());
  return all;
}

std::vector<Tensor> lora_leaves(const ExpertBank& bank, const std::vector<Tensor>& more) {
  std::vector<Tensor> leaves = more;
  for (const NamedTensor& entry : bank.parameters()) leaves.push_back(entry.tensor);
  return leaves;
}

void check_lora_same(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) CHECK(relative_error(a[i], b[i]) < 1e-10);
}

const LoraSettings kSwiglu{{"activation", std::string("swiglu")}, {"width", int64_t{7}}, {"rank", int64_t{2}}, {"alpha", 3.0}};

}  // namespace

TEST_CASE("lora: whole feed-forward experts are the base's matrices plus their own low-rank parts, values and gradients") {
  std::mt19937_64 draw(5);
  const auto bank = lora_bank(draw, 5, 4, kSwiglu);
  const SparseCase at_hand = random_sparse_case(draw, 9, 4, 3, 0.2, at::kDouble);
  const Tensor x_TD = random_leaf(draw, {9, 5}, at::kDouble);
  const std::vector<Tensor> leaves = lora_leaves(*bank, {x_TD, at_hand.gate_TK});
  const Plan plan = at_hand.plan;
  const ExecuteInput input{.x_TD = x_TD};
  const auto routed = lora_gradients(bank->run(plan, input), leaves);
  for (const NamedTensor& entry : bank->base()->parameters()) CHECK_FALSE(entry.tensor.grad().defined());
  check_lora_same(routed, lora_gradients(execute_reference(plan, *bank, input) + bank->base_output(x_TD), leaves));
  const auto difference = [&](int64_t e, const Tensor& x) { return plain_expert(*bank, e, 3.0 / 2, x) - plain_base(*bank, x); };
  check_lora_same(routed,
                  lora_gradients(plain_layer(
                                     at_hand.plan, x_TD, [&](const Tensor& x) { return plain_base(*bank, x); }, difference),
                                 leaves));
}

TEST_CASE("lora: a linear map gets the base once and each chosen product, rank-stabilised or not") {
  std::mt19937_64 draw(6);
  for (const auto& [scaling, scale] :
       std::vector<std::pair<std::string, double>>{{"plain", 5.0 / 4}, {"rank_stabilised", 5.0 / 2}}) {
    const auto bank = lora_bank(
        draw, 6, 3,
        {{"targets", std::string("linear")}, {"width", int64_t{4}}, {"rank", int64_t{4}}, {"alpha", 5.0}, {"scaling", scaling}});
    const SparseCase at_hand = random_sparse_case(draw, 8, 3, 2, 0.2, at::kDouble);
    const Tensor x_TD = random_leaf(draw, {8, 6}, at::kDouble), weight_OD = lora_tensor(*bank->base(), "weight");
    const std::vector<Tensor> leaves = lora_leaves(*bank, {x_TD, at_hand.gate_TK});
    const auto product = [&](int64_t e, const Tensor& x) {
      return scale * lora_tensor(*bank, "b")[e].mv(lora_tensor(*bank, "a")[e].mv(x));
    };
    check_lora_same(lora_gradients(bank->run(at_hand.plan, {.x_TD = x_TD}), leaves),
                    lora_gradients(plain_layer(
                                       at_hand.plan, x_TD, [&](const Tensor& x) { return weight_OD.mv(x); }, product),
                                   leaves));
  }
}

TEST_CASE("lora: at the start every layer is its base, bit for bit, whatever the gates and drops") {
  std::mt19937_64 draw(7);
  for (const std::string targets : {"ffn", "linear"}) {
    LoraSettings settings = kSwiglu;
    settings["targets"] = targets;
    settings["bias"] = true;
    const auto bank = make_experts("lora", lora_spec(5, 4, settings));
    const SparseCase at_hand = random_sparse_case(draw, 9, 4, 3, 0.3, at::kDouble);
    const Tensor x_TD = random_leaf(draw, {9, 5}, at::kDouble, false);
    CHECK(at::equal(bank->run(at_hand.plan, {.x_TD = x_TD}), bank->base_output(x_TD)));
    const double bound = 1 / std::sqrt(5.0);
    const Tensor a = lora_tensor(*bank, targets == "ffn" ? "w_gate_a" : "a");
    CHECK((a.abs().max().item<double>() < bound && a.abs().max().item<double>() > 0.8 * bound));
    CHECK(std::abs(a.mean().item<double>()) < 0.5 * bound);
  }
}

TEST_CASE("lora: merge plans mix the factors apart, or their products") {
  std::mt19937_64 draw(8);
  const Tensor alpha_GE = random_leaf(draw, {2, 3}, at::kDouble).softmax(1), group_T = at::tensor({1, 0, 1, 1, 0}, at::kLong);
  for (const std::string merge : {"factors", "products"}) {
    const auto bank =
        lora_bank(draw, 4, 3, {{"targets", std::string("linear")}, {"rank", int64_t{2}}, {"alpha", 2.0}, {"merge", merge}});
    const Tensor x_TD = random_leaf(draw, {5, 4}, at::kDouble);
    const Tensor a_ERI = lora_tensor(*bank, "a"), b_EOR = lora_tensor(*bank, "b");
    std::vector<Tensor> rows;
    for (int64_t t = 0; t < 5; ++t) {
      const Tensor alpha_E = alpha_GE[group_T[t].item<int64_t>()];
      Tensor a_RI = at::zeros({2, 4}, at::kDouble), b_OR = at::zeros({4, 2}, at::kDouble),
             product_OI = at::zeros({4, 4}, at::kDouble);
      for (int64_t e = 0; e < 3; ++e) {
        a_RI = a_RI + alpha_E[e] * a_ERI[e];
        b_OR = b_OR + alpha_E[e] * b_EOR[e];
        product_OI = product_OI + alpha_E[e] * b_EOR[e].mm(a_ERI[e]);
      }
      rows.push_back((merge == "factors" ? b_OR.mm(a_RI) : product_OI).mv(x_TD[t]));
    }
    const MergePlan plan{.alpha_GE = alpha_GE, .group_of_token_T = group_T};
    const std::vector<Tensor> leaves = lora_leaves(*bank, {x_TD});
    check_lora_same(lora_gradients(execute(plan, *bank, {.x_TD = x_TD}), leaves), lora_gradients(at::stack(rows), leaves));
  }
}

TEST_CASE("lora: soft plans and merge plans agree with the reference executor, whole feed-forward experts too") {
  std::mt19937_64 draw(9);
  const auto bank = lora_bank(draw, 5, 4, kSwiglu);
  const Tensor x_TD = random_leaf(draw, {6, 5}, at::kDouble);
  SoftPlan soft;
  soft.experts = 4;
  soft.slots_per_expert = 2;
  soft.query_TD = x_TD;
  soft.key_SD = random_leaf(draw, {8, 5}, at::kDouble);
  soft.scale = at::ones({1}, at::kDouble);
  soft.sequence_T = at::tensor({0, 1, 0, 0, 1, 1}, at::kLong);
  soft.sequences = 2;
  const MergePlan merge{.alpha_GE = random_leaf(draw, {1, 4}, at::kDouble).softmax(1),
                        .group_of_token_T = at::zeros({6}, at::kLong)};
  const std::vector<Tensor> leaves = lora_leaves(*bank, {x_TD});
  for (const Plan& plan : {Plan(soft), Plan(merge)})
    check_lora_same(lora_gradients(execute(plan, *bank, {.x_TD = x_TD}), leaves),
                    lora_gradients(execute_reference(plan, *bank, {.x_TD = x_TD}), leaves));
}

namespace {

// By turns: anything with drops, no row, one expert for all rows, all experts, rows that mostly have none.
SparseCase lora_plan(std::mt19937_64& draw, int kind, int64_t experts) {
  const auto rows = static_cast<int64_t>(1 + draw() % 20), k = static_cast<int64_t>(1 + draw() % static_cast<uint64_t>(experts));
  if (kind == 1) return random_sparse_case(draw, 0, experts, k, 0, at::kDouble);
  if (kind == 3) return random_sparse_case(draw, rows, experts, experts, 0, at::kDouble);
  if (kind != 2) return random_sparse_case(draw, rows, experts, k, kind == 4 ? 0.8 : 0.2, at::kDouble);
  const Tensor choice_TK = at::full({rows, 1}, k - 1, at::kLong), all_TK = at::ones({rows, 1}, at::kBool);
  const Tensor gate_TK = random_leaf(draw, {rows, 1}, at::kDouble);
  return {make_sparse_plan({choice_TK, all_TK, all_TK.logical_not()}, gate_TK, experts), gate_TK};
}

const Execution kLoraExecutions[] = {Execution::kAuto, Execution::kLoop, Execution::kGrouped, Execution::kBmm,
                                     Execution::kReference};

}  // namespace

TEST_CASE("lora: every executor is the reference on random plans, in values and gradients") {
  std::mt19937_64 draw(13);
  for (int i = 0; i < 100; ++i) {
    LoraSettings settings = kSwiglu;
    settings["targets"] = std::string(i % 2 ? "ffn" : "linear");
    const auto bank = lora_bank(draw, 5, 4, settings);
    const SparseCase at_hand = lora_plan(draw, i % 5, 4);
    const Tensor x_TD = random_leaf(draw, {at_hand.plan.rows, 5}, at::kDouble);
    const std::vector<Tensor> leaves = lora_leaves(*bank, {x_TD, at_hand.gate_TK});
    const auto values = [&](const Tensor& y) {
      auto all = lora_gradients(y, leaves);
      for (size_t l = 0; l < leaves.size(); ++l)
        all[l + 1] = all[l + 1].defined() ? all[l + 1].clone() : at::zeros_like(leaves[l]);
      return all;
    };
    const Tensor base = bank->base_output(x_TD);
    const auto reference = values(execute(at_hand.plan, *bank, {.x_TD = x_TD}, Execution::kReference) + base);
    CAPTURE(i);
    check_lora_same(values(bank->run(at_hand.plan, {.x_TD = x_TD})), reference);
    for (const Execution execution : kLoraExecutions)
      check_lora_same(values(execute(at_hand.plan, *bank, {.x_TD = x_TD}, execution) + base), reference);
  }
}

TEST_CASE("lora: under one decision every executor gives each map's sum of products, row by row") {
  std::mt19937_64 draw(14);
  for (int i = 0; i < 50; ++i) {
    ExpertSpec spec = lora_spec(5, 4, {{"targets", std::string("all")}, {"rank", int64_t{2}}, {"alpha", 3.0}});
    spec.linears = {{"q", 5, 3}, {"w_down", 6, 5}};
    const auto bank = make_experts("lora", spec);
    {
      const at::NoGradGuard no_grad;
      for (const NamedTensor& entry : bank->parameters())
        entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), at::kDouble, false));
    }
    const auto& adapters = dynamic_cast<const AdapterBank&>(*bank);
    const SparseCase at_hand = lora_plan(draw, i % 5, 4);
    for (size_t map = 0; map < spec.linears.size(); ++map) {
      const LinearShape& linear = spec.linears[map];
      const Tensor x_TI = random_leaf(draw, {at_hand.plan.rows, linear.in}, at::kDouble, false);
      Tensor plain_TO = at::zeros({at_hand.plan.rows, linear.out}, at::kDouble);
      for (int64_t n = 0; n < at_hand.plan.token_N.numel(); ++n) {
        const int64_t t = at_hand.plan.token_N[n].item<int64_t>(), e = at_hand.plan.expert_N[n].item<int64_t>();
        const Tensor inner_R = lora_tensor(*bank, linear.name + "_a")[e].mv(x_TI[t]);
        plain_TO[t] += at_hand.plan.gate_N[n].item<double>() * 1.5 *
                       lora_tensor(*bank, linear.name + "_b")[e].mv(inner_R).detach();
      }
      for (const Execution execution : kLoraExecutions) {
        const GroupedProductGuard products(product_of(execution));
        CAPTURE(i, map, static_cast<int>(execution));
        CHECK(relative_error(adapters.delta(at_hand.plan, map, {.x_TD = x_TI}).detach(), plain_TO) < 1e-10);
      }
    }
  }
}

TEST_CASE("lora: one expert folds into the dense weights") {
  std::mt19937_64 draw(10);
  const auto bank = lora_bank(draw, 5, 3, kSwiglu);
  const auto& adapters = dynamic_cast<const AdapterBank&>(*bank);
  const Tensor x_TD = random_leaf(draw, {6, 5}, at::kDouble, false);
  const SparsePlan all_on_1 = make_sparse_plan({.choice_TK = at::ones({6, 1}, at::kLong), .kept_TK = at::ones({6, 1}, at::kBool),
                                                .dropped_TK = at::zeros({6, 1}, at::kBool)}, at::ones({6, 1}, at::kDouble), 3);
  const Tensor routed = bank->run(all_on_1, {.x_TD = x_TD}).detach();
  const std::vector<Tensor> deltas = adapters.dense_deltas(1);
  const at::NoGradGuard no_grad;
  const std::vector<std::string> maps{"w_gate", "w_up", "w_down"};
  for (size_t m = 0; m < maps.size(); ++m) lora_tensor(*bank->base(), maps[m]).add_(deltas[m]);
  CHECK(relative_error(bank->base_output(x_TD), routed) < 1e-10);
}

TEST_CASE("lora: dropout is drawn per row, scaled to keep the mean, and off in evaluation") {
  std::mt19937_64 draw(11);
  const auto bank = lora_bank(draw, 64, 2, {{"targets", std::string("linear")}, {"dropout", 0.25}, {"alpha", 8.0}});
  {
    const at::NoGradGuard no_grad;  // y - base = B·A·x with A, B such that it is the dropped input's mean over its first entries
    lora_tensor(*bank, "a").fill_(1.0);
    lora_tensor(*bank, "b").fill_(1.0 / 8);
  }
  const int64_t rows = 500;
  const SparsePlan plan = make_sparse_plan({.choice_TK = at::arange(rows).remainder(2).unsqueeze(1),
                                            .kept_TK = at::ones({rows, 1}, at::kBool),
                                            .dropped_TK = at::zeros({rows, 1}, at::kBool)},
                                           at::ones({rows, 1}, at::kDouble), 2);
  ExecuteInput input{.x_TD = at::ones({rows, 64}, at::kDouble)};
  input.draws = {random_key(3, "test"), at::zeros({rows}, at::kLong), at::arange(rows)};
  const auto sums = [&] { return bank->run(plan, input).sub(bank->base_output(input.x_TD)).select(1, 0).detach(); };
  // Each row sums 64 entries that are 4/3 or 0: mean 64, standard deviation √(64·(1/3)) = 4.6; over 500 rows 0.21.
  const Tensor dropped = sums();
  CHECK(std::abs(dropped.mean().item<double>() - 64) < 4 * 0.21);
  CHECK(std::abs(dropped.std().item<double>() - 4.62) < 0.7);
  CHECK(at::equal(dropped, sums()));
  input.training = false;
  CHECK(relative_error(sums(), at::full({rows}, 64.0, at::kDouble)) < 1e-12);
}

TEST_CASE("lora: what cannot be done is refused in one line") {
  std::mt19937_64 draw(12);
  CHECK_THROWS_MATCHES(make_experts("lora", lora_spec(4, 2, {{"targets", std::string("attention.q")}})), Error,
                       MessageMatches(ContainsSubstring("names maps of a model")));
  const auto bank = lora_bank(draw, 4, 2, {{"targets", std::string("linear")}, {"dropout", 0.5}});
  const SparseCase at_hand = random_sparse_case(draw, 5, 2, 1, 0, at::kDouble);
  const Tensor x_TD = random_leaf(draw, {5, 4}, at::kDouble);
  CHECK_THROWS_MATCHES(execute_reference(at_hand.plan, *bank, {.x_TD = x_TD}), Error,
                       MessageMatches(ContainsSubstring("dropout")));
}
