// Gradients of the losses against finite differences in float64, and the places where a formula could divide by zero.
#include "tests/losses/plain_losses.h"

#include <ATen/ops/full_like.h>
#include <ATen/ops/zeros.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <limits>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinAbs;

namespace {

const Rows kClean = {{.9, .1, -.4, .3}, {-.2, 1.4, .8, 0}, {.5, .4, -1.1, 1.7}, {.2, -.6, .7, .1}, {1.2, .3, .6, -.9}};
const Rows kStd = {{.7, .5, .9, .4}, {1.1, .6, .8, .5}, {.3, .9, .7, 1.2}, {.6, .8, .5, .7}, {.9, .4, 1, .6}};
const Rows kDraw = {{.4, -1.2, .3, .8}, {1.5, -.1, .2, -.7}, {-.9, .6, 1.1, .2}, {.1, .9, -.3, -1.4}, {-.5, .2, 1.3, .7}};

struct Case {
  std::string loss;
  std::vector<Setting> settings;
};

const std::vector<Case> kCases = {
    {"balance", {}},
    {"balance", {{"counts", std::string("any_choice")}, {"divide_by_k", true}}},
    {"balance", {{"probabilities", std::string("noisy")}}},
    {"importance", {}},
    {"importance", {{"of", std::string("probabilities")}, {"variance", std::string("sample")}}},
    {"load", {}},
    {"load", {{"threshold", std::string("include_self")}}},
    {"z", {}},
    {"entropy", {}},
};

Tensor noisy_value(const Loss& loss, const Tensor& clean_TE, const Tensor& std_TE) {
  return value_of(loss, input_of(5), noisy_topk_decision(clean_TE, std_TE, tensor_of(kDraw), 2), 4);
}

bool finite(const Tensor& tensor) { return tensor.isfinite().all().item<bool>(); }

}  // namespace

TEST_CASE("Every loss has the gradient of its finite differences, in clean logits and noise scale") {
  for (const Case& one : kCases) {
    CAPTURE(one.loss, one.settings.size());
    const auto loss = make_loss(one.loss, one.settings);
    const Tensor clean = tensor_of(kClean).requires_grad_(true), std = tensor_of(kStd).requires_grad_(true);
    noisy_value(*loss, clean, std).backward();
    const auto by_clean = [&](const Tensor& x) { return noisy_value(*loss, x, std).item<double>(); };
    const auto by_std = [&](const Tensor& x) { return noisy_value(*loss, clean, x).item<double>(); };
    CHECK(relative_error(clean.grad(), finite_differences(by_clean, clean)) < 1e-7);
    if (std.grad().defined()) CHECK(relative_error(std.grad(), finite_differences(by_std, std)) < 1e-7);
    else CHECK(finite_differences(by_std, std).abs().max().item<double>() == 0);
  }
}

TEST_CASE("The balance loss sends no gradient through the shares of rows") {
  const auto loss = make_loss("balance");
  const BareRouter router;
  const Tensor clean = tensor_of(kClean).requires_grad_(true);
  const RouteOutput out = noisy_topk_decision(clean, {}, {}, 2);
  const auto rows = loss->row_statistics({input_of(5), out, router, 4});
  CHECK_FALSE(rows[0].requires_grad());
  CHECK(rows[1].requires_grad());
}

TEST_CASE("Load counts choices, without gradient, in evaluation, without noise and at k = E") {
  const Tensor clean = tensor_of(kClean).requires_grad_(true), std = tensor_of(kStd).requires_grad_(true);
  const auto loss = make_loss("load");
  const auto counted = [&](Mode mode, const Tensor& noise, int64_t k) {
    const RouteOutput out = noisy_topk_decision(clean, noise, tensor_of(kDraw), k);
    const Tensor value = value_of(*loss, input_of(5, {}, mode), out, 4);
    CHECK_FALSE(value.requires_grad());
    std::vector<double> counts(4);
    for (const auto& row : rows_of(out.assignment.choice_TK))
      for (double e : row) counts[static_cast<size_t>(e)] += 1;
    CHECK_THAT(value.item<double>(), WithinAbs(plain_cv2(counts), 1e-12));
  };
  counted(Mode::kEval, std, 2);
  counted(Mode::kDecode, std, 2);
  counted(Mode::kTrain, {}, 2);
  counted(Mode::kTrain, std, 4);
}

TEST_CASE("CV² is 0 with a finite gradient of 0 for an all-zero vector and for one expert") {
  const BareRouter router;
  for (const char* variance : {"population", "sample"}) {
    const auto loss = make_loss("importance", {{"variance", std::string(variance)}});
    for (const Rows& sums : {Rows{{0, 0, 0}}, Rows{{5}}, Rows{{0}}}) {
      const Tensor sums_E = tensor_of(sums).squeeze(0).requires_grad_(true);
      const Tensor value = loss->value({{sums_E}, 3}, router);
      value.backward();
      CHECK(value.item<double>() == 0);
      CHECK(sums_E.grad().abs().max().item<double>() == 0);
    }
  }
}

TEST_CASE("CV² of float32 sums far below 1 keeps its value") {
  const BareRouter router;
  const Tensor tiny_E = tensor_of({{1e-30, 3e-30}}).squeeze(0).to(at::kFloat);
  CHECK_THAT(make_loss("importance")->value({{tiny_E}, 2}, router).item<double>(), WithinAbs(0.25, 1e-6));
}

TEST_CASE("Without rows every loss is 0 and still on the graph") {
  for (const Case& one : kCases)
    for (const LossScope scope : {LossScope::kMicro, LossScope::kSequence, LossScope::kStep}) {
      CAPTURE(one.loss, one.settings.size());
      const LossTerm term{make_loss(one.loss, one.settings), one.loss, 1, scope};
      const Tensor clean = at::zeros({0, 4}, at::kDouble).requires_grad_(true);
      const RouteOutput out = noisy_topk_decision(clean, at::full_like(clean.detach(), 1), clean.detach(), 2);
      const BareRouter router;
      const RouteInput in = input_of(0);
      const Tensor value = local_value(term, collect_statistics(*term.loss, scope, {in, out, router, 4}), router);
      CHECK(value.numel() == 1);
      CHECK(value.item<double>() == 0);
      REQUIRE(value.requires_grad());
      value.backward();
      CHECK(clean.grad().defined());
    }
}

TEST_CASE("Certain rows have entropy 0 and a finite gradient, also where softmax underflows") {
  const Tensor logits = tensor_of({{0, 2000, -2000}, {0, 0, 0}}).requires_grad_(true);
  const Tensor value = value_of(*make_loss("entropy"), input_of(2), noisy_topk_decision(logits, {}, {}, 1), 3);
  value.backward();
  CHECK_THAT(value.item<double>(), WithinAbs(std::log(3.0) / 2, 1e-12));
  CHECK(finite(logits.grad()));
}

TEST_CASE("Load stays finite where the learned noise has all but vanished, in float32 too") {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble})
    for (const double noise : {0.0, 1e-40, 1e-20}) {
      const Tensor clean = tensor_of(kClean).to(dtype).requires_grad_(true);
      const Tensor std = at::full_like(clean.detach(), noise).requires_grad_(true);
      const RouteOutput out = noisy_topk_decision(clean, std, tensor_of(kDraw).to(dtype), 2);
      value_of(*make_loss("load"), input_of(5), out, 4).backward();
      CHECK(finite(clean.grad()));
      CHECK(finite(std.grad()));
    }
}
