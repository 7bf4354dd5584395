// Losses as functions of additive statistics: sums over micro-batches are the sums of the whole, and the three scopes.
#include "tests/losses/plain_losses.h"

#include <ATen/ops/zeros.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <random>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinRel;

namespace {

constexpr int64_t kRows = 24, kExperts = 5, kChoices = 2;

// Seeded logits, noise scales and draws, float64; the generator's raw bits, since distributions differ between libraries.
Tensor seeded(uint64_t seed, double low, double high) {
  std::mt19937_64 bits(seed);
  Rows rows(kRows, std::vector<double>(kExperts));
  for (auto& row : rows)
    for (double& value : row) value = low + (high - low) * static_cast<double>(bits() >> 11) / 9007199254740992.0;
  return tensor_of(rows);
}

struct Batch {
  Tensor clean = seeded(1, -2, 2), std = seeded(2, .3, 1.3), draw = seeded(3, -1.5, 1.5);

  RouteOutput rows(int64_t from, int64_t to) const {
    return noisy_topk_decision(clean.slice(0, from, to), std.slice(0, from, to), draw.slice(0, from, to), kChoices);
  }
};

// Micro-batches below cut a sequence, which coverage compares as a whole; coverage_test.cpp has whole ones.
std::vector<std::unique_ptr<Loss>> all_losses() {
  std::vector<std::unique_ptr<Loss>> losses;
  for (const LossEntry& entry : Registry<LossEntry>::instance().all())
    if (entry.refuses({}).empty() && entry.name != "coverage") losses.push_back(make_loss(entry.name));
  losses.push_back(make_loss("balance", {{"counts", std::string("any_choice")}, {"layers", std::string("pooled")}}));
  losses.push_back(make_loss("load", {{"threshold", std::string("include_self")}}));
  return losses;
}

// Micro-batches of unequal size, one of them empty.
const std::vector<int64_t> kCuts = {0, 5, 5, 17, 24};

LossStatistics micro_statistics(const Loss& loss, const Batch& batch, size_t micro) {
  const BareRouter router;
  const RouteOutput out = batch.rows(kCuts[micro], kCuts[micro + 1]);
  const RouteInput in = input_of(kCuts[micro + 1] - kCuts[micro]);
  return collect_statistics(loss, LossScope::kStep, {in, out, router, kExperts}).front();
}

LossStatistics summed(const Loss& loss, const Batch& batch) {
  LossStatistics total = micro_statistics(loss, batch, 0);
  for (size_t micro = 1; micro + 1 < kCuts.size(); ++micro) {
    const LossStatistics part = micro_statistics(loss, batch, micro);
    for (size_t i = 0; i < part.sums.size(); ++i) total.sums[i] = total.sums[i].add(part.sums[i]);
    total.rows += part.rows;
  }
  return total;
}

}  // namespace

TEST_CASE("Statistics of micro-batches sum to those of the whole batch, and so does the value") {
  const Batch batch;
  const BareRouter router;
  const RouteOutput out = batch.rows(0, kRows);
  const RouteInput in = input_of(kRows);
  for (const auto& loss : all_losses()) {
    const LossStatistics whole = collect_statistics(*loss, LossScope::kStep, {in, out, router, kExperts}).front();
    const LossStatistics parts = summed(*loss, batch);
    CHECK(parts.rows == whole.rows);
    for (size_t i = 0; i < whole.sums.size(); ++i) CHECK(relative_error(parts.sums[i], whole.sums[i]) < 1e-13);
    CHECK(relative_error(loss->value(parts, router), loss->value(whole, router)) < 1e-12);
  }
}

TEST_CASE("Σ over micro-batches of ⟨∂value/∂S, S_m⟩ has the gradient of value(Σ S_m)") {
  const BareRouter router;
  for (const auto& loss : all_losses()) {
    Batch whole, parts;
    whole.clean.requires_grad_(true), parts.clean.requires_grad_(true);
    value_of(*loss, input_of(kRows), whole.rows(0, kRows), kExperts).backward();
    const std::vector<Tensor> gradient = statistics_gradient(*loss, summed(*loss, parts), router);
    CHECK_FALSE(parts.clean.grad().defined());
    for (size_t micro = 0; micro + 1 < kCuts.size(); ++micro)
      inner_product(gradient, micro_statistics(*loss, parts, micro)).backward();
    CHECK(relative_error(parts.clean.grad(), whole.clean.grad()) < 1e-12);
  }
}

TEST_CASE("The gradient at the total is found without a surrounding graph, and is zero for what value() ignores") {
  class FirstOnly : public Loss {
    std::vector<Tensor> row_statistics(const LossInput&) const override { return {}; }
    Tensor value(const LossStatistics& s, const Router&) const override { return s.sums[0].square().sum(); }
    Landmarks landmarks(int64_t, int64_t) const override { return {0, 0}; }
  };
  const BareRouter router;
  const LossStatistics total{{tensor_of({{1, 2}}), tensor_of({{3}})}, 4};
  const std::vector<Tensor> gradient = statistics_gradient(FirstOnly(), total, router);
  CHECK(relative_error(gradient[0], tensor_of({{2, 4}})) == 0);
  CHECK(gradient[1].item<double>() == 0);
  CHECK(inner_product({}, {}).item<double>() == 0);
}

TEST_CASE("The gradient at the total leaves the .grad of router parameters alone") {
  struct Reader : Loss {
    Tensor weight = tensor_of({{2}}).requires_grad_(true);
    std::vector<Tensor> row_statistics(const LossInput&) const override { return {}; }
    Tensor value(const LossStatistics& s, const Router&) const override { return s.sums[0].mul(weight).sum(); }
    Landmarks landmarks(int64_t, int64_t) const override { return {0, 0}; }
  };
  const Reader reader;
  const BareRouter router;
  CHECK(statistics_gradient(reader, {{tensor_of({{5}})}, 1}, router)[0].item<double>() == 2);
  CHECK_FALSE(reader.weight.grad().defined());
}

TEST_CASE("Scope sequence averages the values of interleaved sequences by their rows and skips empty ones") {
  std::vector<int64_t> sequence(kRows);
  for (int64_t t = 0; t < kRows; ++t) sequence[t] = t % 5 == 0 ? 3 : t % 3;  // 0, 1, 2, 3 interleaved
  sequence.back() = 5;                                                       // 4 has no row
  const Batch batch;
  const BareRouter router;
  const RouteInput in = input_of(kRows, sequence);
  const RouteOutput out = batch.rows(0, kRows);
  for (auto& loss : all_losses()) {
    double expected = 0;
    for (int64_t b = 0; b < 6; ++b) {
      const Tensor rows = in.sequence_T.eq(b).nonzero().squeeze(1);
      if (rows.numel() == 0) continue;
      const RouteOutput one = noisy_topk_decision(batch.clean.index_select(0, rows), batch.std.index_select(0, rows),
                                                  batch.draw.index_select(0, rows), kChoices);
      expected += value_of(*loss, input_of(rows.numel()), one, kExperts).item<double>() * rows.numel() / kRows;
    }
    const auto sequences = collect_statistics(*loss, LossScope::kSequence, {in, out, router, kExperts});
    CHECK(sequences.size() == 5);
    const LossTerm term{std::move(loss), "x", 1, LossScope::kSequence};
    CHECK_THAT(local_value(term, sequences, router).item<double>(), WithinRel(expected, 1e-12));
  }
}

TEST_CASE("A micro-batch of one sequence has the same value in all three scopes") {
  const Batch batch;
  const BareRouter router;
  const RouteInput in = input_of(kRows);
  const RouteOutput out = batch.rows(0, kRows);
  for (const auto& loss : all_losses()) {
    std::vector<double> values;
    for (const LossScope scope : {LossScope::kMicro, LossScope::kSequence, LossScope::kStep}) {
      const auto statistics = collect_statistics(*loss, scope, {in, out, router, kExperts});
      REQUIRE(statistics.size() == 1);
      values.push_back(loss->value(statistics.front(), router).item<double>());
    }
    CHECK(values[0] == values[2]);
    CHECK_THAT(values[1], WithinRel(values[0], 1e-12));
  }
}
