// Feed-forward banks: formulas by plain loops, parameters, surgery, merging.
#include "core/error.h"
#include "core/expert.h"
#include "core/grouped.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

double plain_activation(const std::string& name, double x) {
  if (name == "relu") return x > 0 ? x : 0;
  if (name == "gelu") return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  if (name == "gelu_tanh") return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return x / (1 + std::exp(-x));  // silu
}

std::vector<double> plain_linear(const Tensor& weight_OI, const Tensor& bias_O, const std::vector<double>& x) {
  std::vector<double> y;
  for (int64_t o = 0; o < weight_OI.size(0); ++o) {
    y.push_back(bias_O.defined() ? bias_O[o].item<double>() : 0);
    for (size_t i = 0; i < x.size(); ++i) y.back() += weight_OI[o][static_cast<int64_t>(i)].item<double>() * x[i];
  }
  return y;
}

// Parameters in the order of the contract: (w, b) of in, out, or of gate, up, down.
std::vector<double> plain_ffn(const std::string& activation, const std::vector<Tensor>& p, bool bias,
                              const std::vector<double>& x) {
  const auto linear = [&](size_t map, const std::vector<double>& in) {
    return plain_linear(p[map * (bias ? 2 : 1)], bias ? p[map * 2 + 1] : Tensor(), in);
  };
  std::vector<double> hidden = linear(0, x);
  for (double& h : hidden) h = plain_activation(activation, h);
  if (activation != "swiglu") return linear(1, hidden);
  const std::vector<double> up = linear(1, x);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] *= up[i];
  return linear(2, hidden);
}

ExpertContext rows_in_blocks(const Tensor& rows_ND, std::vector<int64_t> offsets) {
  return {.rows_ND = rows_ND, .offsets_E1 = at::tensor(offsets, at::kLong)};
}

}  // namespace

TEST_CASE("every activation, with and without biases, is its formula") {
  std::mt19937_64 draw(1);
  for (const std::string activation : {"relu", "gelu", "gelu_tanh", "swiglu"})
    for (const bool bias : {false, true}) {
      const auto bank = ffn_bank(3, 3, 4, activation, bias, at::kDouble);
      const Tensor rows_ND = random_leaf(draw, {5, 3}, at::kDouble, false);
      const Tensor y_ND = bank->forward(rows_in_blocks(rows_ND, {0, 2, 2, 5}), 0);  // the second expert gets no row
      for (int64_t n = 0; n < 5; ++n) {
        const double* x = rows_ND.const_data_ptr<double>() + n * 3;
        const std::vector<double> y = plain_ffn(activation, bank->parameters_of(n < 2 ? 0 : 2), bias, {x, x + 3});
        CHECK(relative_error(y_ND[n], at::tensor(y, at::kDouble)) < 1e-12);
      }
    }
}

TEST_CASE("experts without rows get zero gradients, and so do all without any row") {
  for (const std::vector<int64_t>& offsets : {std::vector<int64_t>{0, 0, 2, 2}, std::vector<int64_t>{0, 0, 0, 0}}) {
    const auto bank = ffn_bank(3, 3, 4, "swiglu", true, at::kFloat);
    const Tensor rows_ND = at::ones({offsets.back(), 3}).requires_grad_();
    bank->forward(rows_in_blocks(rows_ND, offsets), 0).sum().backward();
    for (const NamedTensor& entry : bank->parameters()) {
      REQUIRE(entry.tensor.grad().defined());
      CHECK(entry.tensor.grad().select(0, 0).count_nonzero().item<int64_t>() == 0);
      CHECK(entry.tensor.grad().select(0, 2).count_nonzero().item<int64_t>() == 0);
    }
    CHECK(rows_ND.grad().sizes() == rows_ND.sizes());
  }
}

TEST_CASE("tensor names, shapes and counts are the contract's") {
  const auto plain = ffn_bank(3, 2, 5, "relu", true, at::kFloat)->parameters("experts.");
  REQUIRE(plain.size() == 4);
  CHECK((plain[0].name == "experts.w_in" && plain[0].tensor.sizes() == at::IntArrayRef({2, 5, 3})));
  CHECK((plain[1].name == "experts.b_in" && plain[1].tensor.sizes() == at::IntArrayRef({2, 5})));
  CHECK((plain[2].name == "experts.w_out" && plain[2].tensor.sizes() == at::IntArrayRef({2, 3, 5})));
  CHECK((plain[3].name == "experts.b_out" && plain[3].tensor.sizes() == at::IntArrayRef({2, 3})));
  const auto bank = ffn_bank(3, 2, 0, "swiglu", false, at::kFloat);  // width 0 means 4·D
  const auto gated = bank->parameters();
  REQUIRE(gated.size() == 3);
  CHECK((gated[0].name == "w_gate" && gated[1].name == "w_up" && gated[2].name == "w_down"));
  CHECK(gated[2].tensor.sizes() == at::IntArrayRef({2, 3, 12}));
  CHECK(bank->parameters_per_expert(1) == 3 * 3 * 12);
  CHECK(bank->flops_per_row(0) == 2 * 3 * 3 * 12);
}

TEST_CASE("an expert's initial weights do not depend on how many there are") {
  const auto small = ffn_bank(4, 2, 6, "gelu", false, at::kFloat), large = ffn_bank(4, 7, 6, "gelu", false, at::kFloat);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(at::equal(small->parameters_of(1)[i], large->parameters_of(1)[i]));
    CHECK_FALSE(at::equal(small->parameters_of(0)[i], small->parameters_of(1)[i]));
  }
}

TEST_CASE("permuting and permuting back is bitwise the identity, cloning copies one slice") {
  const auto bank = ffn_bank(3, 4, 5, "swiglu", true, at::kFloat);
  std::vector<Tensor> before;
  for (const NamedTensor& entry : bank->parameters()) before.push_back(entry.tensor.detach().clone());
  bank->permute({2, 0, 3, 1});
  CHECK(at::equal(bank->parameters()[0].tensor.select(0, 0), before[0].select(0, 2)));
  bank->permute({1, 3, 0, 2});  // the inverse
  for (size_t i = 0; i < before.size(); ++i) CHECK(at::equal(bank->parameters()[i].tensor, before[i]));
  bank->clone_expert(3, 1);
  for (size_t i = 0; i < before.size(); ++i) {
    CHECK(at::equal(bank->parameters()[i].tensor.select(0, 1), before[i].select(0, 3)));
    CHECK(at::equal(bank->parameters()[i].tensor.select(0, 0), before[i].select(0, 0)));
  }
  CHECK_THROWS_AS(bank->permute({0, 0, 1, 2}), Error);
  CHECK_THROWS_AS(bank->parameters_of(4), Error);
}

TEST_CASE("merging with a one-hot row gives that expert") {
  const auto bank = ffn_bank(3, 3, 4, "gelu", true, at::kDouble);
  const auto merged = bank->merge(at::tensor({0.0, 1.0, 0.0}, at::kDouble));
  for (size_t i = 0; i < merged.size(); ++i) CHECK(at::equal(merged[i], bank->parameters_of(1)[i]));
}

TEST_CASE("autocast runs the experts in bfloat16 and gives float gradients") {
  const auto bank = ffn_bank(8, 2, 8, "relu", true, at::kFloat);
  std::mt19937_64 draw(2);
  const Tensor rows_ND = random_leaf(draw, {6, 8}, at::kFloat);
  const Tensor exact = bank->forward(rows_in_blocks(rows_ND, {0, 3, 6}), 0).detach();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const Tensor y_ND = bank->forward(rows_in_blocks(rows_ND, {0, 3, 6}), 0);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  y_ND.sum().backward();
  CHECK(y_ND.scalar_type() == at::kBFloat16);
  CHECK(relative_error(y_ND, exact) < 0.05);
  CHECK(bank->parameters()[0].tensor.grad().scalar_type() == at::kFloat);
  CHECK(rows_ND.grad().scalar_type() == at::kFloat);
}

TEST_CASE("second derivatives and offsets that miss rows are refused") {
  const auto bank = ffn_bank(2, 2, 2, "gelu", false, at::kFloat);
  const Tensor rows_ND = at::ones({2, 2}).requires_grad_();
  CHECK_THROWS_AS(bank->forward(rows_in_blocks(rows_ND, {0, 1, 1}), 0), Error);
  const Tensor y = bank->forward(rows_in_blocks(rows_ND, {0, 1, 2}), 0).sum();
  CHECK_THROWS_AS(y.backward({}, true, true), Error);
}
