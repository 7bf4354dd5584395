// Probe: a loss of scope `step` is exact. Four micro-batches on each of two ranks give the value and the router gradient of
// one big batch: a first sweep sums the statistics, a second one adds ⟨∂value/∂S, S_m⟩ to each micro-batch's backward.
#include "core/comm.h"
#include "tests/support/decisions.h"

#include <ATen/core/grad_mode.h>

#include <catch2/catch_test_macros.hpp>

#include <random>

using namespace moelab;
using namespace moelab::test;

namespace {

constexpr int kRanks = 2, kMicro = 4;
constexpr int64_t kScopeWidth = 3, kScopeExperts = 4;
const std::vector<int64_t> kCuts = {0, 4, 11, 11, 15, 20, 28, 29, 36};  // micro-batch m of rank r is the (4r + m)th

Tensor seeded(uint64_t seed, int64_t rows, int64_t columns) {
  std::mt19937_64 bits(seed);
  Rows values(rows, std::vector<double>(columns));
  for (auto& row : values)
    for (double& value : row) value = static_cast<double>(bits() >> 11) / 4503599627370496.0 - 1;
  return tensor_of(values);
}

// One layer's rows and the weights of noisy top-k gating over them.
struct Problem {
  Tensor x_TD = seeded(1, kCuts.back(), kScopeWidth), draw_TE = seeded(2, kCuts.back(), kScopeExperts);
  Tensor weight_ED = seeded(3, kScopeExperts, kScopeWidth).requires_grad_(true);
  Tensor noise_weight_ED = seeded(4, kScopeExperts, kScopeWidth).requires_grad_(true);

  RouteOutput route(int64_t from, int64_t to) const {
    const Tensor x = x_TD.slice(0, from, to);
    const Tensor std_TE = x.matmul(noise_weight_ED.t()).exp().log1p();  // softplus
    return noisy_topk_decision(x.matmul(weight_ED.t()), std_TE, draw_TE.slice(0, from, to), 2);
  }

  LossStatistics statistics(const Loss& loss, int64_t from, int64_t to) const {
    const BareRouter router;
    const RouteInput in = input_of(to - from);
    const RouteOutput out = route(from, to);
    return collect_statistics(loss, LossScope::kStep, {in, out, router, kScopeExperts}).front();
  }
};

LossStatistics first_sweep(const Loss& loss, const Problem& problem, Comm& comm) {
  const at::NoGradGuard no_grad;
  LossStatistics total;
  for (int m = 0; m < kMicro; ++m) {
    const int part = comm.rank() * kMicro + m;
    const LossStatistics one = problem.statistics(loss, kCuts[part], kCuts[part + 1]);
    if (m == 0) total = one;
    for (size_t i = 0; m > 0 && i < one.sums.size(); ++i) total.sums[i].add_(one.sums[i]);
    total.rows += m > 0 ? one.rows : 0;
  }
  const Tensor rows = tensor_of({{static_cast<double>(total.rows)}});
  comm.all_reduce(rows);
  for (const Tensor& sum : total.sums) comm.all_reduce(sum);
  total.rows = static_cast<int64_t>(rows.item<double>());
  return total;
}

struct ScopeOutcome {
  double value = 0;
  Tensor weight_grad, noise_grad;
};

Tensor gradient_or_zero(const Tensor& parameter) {
  return parameter.grad().defined() ? parameter.grad() : parameter.detach().mul(0);
}

ScopeOutcome in_parts(const Loss& loss, Comm& comm) {
  const Problem problem;
  const BareRouter router;
  const LossStatistics total = first_sweep(loss, problem, comm);
  const std::vector<Tensor> gradient = statistics_gradient(loss, total, router);
  for (int m = 0; m < kMicro; ++m) {
    const int part = comm.rank() * kMicro + m;
    inner_product(gradient, problem.statistics(loss, kCuts[part], kCuts[part + 1])).backward();
  }
  ScopeOutcome outcome{loss.value(total, router).item<double>(), gradient_or_zero(problem.weight_ED),
                  gradient_or_zero(problem.noise_weight_ED)};
  comm.all_reduce(outcome.weight_grad);
  comm.all_reduce(outcome.noise_grad);
  return outcome;
}

ScopeOutcome in_one(const Loss& loss) {
  const Problem problem;
  const BareRouter router;
  const Tensor value = loss.value(problem.statistics(loss, 0, kCuts.back()), router);
  value.backward();
  return {value.item<double>(), gradient_or_zero(problem.weight_ED), gradient_or_zero(problem.noise_weight_ED)};
}

}  // namespace

TEST_CASE("Step-scope losses over 4 micro-batches × 2 ranks equal one big batch, values and gradients") {
  for (const char* name : {"balance", "importance", "load", "z", "entropy"}) {
    CAPTURE(name);
    const auto loss = make_loss(name);
    const ScopeOutcome whole = in_one(*loss);
    std::vector<ScopeOutcome> ranks(kRanks);
    run_on_threads(kRanks, [&](std::shared_ptr<Comm> comm) { ranks[comm->rank()] = in_parts(*loss, *comm); });
    REQUIRE(whole.weight_grad.abs().max().item<double>() > 0);
    for (const ScopeOutcome& rank : ranks) {
      CHECK(std::abs(rank.value - whole.value) <= 1e-12 * std::abs(whole.value));
      CHECK(relative_error(rank.weight_grad, whole.weight_grad) < 1e-12);
      CHECK(relative_error(rank.noise_grad, whole.noise_grad) < 1e-12);
    }
  }
}
