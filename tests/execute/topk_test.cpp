// The router's one pass against slow loops: ties, signed zeros, infinities, and counts around the sizes of its blocks.
#include "core/row_loops.h"
#include "core/select.h"
#include "tests/support/sparse_cases.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

using namespace moelab;
using namespace moelab::testing;

namespace {

const int64_t kCounts[] = {1, 15, 16, 17, 64, 100, 1024, 1025};
constexpr double kLow = -std::numeric_limits<double>::infinity();

// The largest not yet taken, the first of equal ones; −0 equals 0.
template <class Scalar>
std::vector<int64_t> slow_topk(const std::vector<Scalar>& row, int64_t k) {
  std::vector<bool> taken(row.size());
  std::vector<int64_t> best;
  for (int64_t i = 0; i < k; ++i) {
    int64_t at = -1;
    for (int64_t e = 0; e < static_cast<int64_t>(row.size()); ++e)
      if (!taken[static_cast<size_t>(e)] && (at < 0 || row[static_cast<size_t>(e)] > row[static_cast<size_t>(at)])) at = e;
    taken[static_cast<size_t>(at)] = true;
    best.push_back(at);
  }
  return best;
}

// By turns: all different; few values, so ties; zeros of both signs; −∞ among others; all −∞ but one; all −∞.
template <class Scalar>
std::vector<Scalar> row_of_kind(std::mt19937_64& draw, int kind, int64_t count) {
  std::vector<Scalar> row(static_cast<size_t>(count));
  std::normal_distribution<Scalar> normal;
  std::uniform_int_distribution<int> few(-2, 2);
  for (Scalar& value : row) {
    if (kind == 0) value = normal(draw);
    else if (kind == 1) value = static_cast<Scalar>(few(draw));
    else if (kind == 2) value = few(draw) > 0 ? Scalar(0) : -Scalar(0);
    else if (kind == 3) value = few(draw) > 0 ? static_cast<Scalar>(kLow) : normal(draw);
    else value = static_cast<Scalar>(kLow);
  }
  if (kind == 3) row.back() = Scalar(0.5);
  if (kind == 4) row[row.size() / 2] = 1;
  return row;
}

template <class Scalar>
void check_topk(int64_t count, const std::vector<int64_t>& ks) {
  std::mt19937_64 draw(static_cast<uint64_t>(count));
  for (int kind = 0; kind < 6; ++kind)
    for (int repeat = 0; repeat < 3; ++repeat) {
      const std::vector<Scalar> row = row_of_kind<Scalar>(draw, kind, count);
      const std::vector<int64_t> all = slow_topk(row, count);
      for (const int64_t k : ks) {
        std::vector<int64_t> best(static_cast<size_t>(k) + 1, -7);
        topk_of_row(row.data(), count, k, best.data());
        CAPTURE(count, k, kind);
        REQUIRE(std::equal(best.begin(), best.end() - 1, all.begin()));
        REQUIRE(best.back() == -7);  // nothing is written behind
      }
    }
}

// Every k of a short row; of a long one those at the ends and some between.
std::vector<int64_t> ks_of(int64_t count) {
  std::vector<int64_t> ks(static_cast<size_t>(count) + 1);
  std::iota(ks.begin(), ks.end(), 0);
  if (count > 100) ks = {0, 1, 2, 3, 8, 15, 16, 17, 100, count / 2, count - 1, count};
  return ks;
}

// softmax and its gradient of one row, in double.
struct SlowSoftmax {
  std::vector<double> probs, grad;
};
SlowSoftmax slow_softmax(const std::vector<double>& logits, const std::vector<double>& grad) {
  const double top = *std::max_element(logits.begin(), logits.end());
  SlowSoftmax out{std::vector<double>(logits.size()), std::vector<double>(logits.size())};
  double sum = 0, mean = 0;
  for (const double logit : logits) sum += std::exp(logit - top);
  for (size_t e = 0; e < logits.size(); ++e) out.probs[e] = std::exp(logits[e] - top) / sum;
  for (size_t e = 0; e < logits.size(); ++e) mean += out.probs[e] * grad[e];
  for (size_t e = 0; e < logits.size(); ++e) out.grad[e] = out.probs[e] * (grad[e] - mean);
  return out;
}

double largest_of(const std::vector<double>& values) {
  double largest = 0;
  for (const double value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

std::vector<double> row_values(const Tensor& tensor, int64_t row) {
  const Tensor values = tensor.detach().select(0, row).to(at::kDouble).contiguous();
  return {values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel()};
}

Tensor tensor_of_rows(std::mt19937_64& draw, int64_t count, at::ScalarType dtype) {
  std::vector<Tensor> rows;
  for (int kind = 0; kind < 5; ++kind) rows.push_back(at::tensor(row_of_kind<double>(draw, kind, count), at::kDouble));
  return at::stack(rows).to(dtype).requires_grad_();
}

void check_softmax_topk(int64_t count, int64_t k, at::ScalarType dtype) {
  std::mt19937_64 draw(static_cast<uint64_t>(count * 31 + k));
  const double tolerance = dtype == at::kDouble ? 1e-12 : 1e-6;
  const Tensor logits_TE = tensor_of_rows(draw, count, dtype);
  const Tensor grad_TE = random_leaf(draw, {5, count}, dtype, false), grad_TK = random_leaf(draw, {5, k}, dtype, false);
  const SoftmaxTopk out = softmax_topk(logits_TE, k);
  out.probs_TE.mul(grad_TE).sum().add(out.prob_TK.mul(grad_TK).sum()).backward();
  CAPTURE(count, k, at::toString(dtype));
  for (int64_t t = 0; t < 5; ++t) {
    const std::vector<int64_t> best = slow_topk(row_values(logits_TE, t), k);
    std::vector<double> grad = row_values(grad_TE, t);
    for (int64_t i = 0; i < k; ++i) grad[static_cast<size_t>(best[static_cast<size_t>(i)])] += grad_TK[t][i].item<double>();
    const SlowSoftmax slow = slow_softmax(row_values(logits_TE, t), grad);
    REQUIRE(at::equal(out.choice_TK[t], at::tensor(best, at::kLong)));
    REQUIRE(at::equal(out.prob_TK[t], out.probs_TE[t].index_select(0, out.choice_TK[t])));
    REQUIRE(relative_error(out.probs_TE[t], at::tensor(slow.probs, at::kDouble)) <= tolerance);
    // Against the largest term of the sums: the gradient of a row that is all one value may cancel to nothing.
    const Tensor error = logits_TE.grad()[t].to(at::kDouble).sub(at::tensor(slow.grad, at::kDouble)).abs().max();
    REQUIRE(error.item<double>() <= 4 * tolerance * (1 + largest_of(grad)));
  }
}

}  // namespace

TEST_CASE("the k largest of a row are those of a slow loop, in its order, for every k") {
  for (const int64_t count : kCounts) {
    check_topk<float>(count, ks_of(count));
    check_topk<double>(count, ks_of(count));
  }
}

TEST_CASE("softmax and top-k in one pass are those of slow loops, forward and backward") {
  for (const int64_t count : kCounts)
    for (const int64_t k : {int64_t{0}, int64_t{1}, std::min<int64_t>(8, count), count})
      for (const at::ScalarType dtype : {at::kFloat, at::kDouble})
        if (count <= 100 || k <= 8) check_softmax_topk(count, k, dtype);
}

TEST_CASE("one pass takes no rows, and refuses a k that no row has") {
  const SoftmaxTopk none = softmax_topk(at::zeros({0, 4}, at::kFloat), 2);
  CHECK(none.choice_TK.sizes() == at::IntArrayRef({0, 2}));
  CHECK_THROWS(softmax_topk(at::zeros({2, 4}, at::kFloat), 5));
  CHECK_THROWS(softmax_topk(at::zeros({2, 4}, at::kFloat), -1));
}
