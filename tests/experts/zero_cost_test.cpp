// Zero, identity and constant experts by plain loops; what they cost; a layer of them beside feed-forward ones.
#include "core/error.h"
#include "core/execute.h"
#include "tests/experts/experts_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

Tensor run_rows(const ExpertBank& bank, const Tensor& rows_ND, std::vector<int64_t> offsets) {
  return bank.forward({.rows_ND = rows_ND, .offsets_E1 = at::tensor(offsets, at::kLong)}, 0);
}

}  // namespace

TEST_CASE("zero experts give zeros, identity experts the row, and neither has a parameter or a cost") {
  std::mt19937_64 draw(1);
  const Tensor rows_ND = random_leaf(draw, {5, 3}, at::kDouble);
  const auto zero = bank_of("zero", 3, 2), identity = bank_of("identity", 3, 2);
  CHECK(at::equal(run_rows(*zero, rows_ND, {0, 1, 5}), at::zeros({5, 3}, at::kDouble)));
  const Tensor y_ND = run_rows(*identity, rows_ND, {0, 5, 5});
  CHECK(at::equal(y_ND, rows_ND));
  CHECK_FALSE(y_ND.is_alias_of(rows_ND));
  y_ND.mul(3).sum().backward();
  CHECK(at::equal(rows_ND.grad(), at::full({5, 3}, 3, at::kDouble)));
  for (const ExpertBank* bank : {zero.get(), identity.get()}) {
    CHECK(bank->parameters().empty());
    CHECK((bank->parameters_per_expert(1) == 0 && bank->flops_per_row(1) == 0));
  }
}

TEST_CASE("constant experts blend the row with their vector") {
  std::mt19937_64 draw(2);
  const auto bank = bank_of("constant", 3, 3);
  const Tensor rows_ND = random_leaf(draw, {5, 3}, at::kDouble, false), y_ND = run_rows(*bank, rows_ND, {0, 2, 2, 5});
  const auto x = rows_ND.accessor<double, 2>();
  for (int64_t n = 0; n < 5; ++n) {
    const std::vector<Tensor> p = bank->parameters_of(n < 2 ? 0 : 2);
    const auto mix = p[0].accessor<double, 2>();
    const auto v = p[1].accessor<double, 1>();
    double z[2] = {};
    for (int64_t a = 0; a < 2; ++a)
      for (int64_t d = 0; d < 3; ++d) z[a] += mix[a][d] * x[n][d];
    const double own = std::exp(z[0]) / (std::exp(z[0]) + std::exp(z[1]));
    for (int64_t d = 0; d < 3; ++d) CHECK(std::abs(y_ND[n][d].item<double>() - (own * x[n][d] + (1 - own) * v[d])) < 1e-12);
  }
  CHECK(bank->parameters_per_expert(0) == 2 * 3 + 3);
}

TEST_CASE("no mean of parameters exists where there are none, or of several kinds") {
  CHECK(bank_of("zero", 3, 2)->refuses(PlanForm::kMerge) == "experts 'zero' have no parameters that could be mixed");
  CHECK(bank_of("zero", 3, 2)->refuses(PlanForm::kSparse).empty());
  CHECK(bank_of("constant", 3, 2)->refuses(PlanForm::kMerge).empty());
  const auto mixed = mixed_bank({{"ffn", 2, {}}, {"zero", 1, {}}}, 3);
  CHECK(mixed->refuses(PlanForm::kMerge).find("form 2 groups of different kinds or shapes") != std::string::npos);
  CHECK(mixed->refuses(PlanForm::kSoft).empty());
}
