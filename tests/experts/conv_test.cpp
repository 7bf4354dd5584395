// Patch experts by plain loops, their class sums, and the rows they refuse.
#include "core/error.h"
#include "tests/experts/experts_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

double plain_act(const std::string& name, double z) {
  if (name == "linear") return z;
  if (name == "relu") return z > 0 ? z : 0;
  return name == "gelu" ? 0.5 * z * (1 + std::erf(z / std::sqrt(2.0))) : z * z * z;
}

// h of one row: the filters' activations summed over patches.
std::vector<double> plain_filters(const std::string& activation, const Tensor& w_Fd, const Tensor& b_F, const double* x,
                                  int64_t patches) {
  std::vector<double> h(static_cast<size_t>(w_Fd.size(0)), 0.0);
  for (int64_t p = 0; p < patches; ++p)
    for (int64_t f = 0; f < w_Fd.size(0); ++f) {
      double z = b_F.defined() ? b_F[f].item<double>() : 0;
      for (int64_t i = 0; i < w_Fd.size(1); ++i) z += w_Fd[f][i].item<double>() * x[p * w_Fd.size(1) + i];
      h[static_cast<size_t>(f)] += plain_act(activation, z);
    }
  return h;
}

}  // namespace

TEST_CASE("a patch expert is its formula: filters over patches, summed, then mapped out") {
  std::mt19937_64 draw(1);
  for (const std::string activation : {"cubic", "linear", "relu", "gelu"})
    for (const bool bias : {false, true}) {
      const auto bank =
          bank_of("conv", 6, 2, {{"activation", activation}, {"patches", int64_t{3}}, {"width", int64_t{4}}, {"bias", bias}});
      const Tensor rows_ND = random_leaf(draw, {3, 6}, at::kDouble, false);
      const Tensor y_ND = bank->forward({.rows_ND = rows_ND, .offsets_E1 = at::tensor({0, 1, 3}, at::kLong)}, 0);
      for (int64_t n = 0; n < 3; ++n) {
        const std::vector<Tensor> p = bank->parameters_of(n < 1 ? 0 : 1);
        const std::vector<double> h =
            plain_filters(activation, p[0], bias ? p[1] : Tensor(), rows_ND.const_data_ptr<double>() + n * 6, 3);
        for (int64_t d = 0; d < 6; ++d) {
          double y = 0;
          for (size_t f = 0; f < h.size(); ++f) y += p.back()[d][static_cast<int64_t>(f)].item<double>() * h[f];
          CHECK(std::abs(y_ND[n][d].item<double>() - y) < 1e-10);
        }
      }
    }
}

TEST_CASE("classes sum the filters of each class and leave the rest of the row at zero") {
  std::mt19937_64 draw(2);
  const auto bank = bank_of("conv", 6, 1, {{"patches", int64_t{2}}, {"width", int64_t{6}}, {"classes", int64_t{2}}});
  REQUIRE(bank->parameters().size() == 1);
  const Tensor rows_ND = random_leaf(draw, {2, 6}, at::kDouble, false);
  const Tensor y_ND = bank->forward({.rows_ND = rows_ND, .offsets_E1 = at::tensor({0, 2}, at::kLong)}, 0);
  for (int64_t n = 0; n < 2; ++n) {
    const std::vector<double> h =
        plain_filters("cubic", bank->parameters_of(0)[0], {}, rows_ND.const_data_ptr<double>() + n * 6, 2);
    CHECK(std::abs(y_ND[n][0].item<double>() - (h[0] + h[1] + h[2])) < 1e-10);
    CHECK(std::abs(y_ND[n][1].item<double>() - (h[3] + h[4] + h[5])) < 1e-10);
    CHECK(y_ND[n].slice(0, 2).count_nonzero().item<int64_t>() == 0);
  }
}

TEST_CASE("patches are interchangeable, as in a convolution that is summed") {
  std::mt19937_64 draw(3);
  const auto bank = bank_of("conv", 8, 1, {{"patches", int64_t{4}}});
  const Tensor rows_ND = random_leaf(draw, {5, 8}, at::kDouble, false), offsets_E1 = at::tensor({0, 5}, at::kLong);
  const Tensor moved_ND = rows_ND.view({5, 4, 2}).index_select(1, at::tensor({2, 0, 3, 1}, at::kLong)).reshape({5, 8});
  CHECK(relative_error(bank->forward({.rows_ND = moved_ND, .offsets_E1 = offsets_E1}, 0),
                       bank->forward({.rows_ND = rows_ND, .offsets_E1 = offsets_E1}, 0)) < 1e-12);
}

TEST_CASE("init_scale scales the start, and rows that cannot be cut are refused in one line") {
  const auto usual = bank_of("conv", 8, 2), small = bank_of("conv", 8, 2, {{"init_scale", 0.001}});
  CHECK(relative_error(small->parameters()[0].tensor, usual->parameters()[0].tensor.mul(0.001)) < 1e-12);
  const auto refusal = [](int64_t width, const GivenOptions& options) -> std::string {
    try {
      bank_of("conv", width, 1, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(refusal(6, {}) == "a row of width 6 cannot be cut into 4 patches; patches must divide the width");
  CHECK(refusal(8, {{"classes", int64_t{9}}}) == "9 classes do not fit a row of width 8");
  CHECK(refusal(8, {{"classes", int64_t{3}}}) == "16 filters cannot be shared by 3 classes; width must be a multiple of it");
}
