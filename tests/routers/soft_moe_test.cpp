#include "tests/routers/oracle.h"
#include "tests/support/merging_bank.h"
#include "tests/support/sparse_cases.h"

#include "core/error.h"
#include "core/execute.h"

#include <ATen/core/grad_mode.h>

using namespace moelab;
using moelab::testing::FactorBank;

namespace {

const SoftPlan& soft_plan(const RouteOutput& out) { return std::get<SoftPlan>(out.plan); }

std::unique_ptr<Router> soft_router(std::map<std::string, OptionValue> options = {}, int64_t experts = 3,
                                    int64_t max_experts = 0, NoiseSpec noise = {}) {
  auto router = build_router({.name = "soft_moe", .width = 4, .experts = experts, .max_experts = max_experts,
                              .options = std::move(options), .noise = noise});
  set_tensor(*router, "scale", at::full({1}, 1.7, at::kDouble));
  return router;
}

// What the paper writes, in plain loops, for one sequence: {dispatch, combine}, both [M,S].
struct SlowSoft {
  Rows dispatch, combine;
};

Rows slow_unit_rows(const Tensor& rows, double epsilon) {
  Rows unit;
  for (int64_t t = 0; t < rows.size(0); ++t) {
    double sum = 0;
    for (int64_t d = 0; d < rows.size(1); ++d) sum += std::pow(rows[t][d].item<double>(), 2);
    unit.emplace_back();
    for (int64_t d = 0; d < rows.size(1); ++d) unit.back().push_back(rows[t][d].item<double>() / std::sqrt(sum + epsilon));
  }
  return unit;
}

SlowSoft slow_soft(const Tensor& x_MD, const Tensor& phi_SD, double scale, double epsilon, const Rows& noise = {}) {
  const Rows x = slow_unit_rows(x_MD, epsilon), phi = slow_unit_rows(phi_SD, epsilon);
  Rows logits(x.size(), std::vector<double>(phi.size(), 0));
  for (size_t t = 0; t < x.size(); ++t)
    for (size_t s = 0; s < phi.size(); ++s) {
      for (size_t d = 0; d < x[t].size(); ++d) logits[t][s] += scale * x[t][d] * phi[s][d];
      if (!noise.empty()) logits[t][s] += noise[t][s];
    }
  SlowSoft slow{logits, {}};
  for (const auto& row : logits) slow.combine.push_back(slow_softmax(row));
  for (size_t s = 0; s < phi.size(); ++s) {
    std::vector<double> column;
    for (const auto& row : logits) column.push_back(row[s]);
    column = slow_softmax(column);
    for (size_t t = 0; t < x.size(); ++t) slow.dispatch[t][s] = column[t];
  }
  return slow;
}

void check_matrices(const SoftMatrices& found, const SlowSoft& slow) {
  CHECK(relative_error(found.dispatch_MS, numbers(slow.dispatch)) < 1e-10);
  CHECK(relative_error(found.combine_MS, numbers(slow.combine)) < 1e-10);
}

std::string soft_refusal(const Router& router, const RouteCase& input) {
  try {
    route(router, input);
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("soft_moe oracle (spec 3.6): dispatch, combine, slots and y") {
  const auto router = build_router({.name = "soft_moe", .width = 2, .experts = 2, .options = {{"normalise_eps", 0.0}}});
  set_tensor(*router, "phi", at::eye(2, at::kDouble));
  const Tensor x_TD = numbers({{1, 0}, {0, 1}, {1, 1}});
  const RouteOutput out = route(*router, RouteCase(x_TD));
  CHECK(printed_digits_agree(out.probes.at("logits"), numbers({{1, 0}, {0, 1}, {.7071, .7071}})));
  const SoftMatrices matrices = soft_matrices(soft_plan(out), 0);
  CHECK(printed_digits_agree(matrices.dispatch_MS, numbers({{.4730, .1740}, {.1740, .4730}, {.3529, .3529}})));
  CHECK(printed_digits_agree(matrices.combine_MS, numbers({{.7311, .2689}, {.2689, .7311}, {.5, .5}})));
  CHECK(printed_digits_agree(matrices.dispatch_MS.t().mm(x_TD), numbers({{.8260, .5270}, {.5270, .8260}})));
  const FactorBank bank(2, at::tensor({2.0, -1.0}, at::kDouble));
  const Tensor expected_TD = numbers({{1.0660, .5483}, {.0590, -.3204}, {.5625, .1140}});
  CHECK(printed_digits_agree(execute(out.plan, bank, {.x_TD = x_TD}), expected_TD));
}

TEST_CASE("soft_moe equals plain loops on interleaved sequences of different lengths, with two slots per expert") {
  const auto router = soft_router({{"slots_per_expert", int64_t{2}}, {"normalise_eps", 0.01}});
  const std::vector<int64_t> sequence{0, 1, 0, 0, 2, 1, 0};
  const Tensor x_TD = random_tensor(5, {7, 4});
  const RouteOutput out = route(*router, RouteCase(x_TD).sequences(sequence));
  for (int64_t b = 0; b < 3; ++b) {
    const Tensor row_M = longs_of(sequence).eq(b).nonzero().squeeze(1);
    const SoftMatrices found = soft_matrices(soft_plan(out), b);
    CHECK(found.row_M.equal(row_M));
    check_matrices(found, slow_soft(x_TD.index_select(0, row_M), find_tensor(*router, "phi"), 1.7, 0.01));
  }
}

TEST_CASE("soft_moe invariants (spec 3.6): columns of D and rows of C sum to 1, also without normalisation") {
  for (const bool normalise : {true, false}) {
    const auto router = soft_router({{"normalise", normalise}});
    const Tensor x_TD = random_tensor(5, {9, 4});
    const RouteOutput out = route(*router, RouteCase(x_TD));
    const SoftMatrices matrices = soft_matrices(soft_plan(out), 0);
    CHECK(relative_error(matrices.dispatch_MS.sum(0), at::ones({3}, at::kDouble)) < 1e-12);
    CHECK(relative_error(matrices.combine_MS.sum(1), at::ones({9}, at::kDouble)) < 1e-12);
    const Tensor plain_TS = x_TD.mm(find_tensor(*router, "phi").detach().t()) * 1.7;
    if (!normalise) CHECK(relative_error(out.probes.at("logits"), plain_TS) < 1e-12);
  }
}

TEST_CASE("soft_moe invariants (spec 3.6): permuting tokens permutes y; scaling rows of x leaves the logits") {
  const auto router = soft_router({{"normalise_eps", 0.0}});
  std::mt19937_64 draw(3);
  const auto bank = moelab::testing::ffn_bank(4, 3, 5, "gelu", true, at::kDouble);
  const Tensor x_TD = random_tensor(5, {6, 4}), order_T = longs_of({4, 2, 0, 5, 1, 3});
  const RouteOutput out = route(*router, RouteCase(x_TD));
  const Tensor y_TD = execute(out.plan, *bank, {.x_TD = x_TD});
  const Tensor moved_TD = x_TD.index_select(0, order_T);
  const Tensor moved_y_TD = execute(route(*router, RouteCase(moved_TD)).plan, *bank, {.x_TD = moved_TD});
  CHECK(relative_error(moved_y_TD, y_TD.index_select(0, order_T)) < 1e-10);
  const Tensor scaled_TD = x_TD * numbers({{.1}, {2}, {30}, {4}, {.5}, {600}});
  CHECK(relative_error(route(*router, RouteCase(scaled_TD)).probes.at("logits"), out.probes.at("logits")) < 1e-10);
}

TEST_CASE("soft_moe invariants (spec 3.6): identity experts give C·DᵀX, and every expert gets a gradient") {
  const auto router = soft_router({{"slots_per_expert", int64_t{2}}});
  const Tensor x_TD = random_tensor(5, {6, 4});
  const RouteOutput out = route(*router, RouteCase(x_TD));
  const SoftMatrices matrices = soft_matrices(soft_plan(out), 0);
  const FactorBank bank(4, at::ones({3}, at::kDouble));
  const Tensor y_TD = execute(out.plan, bank, {.x_TD = x_TD});
  CHECK(relative_error(y_TD, matrices.combine_MS.mm(matrices.dispatch_MS.t().mm(x_TD))) < 1e-10);
  y_TD.square().sum().backward();
  CHECK(bank.parameters()[0].tensor.grad().ne(0).all().item<bool>());
  CHECK(find_tensor(*router, "phi").grad().ne(0).any(1).all().item<bool>());
}

TEST_CASE("soft_moe edge (spec 3.6): the slots of a sequence of one row all hold that row; E = 1 with P = M is no identity") {
  const Tensor x_TD = random_tensor(5, {1, 4});
  const RouteOutput one = route(*soft_router(), RouteCase(x_TD));
  CHECK(relative_error(soft_matrices(soft_plan(one), 0).dispatch_MS, at::ones({1, 3}, at::kDouble)) < 1e-12);
  const Tensor four_TD = random_tensor(6, {4, 4});
  const RouteOutput out = route(*soft_router({{"slots_per_expert", int64_t{4}}}, 1), RouteCase(four_TD));
  const FactorBank bank(4, at::ones({1}, at::kDouble));
  CHECK(relative_error(execute(out.plan, bank, {.x_TD = four_TD}), four_TD) > 0.1);
}

TEST_CASE("soft_moe's ablations: uniform weights and identity, in dispatch and in combine") {
  const Tensor x_TD = random_tensor(5, {6, 4});
  const std::map<std::string, OptionValue> two{{"slots_per_expert", int64_t{2}}};
  const SlowSoft slow = slow_soft(x_TD, find_tensor(*soft_router(two), "phi"), 1.7, 1e-6);
  for (const char* dispatch : {"soft", "uniform", "identity"})
    for (const char* combine : {"soft", "uniform", "identity"}) {
      INFO(dispatch << " / " << combine);
      auto options = two;
      options["dispatch"] = word(dispatch), options["combine"] = word(combine);
      const SoftMatrices found = soft_matrices(soft_plan(route(*soft_router(options), RouteCase(x_TD))), 0);
      const Tensor eye = at::eye(6, at::kDouble), sixth = at::full({6, 6}, 1.0 / 6, at::kDouble);
      const auto expected = [&](const std::string& kind, const Rows& rows) {
        return kind == "soft" ? numbers(rows) : kind == "uniform" ? sixth : eye;
      };
      CHECK(relative_error(found.dispatch_MS, expected(dispatch, slow.dispatch)) < 1e-10);
      CHECK(relative_error(found.combine_MS, expected(combine, slow.combine)) < 1e-10);
    }
}

TEST_CASE("soft_moe's identity refuses a sequence that has not one row per slot, naming both numbers") {
  const auto router = soft_router({{"combine", word("identity")}});
  CHECK(soft_refusal(*router, RouteCase(random_tensor(5, {3, 4}))).empty());
  const std::string message = soft_refusal(*router, RouteCase(random_tensor(5, {7, 4})).sequences({0, 1, 0, 1, 0, 1, 1}));
  CAPTURE(message);
  CHECK(message.find("sequence 1 has 4 rows for 3 slots") != std::string::npos);
  CHECK(message.find('\n') == std::string::npos);
}

TEST_CASE("soft_moe gives experts that are not there yet no weight and no gradient") {
  const Tensor x_TD = random_tensor(5, {6, 4});
  for (const char* kind : {"soft", "uniform"}) {
    INFO(kind);
    const std::map<std::string, OptionValue> options{
        {"slots_per_expert", int64_t{2}}, {"dispatch", word(kind)}, {"combine", word(kind)}};
    const auto small = soft_router(options, 3), roomy = soft_router(options, 3, 5);
    set_tensor(*roomy, "phi", at::cat({find_tensor(*small, "phi").detach(), random_tensor(8, {4, 4})}));
    const SoftMatrices few = soft_matrices(soft_plan(route(*small, RouteCase(x_TD))), 0);
    const RouteOutput out = route(*roomy, RouteCase(x_TD));
    const SoftMatrices many = soft_matrices(soft_plan(out), 0);
    REQUIRE(many.dispatch_MS.sizes() == at::IntArrayRef({6, 10}));
    CHECK(many.dispatch_MS.equal(at::cat({few.dispatch_MS, at::zeros({6, 4}, at::kDouble)}, 1)));
    CHECK(many.combine_MS.equal(at::cat({few.combine_MS, at::zeros({6, 4}, at::kDouble)}, 1)));
    CHECK_FALSE(out.probes.at("probs").slice(1, 6).any().item<bool>());
    CHECK(roomy->active_experts_E().equal(at::tensor({1, 1, 1, 0, 0}, at::kLong).ne(0)));
    const FactorBank bank(4, random_tensor(9, {5}));
    const Tensor y_TD = execute(out.plan, bank, {.x_TD = x_TD});
    y_TD.mul(random_tensor(1, {6, 4})).sum().backward();
    CHECK_FALSE(bank.parameters()[0].tensor.grad().slice(0, 3).any().item<bool>());
    if (std::string(kind) == "soft") CHECK_FALSE(find_tensor(*roomy, "phi").grad().slice(0, 6).any().item<bool>());
  }
}

TEST_CASE("soft_moe adds noise in training only, given or drawn by row, and none by default") {
  const Tensor x_TD = random_tensor(5, {5, 4}), draw_TS = random_tensor(6, {5, 3});
  const NoiseSpec half{.kind = NoiseSpec::Kind::kNormal, .std = 0.5, .std_given = true};
  const auto noisy = soft_router({}, 3, 0, half), plain = soft_router();
  Rows noise(5, std::vector<double>(3));
  for (int64_t t = 0; t < 5; ++t)
    for (int64_t s = 0; s < 3; ++s) noise[t][s] = 0.5 * draw_TS[t][s].item<double>();
  const RouteOutput given = route(*noisy, RouteCase(x_TD).train().noise(draw_TS));
  check_matrices(soft_matrices(soft_plan(given), 0), slow_soft(x_TD, find_tensor(*noisy, "phi"), 1.7, 1e-6, noise));
  const Tensor clean = soft_matrices(soft_plan(route(*plain, RouteCase(x_TD).train())), 0).combine_MS;
  CHECK(soft_matrices(soft_plan(route(*noisy, RouteCase(x_TD).noise(draw_TS))), 0).combine_MS.equal(clean));
  CHECK(given.probes.at("logits").equal(route(*plain, RouteCase(x_TD)).probes.at("logits")));
  const Tensor drawn = soft_matrices(soft_plan(route(*noisy, RouteCase(x_TD).train().seed(1))), 0).combine_MS;
  CHECK(drawn.equal(soft_matrices(soft_plan(route(*noisy, RouteCase(x_TD).train().seed(1))), 0).combine_MS));
  CHECK_FALSE(drawn.equal(soft_matrices(soft_plan(route(*noisy, RouteCase(x_TD).train().seed(2))), 0).combine_MS));
  CHECK(noisy->facts().noisy_in_training);
  CHECK_FALSE(plain->facts().noisy_in_training);
  CHECK_THROWS_AS(route(*noisy, RouteCase(x_TD).train().noise(random_tensor(6, {5, 4}))), Error);
  CHECK_THROWS_AS(soft_router({}, 3, 0, {.kind = NoiseSpec::Kind::kJitter}), Error);
}

TEST_CASE("soft_moe learns phi and scale unless neither matrix is soft; gradients equal finite differences") {
  const auto router = soft_router({{"slots_per_expert", int64_t{2}}});
  const auto bank = moelab::testing::ffn_bank(4, 3, 5, "gelu", true, at::kDouble);
  RouteCase input = RouteCase(random_tensor(2, {7, 4}).requires_grad_(true)).sequences({0, 1, 0, 1, 1, 0, 0});
  const Tensor weight_TD = random_tensor(3, {7, 4});
  const auto value = [&] { return execute(route(*router, input).plan, *bank, {.x_TD = input.in.x_TD}).mul(weight_TD).sum(); };
  CHECK(gradient_error(value, input.in.x_TD) < 1e-7);
  for (const char* name : {"phi", "scale"}) CHECK(gradient_error(value, find_tensor(*router, name)) < 1e-7);
  const auto fixed = soft_router({{"dispatch", word("uniform")}, {"combine", word("uniform")}});
  CHECK(fixed->trainable().empty());
  CHECK_FALSE(fixed->facts().learned);
  CHECK(soft_router({{"dispatch", word("uniform")}})->facts().learned);
}

TEST_CASE("soft_moe takes no rows, one expert, rows of zeros and equal rows; it refuses rows that are not finite") {
  const auto router = soft_router();
  for (const int64_t rows : {0, 1, 2})
    CHECK(soft_plan(route(*router, RouteCase(at::zeros({rows, 4}, at::kDouble)))).query_TD.size(0) == rows);
  const SoftMatrices equal = soft_matrices(soft_plan(route(*router, RouteCase(at::ones({5, 4}, at::kDouble)))), 0);
  CHECK(relative_error(equal.dispatch_MS, at::full({5, 3}, 0.2, at::kDouble)) < 1e-12);
  CHECK(relative_error(soft_matrices(soft_plan(route(*soft_router({}, 1), RouteCase(random_tensor(2, {5, 4})))), 0).combine_MS,
                       at::ones({5, 1}, at::kDouble)) < 1e-12);
  Tensor bad_TD = random_tensor(2, {5, 4});
  bad_TD[3][1] = NAN;
  CHECK_THROWS_AS(route(*router, RouteCase(bad_TD)), Error);
}
