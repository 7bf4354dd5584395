// route with unequal experts, several kinds and residual shared experts: names, values by plain loops, gradients by differences.
#include "core/io/safetensors.h"
#include "route_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moelab::testing {
namespace {

using oracle::Array;
using oracle::Arrays;

constexpr int64_t kRows = 7, kWidth = 4, kExperts = 6;

const char* const kMixedLayer = R"(
[moe]
experts = 6
losses = "none"
[moe.router]
name = "softmax_topk"
k = 3
[moe.expert]
activation = "gelu"
[[moe.expert.group]]
width = 3
count = 2
[[moe.expert.group]]
width = 2
[[moe.expert.group]]
name = "constant"
[[moe.expert.group]]
name = "zero"
[[moe.expert.group]]
name = "identity"
[moe.shared]
count = 1
width = 5
residual = true
)";

Arrays mixed_inputs() {
  std::mt19937_64 random(3);
  std::normal_distribution<double> draw(0, 0.7);
  Arrays arrays;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    Array array{std::move(shape), {}};
    for (int64_t i = 0; i < count; ++i) array.value.push_back(draw(random));
    arrays[name] = std::move(array);
  };
  for (const char* name : {"x", "grad_y"}) add(name, {kRows, kWidth});
  add("router.weight", {kExperts, kWidth});
  for (const auto& [expert, width] : std::vector<std::pair<std::string, int64_t>>{{"0", 3}, {"1", 3}, {"2", 2}}) {
    add("experts." + expert + ".w_in", {width, kWidth});
    add("experts." + expert + ".w_out", {kWidth, width});
  }
  add("experts.3.w_mix", {2, kWidth});
  add("experts.3.v", {kWidth});
  add("shared.w_in", {1, 5, kWidth});
  add("shared.w_out", {1, kWidth, 5});
  add("shared.coefficient_weight", {2, kWidth});
  return arrays;
}

// weight·x of a matrix with x.size() columns.
std::vector<double> times(const Array& weight, const std::vector<double>& x) {
  std::vector<double> y(weight.value.size() / x.size(), 0.0);
  for (size_t i = 0; i < weight.value.size(); ++i) y[i / x.size()] += weight.value[i] * x[i % x.size()];
  return y;
}

std::vector<double> softmax_of(std::vector<double> z) {
  double sum = 0;
  for (double& v : z) sum += v = std::exp(v);
  for (double& v : z) v /= sum;
  return z;
}

std::vector<double> gelu_expert(const Arrays& in, const std::string& name, const std::vector<double>& x) {
  std::vector<double> h = times(in.at(name + ".w_in"), x);
  for (double& v : h) v *= 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
  return times(in.at(name + ".w_out"), h);
}

std::vector<double> expert_row(const Arrays& in, int64_t expert, const std::vector<double>& x) {
  if (expert < 3) return gelu_expert(in, "experts." + std::to_string(expert), x);
  if (expert == 5) return x;
  std::vector<double> y(x.size(), 0.0);
  if (expert == 4) return y;
  const std::vector<double> a = softmax_of(times(in.at("experts.3.w_mix"), x));
  for (size_t d = 0; d < x.size(); ++d) y[d] = a[0] * x[d] + a[1] * in.at("experts.3.v").value[d];
  return y;
}

std::vector<double> layer_rows(const Arrays& in) {
  std::vector<double> all;
  for (int64_t t = 0; t < kRows; ++t) {
    const std::vector<double> x(in.at("x").value.begin() + t * kWidth, in.at("x").value.begin() + (t + 1) * kWidth);
    const std::vector<double> p = softmax_of(times(in.at("router.weight"), x)),
                              c = softmax_of(times(in.at("shared.coefficient_weight"), x));
    std::vector<int64_t> order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p[a] > p[b]; });
    double chosen = 0;
    for (int64_t j = 0; j < 3; ++j) chosen += p[order[j]];
    const std::vector<double> shared = gelu_expert(in, "shared", x);
    std::vector<double> routed(kWidth, 0.0);
    for (int64_t j = 0; j < 3; ++j) {
      const std::vector<double> y = expert_row(in, order[j], x);
      for (int64_t d = 0; d < kWidth; ++d) routed[d] += p[order[j]] * y[d];
    }
    for (int64_t d = 0; d < kWidth; ++d) all.push_back(c[0] * routed[d] + c[1] * shared[d]);
  }
  return all;
}

double objective_of(const Arrays& in) {
  const std::vector<double> y = layer_rows(in);
  return std::inner_product(y.begin(), y.end(), in.at("grad_y").value.begin(), 0.0);
}

RouteRun run_mixed(const Arrays& arrays) {
  const RouteFolder folder;
  folder.write("exp.toml", kMixedLayer);
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays));
  return folder.run("--grad");
}

}  // namespace

TEST_CASE("route names unequal experts one by one, and its output and gradients are those of plain loops") {
  const Arrays in = mixed_inputs();
  const RouteRun run = run_mixed(in);
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  const std::vector<double> y = numbers(run.tensors.at("y")), expected = layer_rows(in);
  REQUIRE(y.size() == expected.size());
  for (size_t i = 0; i < y.size(); ++i) CHECK(std::abs(y[i] - expected[i]) < 1e-10);
  for (const auto& [name, array] : in) {
    if (name == "grad_y") continue;
    CAPTURE(name);
    REQUIRE(run.tensors.count("grad." + name) == 1);
    const Tensor gradient = run.tensors.at("grad." + name);
    CHECK(gradient.sizes() == at::IntArrayRef(array.shape));
    if (name != "x") CHECK(numbers(run.tensors.at(name)) == array.value);
    for (size_t i = 0; i < array.value.size(); ++i) {
      Arrays up = in, down = in;
      up.at(name).value[i] += 1e-5;
      down.at(name).value[i] -= 1e-5;
      CHECK(std::abs(numbers(gradient)[i] - (objective_of(up) - objective_of(down)) / 2e-5) < 1e-7);
    }
  }
}

TEST_CASE("names of the stacked form are unknown where experts are unequal") {
  Arrays in = mixed_inputs();
  in["experts.w_in"] = {{6, 3, 4}, std::vector<double>(72, 0.0)};
  const RouteRun run = run_mixed(in);
  CHECK(run.code == 2);
  CHECK(run.err.find("unknown tensor 'experts.w_in'") != std::string::npos);
}

}  // namespace moelab::testing
