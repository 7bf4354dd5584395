// The skeleton of an expert.
#include "experiments/skeleton.h"

namespace moelab {
namespace {

constexpr const char* kExpertSource = R"cpp(// Title of the paper
// Authors, year, arXiv id
//
//   y = w · x                                   (write the equations here; w [D, D])
//
// Initial weights: N(0, 1/D); drawn per (parameter, expert), so that an expert starts the same whatever the number of the others.
//
// Differences from the paper: none known.
#include "core/error.h"
#include "core/expert.h"
#include "core/grouped.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <cmath>

namespace moelab {
namespace {

class @CLASS@Bank : public ExpertBank {
 public:
  explicit @CLASS@Bank(const ExpertSpec& spec) : width_(spec.width), first_(spec.first), scale_(spec.output_scale) {
    w_EDD_ = add_parameter("w", at::empty({spec.experts, width_, width_}, spec.dtype));
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {{"w", w_EDD_}}});
    for (int64_t e = 0; e < spec.experts; ++e) reset_expert(e, spec.init);
  }

  // All rows at once, grouped by expert: grouped_linear() does one product per expert that has rows, and gives the others a
  // gradient of zero. experts/ffn.cpp is the plainest example.
  Tensor forward(const ExpertContext&, int) const override {
    usage_error("experts '@NAME@' have no formula yet: write the formula of @NAME@ in experts/@NAME@.cpp");
  }

  // The same for rows of one expert with the given parameters, in the order of `stacked`: what the reference executor and
  // merging routers use.
  Tensor forward_with(const std::vector<Tensor>&, const Tensor&) const override {
    usage_error("experts '@NAME@' have no formula yet: write the formula of @NAME@ in experts/@NAME@.cpp");
  }
  bool has_forward_with() const override { return true; }

  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return 2.0 * static_cast<double>(width_ * width_); }  // of its matrix products

  void reset_expert(int64_t expert, RandomKey key) override {
    const at::NoGradGuard no_grad;
    Tensor w_DD = w_EDD_.select(0, expert);
    const double std = scale_ / std::sqrt(static_cast<double>(width_));
    w_DD.copy_(normal_tensor(key.with("w", first_ + expert), w_DD.sizes(), std, w_DD.scalar_type()));
  }

 private:
  int64_t width_, first_;
  double scale_;
  Tensor w_EDD_;
};

const Registration<ExpertEntry> registration_@NAME@{{
    .name = "@NAME@",
    .title = "@NAME@: one line that says what they do",
    .citation = "authors, year, arXiv id",
    .equation = "y = w·x",
    .make = [](ExpertSpec spec) { return std::make_unique<@CLASS@Bank>(spec); },
}};

}  // namespace
}  // namespace moelab
)cpp";

constexpr const char* kExpertTest =
    R"cpp(// One case of experts '@NAME@' worked by hand. Fill in what the paper's equations give for it.
#include "core/expert.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>

namespace moelab {
namespace {

// What the second expert makes of the row below.
constexpr double k@CLASS@First = -1;   // fill in
constexpr double k@CLASS@Second = -1;  // fill in

// Two experts of width 2. The second has w = [[1, 2], [3, 4]], and gets the row (3, -1).
Tensor worked_row_of_@NAME@() {
  ExpertSpec spec;
  spec.width = spec.experts = 2;
  spec.dtype = at::kDouble;
  spec.options = Options(Registry<ExpertEntry>::instance().find("@NAME@").options);
  const std::unique_ptr<ExpertBank> bank = make_experts("@NAME@", spec);
  const at::NoGradGuard no_grad;
  bank->parameters_of(1)[0].copy_(at::tensor({1.0, 2.0, 3.0, 4.0}, at::kDouble).view({2, 2}));
  const Tensor row_1D = at::tensor({3.0, -1.0}, at::kDouble).view({1, 2});
  return bank->forward({.rows_ND = row_1D, .offsets_E1 = at::tensor({0, 0, 1}, at::kLong)}, 0);
}

TEST_CASE("@NAME@ computes the worked row") {
  const Tensor y_1D = worked_row_of_@NAME@();
  CHECK(y_1D[0][0].item<double>() == Catch::Approx(k@CLASS@First).epsilon(1e-4));
  CHECK(y_1D[0][1].item<double>() == Catch::Approx(k@CLASS@Second).epsilon(1e-4));
}

}  // namespace
}  // namespace moelab
)cpp";

constexpr const char* kExpertExperiment =
    R"toml(# Experts @NAME@ in a model that trains in seconds: moelab run experiments/experts/@NAME@.toml
extends = "../base/lm_tiny.toml"
name = "@NAME@"

[moe.expert]
name = "@NAME@"
)toml";

}  // namespace

std::vector<SkeletonFile> expert_skeleton(const std::string& name) {
  return {{"experts/" + name + ".cpp", filled_in(kExpertSource, name)},
          {"tests/experts/" + name + "_test.cpp", filled_in(kExpertTest, name)},
          {"experiments/experts/" + name + ".toml", filled_in(kExpertExperiment, name)}};
}

}  // namespace moelab
