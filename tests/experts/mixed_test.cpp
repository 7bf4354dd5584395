// Banks of several groups: unequal widths and mixed kinds. Every expert is what it would be alone, whatever stands beside it.
#include "core/error.h"
#include "core/execute.h"
#include "tests/experts/experts_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

const GivenOptions kGelu{{"activation", std::string("gelu")}, {"bias", true}};

GivenOptions gelu_of_width(int64_t width) {
  GivenOptions options = kGelu;
  options["width"] = width;
  return options;
}

std::unique_ptr<ExpertBank> five_of_four_kinds(at::ScalarType dtype = at::kDouble) {
  return mixed_bank({{"ffn", 2, gelu_of_width(5)}, {"zero", 1}, {"constant", 1}, {"identity", 1}}, 3, dtype);
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("unequal widths are several groups, equal ones a single one") {
  const auto unequal = bank_of("ffn", 3, 4, {{"widths", std::vector<int64_t>{5, 5, 2, 7}}});
  REQUIRE(unequal->groups().size() == 3);
  CHECK((unequal->groups()[0].first == 0 && unequal->groups()[0].experts == 2));
  CHECK((unequal->groups()[2].first == 3 && unequal->groups()[2].experts == 1));
  CHECK(unequal->parameters()[0].name == "0-1.w_in");
  CHECK(unequal->parameters().back().name == "3.w_out");
  CHECK(unequal->parameters_per_expert(0) == 2 * 3 * 5);
  CHECK(unequal->parameters_per_expert(2) == 2 * 3 * 2);
  CHECK(unequal->flops_per_row(3) == 2 * 2 * 3 * 7);
  CHECK(unequal->parameter_count() == 2 * 3 * (5 + 5 + 2 + 7));
  const auto equal = bank_of("ffn", 3, 3, {{"widths", std::vector<int64_t>{4, 4, 4}}});
  CHECK(equal->groups().size() == 1);
  CHECK(equal->parameters()[0].name == "w_in");
}

TEST_CASE("an expert of a mixed bank starts as it would alone") {
  const auto mixed = mixed_bank({{"zero", 1}, {"ffn", 2, gelu_of_width(5)}, {"constant", 2}}, 3);
  const auto ffn = bank_of("ffn", 3, 5, gelu_of_width(5)), constant = bank_of("constant", 3, 5);
  CHECK(at::equal(mixed->parameters_of(2)[0], ffn->parameters_of(2)[0]));
  CHECK(at::equal(mixed->parameters_of(4)[1], constant->parameters_of(4)[1]));
}

TEST_CASE("each row of a mixed bank goes through its own expert, and through no other") {
  const auto bank = five_of_four_kinds();
  std::mt19937_64 draw(3);
  const Tensor rows_ND = random_leaf(draw, {6, 3}, at::kDouble, false);
  const Tensor offsets_E1 = at::tensor({0, 1, 3, 4, 5, 6}, at::kLong);
  const Tensor y_ND = bank->forward({.rows_ND = rows_ND, .offsets_E1 = offsets_E1}, 0);
  const auto ffn = bank_of("ffn", 3, 1, gelu_of_width(5));
  const auto constant = bank_of("constant", 3, 1);
  const auto alone = [&](int64_t n, const ExpertBank& kind, int64_t expert) {
    return relative_error(y_ND.narrow(0, n, 1), kind.forward_with(bank->parameters_of(expert), rows_ND.narrow(0, n, 1)));
  };
  CHECK(alone(0, *ffn, 0) < 1e-12);
  CHECK(alone(1, *ffn, 1) < 1e-12);
  CHECK(alone(2, *ffn, 1) < 1e-12);
  CHECK(y_ND[3].count_nonzero().item<int64_t>() == 0);
  CHECK(alone(4, *constant, 3) < 1e-12);
  CHECK(at::equal(y_ND[5], rows_ND[5]));
}

TEST_CASE("executors agree on mixed banks, values and gradients, over random plans") {
  std::mt19937_64 draw(4);
  for (int64_t round = 0; round < 40; ++round) {
    const auto bank =
        round % 2 == 0 ? five_of_four_kinds() : bank_of("ffn", 3, 5, {{"widths", std::vector<int64_t>{2, 6, 6, 1, 3}}});
    const int64_t rows = round % 7 == 0 ? 0 : 9, k = 1 + round % 5;
    const SparseCase one = random_sparse_case(draw, rows, 5, k, 0.2, at::kDouble);
    const Tensor x_TD = random_leaf(draw, {rows, 3}, at::kDouble), weight_TD = random_leaf(draw, {rows, 3}, at::kDouble, false);
    std::vector<Tensor> leaves{x_TD, one.gate_TK};
    for (const NamedTensor& entry : bank->parameters()) leaves.push_back(entry.tensor);
    std::vector<Tensor> values, gradients;
    for (const Execution execution : {Execution::kAuto, Execution::kReference}) {
      for (Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
      const Tensor y_TD = execute(one.plan, *bank, {.x_TD = x_TD}, execution);
      y_TD.mul(weight_TD).sum().backward({}, /*retain_graph=*/true);
      values.push_back(y_TD.detach());
      for (const Tensor& leaf : leaves) gradients.push_back(leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf));
    }
    CAPTURE(round, k);
    CHECK(relative_error(values[0], values[1]) < 1e-10);
    for (size_t i = 0; i < leaves.size(); ++i) CHECK(relative_error(gradients[i], gradients[i + leaves.size()]) < 1e-10);
  }
}

TEST_CASE("gradients of experts without rows are zero, not missing, in every group") {
  const auto bank = five_of_four_kinds();
  const Tensor rows_ND = at::ones({2, 3}, at::kDouble).requires_grad_();
  bank->forward({.rows_ND = rows_ND, .offsets_E1 = at::tensor({0, 0, 2, 2, 2, 2}, at::kLong)}, 0).sum().backward();
  for (const NamedTensor& entry : bank->parameters()) {
    CAPTURE(entry.name);
    REQUIRE(entry.tensor.grad().defined());
    CHECK(entry.tensor.grad().select(0, 0).count_nonzero().item<int64_t>() == 0);
  }
}

TEST_CASE("surgery in a mixed bank stays among experts of one kind and shape, neighbours or not") {
  const auto bank = mixed_bank({{"ffn", 1, gelu_of_width(5)},
                                {"zero", 1},
                                {"ffn", 1, gelu_of_width(5)},
                                {"ffn", 1, gelu_of_width(4)},
                                {"ffn", 1, {{"width", int64_t{5}}, {"bias", true}}}},
                               3);
  CHECK(bank->groups().size() == 5);
  CHECK(bank->alike(0, 2));
  CHECK_FALSE((bank->alike(0, 1) || bank->alike(0, 3) || bank->alike(0, 4)));  // another kind, width, activation
  const std::vector<Tensor> first = bank->parameters_of(0), third = bank->parameters_of(2);
  const Tensor w_first = first[0].detach().clone(), w_third = third[0].detach().clone();
  bank->permute({2, 1, 0, 3, 4});
  CHECK((at::equal(first[0], w_third) && at::equal(third[0], w_first)));
  bank->permute({2, 1, 0, 3, 4});
  CHECK((at::equal(first[0], w_first) && at::equal(third[0], w_third)));
  CHECK(error_of([&] { bank->permute({3, 1, 2, 0, 4}); }) ==
        "permute: experts 3 and 0 of 'ffn + zero' differ in kind or shape; stay within a group");
  CHECK(error_of([&] { bank->clone_expert(1, 0); }) ==
        "clone: experts 1 and 0 of 'ffn + zero' differ in kind or shape; stay within a group");
}

TEST_CASE("widths that do not fit are refused in one line") {
  CHECK(error_of([] { bank_of("ffn", 3, 3, {{"widths", std::vector<int64_t>{4, 4}}}); }) ==
        "widths lists 2 widths for 3 experts; give one for each, room to grow included");
  CHECK(error_of([] { bank_of("ffn", 3, 2, {{"widths", std::vector<int64_t>{4, 0}}}); }) == "widths must be at least 1");
}
