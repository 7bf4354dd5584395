// What ffn_layer is made of: the activations' loops against the C library in double, and how pairs are cut into blocks.
#include "core/ffn_engine.h"
#include "core/row_loops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace moelab;

namespace {

double normal_below(double z) { return 0.5 * std::erfc(-z / std::sqrt(2.0)); }
double normal_density(double z) { return std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0)); }
double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

std::vector<float> from_to(float first, float last, int count) {
  std::vector<float> all;
  for (int i = 0; i < count; ++i) all.push_back(first + (last - first) * static_cast<float>(i) / static_cast<float>(count - 1));
  return all;
}

struct Both {
  std::vector<float> value, slope;
};

// Slopes by the gradient 1 and the gate 1; swiglu with up = 1, where the value is silu.
Both activated(FfnActivation activation, const std::vector<float>& z) {
  const auto count = static_cast<int64_t>(z.size());
  const std::vector<float> ones(z.size(), 1);
  Both both{std::vector<float>(z.size()), ones};
  std::vector<float> again(z.size()), grad_up(z.size());
  activate_row(activation, z.data(), ones.data(), both.value.data(), count);
  activate_row_backward(activation, z.data(), ones.data(), 1.0f, again.data(), both.slope.data(), grad_up.data(), count);
  for (size_t i = 0; i < z.size(); ++i) CHECK((again[i] == both.value[i] || std::isnan(z[i])));
  return both;
}

FfnGroup group_of(int64_t first, int64_t experts) {
  return {.first = first, .in_EFD = at::empty({experts, 3, 2}), .out_EDF = {}};
}

}  // namespace

TEST_CASE("activations in float are those of the C library, to a few units of the last place") {
  const std::vector<float> z = from_to(-12, 12, 100001);
  const Both gelu = activated(FfnActivation::kGelu, z), silu = activated(FfnActivation::kSwiglu, z);
  for (size_t i = 0; i < z.size(); ++i) {
    const double x = z[i], scale = std::fmax(1.0, std::fabs(x)), s = sigmoid(x);
    const bool close = std::fabs(gelu.value[i] - x * normal_below(x)) <= 3e-7 * scale &&
                       std::fabs(gelu.slope[i] - normal_below(x) - x * normal_density(x)) <= 4e-7 &&
                       std::fabs(silu.value[i] - x * s) <= 3e-7 * scale &&
                       std::fabs(silu.slope[i] - s * (1 + x * (1 - s))) <= 1.2e-7 * (std::fabs(x) + 4);  // of 1 − s, times x
    if (!close) FAIL("at " << x << ": gelu " << gelu.value[i] << ", " << gelu.slope[i] << ", silu " << silu.value[i] << ", "
                           << silu.slope[i]);
  }
}

TEST_CASE("far from 0 activations are exact, and what is no number stays none") {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> z{-1e30f, -1000, -100, -6, 6, 100, 1000, 1e30f, infinity, std::nanf("")};
  const Both gelu = activated(FfnActivation::kGelu, z);
  for (size_t i = 0; i < 9; ++i) {
    CHECK(gelu.value[i] == (z[i] > 0 ? z[i] : 0));
    if (std::fabs(z[i]) >= 100 && z[i] != infinity) CHECK(gelu.slope[i] == (z[i] > 0 ? 1 : 0));
  }
  CHECK(std::isnan(gelu.value.back()));
  CHECK(std::isnan(gelu.slope.back()));
  const Both silu = activated(FfnActivation::kSwiglu, z);
  CHECK(silu.value[0] == 0);
  CHECK(silu.value[1] == 0);
  CHECK(silu.value[7] == 1e30f);
  CHECK(std::isnan(silu.value.back()));
}

TEST_CASE("blocks cover every pair once, follow each other, get shorter towards the end, and start short") {
  // Experts 0 to 4 in two groups; 2 is in neither, 3 has no pair.
  const Tensor offsets_E1 = at::tensor(std::vector<int64_t>{0, 5000, 5100, 5200, 5200, 9000});
  const std::vector<FfnBlock> blocks = ffn_blocks({group_of(0, 2), group_of(3, 2)}, offsets_E1, 1280, 256);
  const std::vector<int64_t> start{0, 5000, 5200}, end{5000, 5100, 9000};  // of experts 0, 1 and 4
  size_t expert = 0;
  int64_t next = 0;
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (next == end[expert]) next = start[++expert];
    CAPTURE(b, expert);
    CHECK(blocks[b].first == next);
    CHECK(blocks[b].before == (next == start[expert] ? -1 : static_cast<int64_t>(b) - 1));
    CHECK(blocks[b].in_group == next - (expert < 2 ? 0 : 5200));
    CHECK((blocks[b].rows >= 1 && blocks[b].rows <= 1280));
    CHECK(blocks[b].rows <= std::max<int64_t>(256, (9000 - next) / 4));
    if (next == start[expert] && next + blocks[b].rows < end[expert]) CHECK(blocks[b].rows <= 256);
    next += blocks[b].rows;
  }
  CHECK(expert == 2);
  CHECK(next == 9000);
  CHECK(ffn_blocks({group_of(0, 2)}, at::tensor(std::vector<int64_t>{0, 0, 0}), 1280, 256).empty());
}
