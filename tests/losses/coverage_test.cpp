// The coverage loss of Mesh TensorFlow's expert choice (routers.md 3.3): mean_t(ā_t²)·S_true·S for each group of S places, of
// which S_true are rows.
#include "core/select.h"
#include "tests/losses/plain_losses.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <map>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinAbs;

namespace {

RouteOutput decision_of_logits(const Tensor& noisy_TE, const Tensor& clean_TE = {}) {
  Scores scores;
  scores.noisy_TE = noisy_TE;
  scores.clean_TE = clean_TE.defined() ? clean_TE : noisy_TE;
  scores.loss_TE = scores.clean_TE.softmax(1);
  return decision_of(stable_topk(noisy_TE, 1), at::ones({noisy_TE.size(0), 1}, at::kDouble), scores);
}

// Σ over groups of the code's mean_t(ā_t²)·S_true·S, over the groups. A place without a row has ā = 0; `places` of them stand in
// each group's S beside its rows.
double plain_coverage(const Rows& logits, const std::vector<int64_t>& key, double places = 0) {
  std::map<int64_t, std::vector<size_t>> groups;
  for (size_t t = 0; t < key.size(); ++t) groups[key[t]].push_back(t);
  double sum = 0;
  for (const auto& [k, rows] : groups) {
    const auto true_size = static_cast<double>(rows.size()), size = true_size + places;
    std::vector<double> mean(rows.size(), 0);
    for (size_t e = 0; e < logits[0].size(); ++e) {
      double total = 0;
      for (const size_t t : rows) total += std::exp(logits[t][e]);
      for (size_t i = 0; i < rows.size(); ++i)
        mean[i] += std::exp(logits[rows[i]][e]) / total / static_cast<double>(logits[0].size());
    }
    double squares = 0;
    for (const double a : mean) squares += a * a / size;
    sum += squares * true_size * size;
  }
  return sum / static_cast<double>(groups.size());
}

double coverage_of(const Rows& logits, std::vector<int64_t> sequence = {}, const std::vector<Setting>& settings = {}) {
  const auto rows = static_cast<int64_t>(logits.size());
  const auto loss = make_loss("coverage", settings);
  return value_of(*loss, input_of(rows, std::move(sequence)), decision_of_logits(tensor_of(logits)), 0).item<double>();
}

const Rows kCoverageLogits = {{.9, .1, -.4}, {-.2, 1.4, .8}, {.5, .4, -1.1}, {.2, -.6, .7},
                              {1.2, .3, .6}, {-.8, .9, 0},   {.3, -1.3, 2}};
const std::vector<int64_t> kCoverageSequence = {0, 1, 0, 0, 1, 0, 2};

// Rows [from, to) of kCoverageLogits as a micro-batch with sequences of its own.
LossStatistics coverage_part(const Loss& loss, size_t from, size_t to, LossScope scope = LossScope::kStep) {
  const std::vector<int64_t> sequence(kCoverageSequence.begin() + static_cast<int64_t>(from),
                                      kCoverageSequence.begin() + static_cast<int64_t>(to));
  const Rows logits(kCoverageLogits.begin() + static_cast<int64_t>(from), kCoverageLogits.begin() + static_cast<int64_t>(to));
  const RouteOutput out = decision_of_logits(from == to ? at::zeros({0, 3}, at::kDouble) : tensor_of(logits));
  const RouteInput in = input_of(static_cast<int64_t>(to - from), sequence);
  const BareRouter router;
  return collect_statistics(loss, scope, {in, out, router, 3}).front();
}

}  // namespace

TEST_CASE("3.3 coverage by hand: one expert that wants two rows 3 to 1 gives 2·(9 + 1)/16") {
  CHECK_THAT(coverage_of({{std::log(3.0)}, {0}}), WithinAbs(1.25, 1e-14));
  // A second expert that wants them 1 to 3: ā = (1/2, 1/2).
  CHECK_THAT(coverage_of({{std::log(3.0), 0}, {0, std::log(3.0)}}), WithinAbs(1, 1e-14));
}

TEST_CASE("3.3 coverage is 1 where rows are wanted alike, n where one row is, n/m where m are") {
  CHECK_THAT(coverage_of(Rows(5, {7, -3})), WithinAbs(1, 1e-14));
  CHECK_THAT(coverage_of({{900, 900}, {0, 0}, {0, 0}, {0, 0}}), WithinAbs(4, 1e-12));
  CHECK_THAT(coverage_of({{900, 0}, {0, 900}, {0, 0}, {0, 0}}), WithinAbs(4. / 2, 1e-12));
  CHECK_THAT(coverage_of({{3, 9, -2}}), WithinAbs(1, 1e-14));
}

TEST_CASE("Coverage equals plain loops over interleaved sequences, the whole micro-batch, and rows of equal position") {
  CHECK_THAT(coverage_of(kCoverageLogits, kCoverageSequence),
             WithinAbs(plain_coverage(kCoverageLogits, kCoverageSequence), 1e-13));
  CHECK_THAT(coverage_of(kCoverageLogits, kCoverageSequence, {{"group", std::string("micro")}}),
             WithinAbs(plain_coverage(kCoverageLogits, std::vector<int64_t>(7, 0)), 1e-13));
  const auto loss = make_loss("coverage", {{"group", std::string("time_step")}});
  RouteInput in = input_of(7, kCoverageSequence);
  in.position_T = at::tensor(std::vector<int64_t>{0, 0, 1, 2, 1, 3, 0}, at::kLong);
  const double found = value_of(*loss, in, decision_of_logits(tensor_of(kCoverageLogits)), 3).item<double>();
  CHECK_THAT(found, WithinAbs(plain_coverage(kCoverageLogits, {0, 0, 1, 2, 1, 3, 0}), 1e-13));
}

TEST_CASE("3.3 padding changes nothing: S_true·S·mean over S places is S_true times the sum over rows") {
  CHECK_THAT(coverage_of(kCoverageLogits, kCoverageSequence),
             WithinAbs(plain_coverage(kCoverageLogits, kCoverageSequence, 5), 1e-13));
}

TEST_CASE("Coverage reads the noisy logits, or the clean ones where told so") {
  const Tensor clean_TE = tensor_of(kCoverageLogits), noisy_TE = clean_TE.mul(-2);
  const auto value = [&](const char* logits) {
    return value_of(*make_loss("coverage", {{"logits", std::string(logits)}}), input_of(7),
                    decision_of_logits(noisy_TE, clean_TE), 3)
        .item<double>();
  };
  const std::vector<int64_t> one(7, 0);
  CHECK_THAT(value("noisy"), WithinAbs(plain_coverage(rows_of(noisy_TE), one), 1e-13));
  CHECK_THAT(value("clean"), WithinAbs(plain_coverage(kCoverageLogits, one), 1e-13));
}

TEST_CASE("Coverage has the gradient of its finite differences, and none along a shift of all of an expert's logits") {
  const auto loss = make_loss("coverage");
  const Tensor logits_TE = tensor_of(kCoverageLogits).requires_grad_(true);
  const auto value = [&](const Tensor& z_TE) {
    return value_of(*loss, input_of(7, kCoverageSequence), decision_of_logits(z_TE), 3);
  };
  value(logits_TE).backward();
  const Tensor expected = finite_differences([&](const Tensor& z_TE) { return value(z_TE).item<double>(); }, logits_TE);
  CHECK(relative_error(logits_TE.grad(), expected) < 1e-7);
  CHECK(logits_TE.grad().sum(0).abs().max().item<double>() < 1e-15);
}

TEST_CASE("Statistics of micro-batches that hold whole sequences sum to the step's: a mean over all groups") {
  const auto loss = make_loss("coverage");
  const BareRouter router;
  // Rows 0 … 5 hold sequences 0 and 1, row 6 sequence 2 alone; one micro-batch is empty.
  LossStatistics total = coverage_part(*loss, 0, 6);
  for (const LossStatistics& part : {coverage_part(*loss, 3, 3), coverage_part(*loss, 6, 7)})
    for (size_t i = 0; i < total.sums.size(); ++i) total.sums[i] = total.sums[i] + part.sums[i];
  CHECK_THAT(loss->value(total, router).item<double>(), WithinAbs(plain_coverage(kCoverageLogits, kCoverageSequence), 1e-13));
}

TEST_CASE("Coverage of scope sequence weighs each sequence by its rows, of scope step each alike") {
  const LossTerm term{make_loss("coverage"), "coverage", 1, LossScope::kSequence};
  const BareRouter router;
  const RouteOutput out = decision_of_logits(tensor_of(kCoverageLogits));
  const RouteInput in = input_of(7, kCoverageSequence);
  const double found = local_value(term, collect_statistics(*term.loss, term.scope, {in, out, router, 3}), router).item<double>();
  double expected = 0;
  for (const int64_t b : {0, 1, 2}) {
    Rows own;
    for (size_t t = 0; t < 7; ++t)
      if (kCoverageSequence[t] == b) own.push_back(kCoverageLogits[t]);
    expected += plain_coverage(own, std::vector<int64_t>(own.size(), 0)) * static_cast<double>(own.size()) / 7;
  }
  CHECK_THAT(found, WithinAbs(expected, 1e-13));
}

TEST_CASE("Coverage without rows is 0 and on the graph; inputs of ±1e4 stay finite") {
  const auto loss = make_loss("coverage");
  for (const LossScope scope : {LossScope::kStep, LossScope::kSequence, LossScope::kMicro}) {
    const Tensor none_TE = at::zeros({0, 3}, at::kDouble).requires_grad_(true);
    const RouteOutput out = decision_of_logits(none_TE);
    const RouteInput in = input_of(0);
    const BareRouter router;
    const LossTerm term{make_loss("coverage"), "coverage", 1, scope};
    const Tensor value = local_value(term, collect_statistics(*term.loss, scope, {in, out, router, 3}), router);
    CHECK(value.item<double>() == 0);
    CHECK(value.requires_grad());
  }
  const Tensor wide_TE = tensor_of({{1e4, -1e4}, {-1e4, 1e4}, {0, 1e4}}).to(at::kFloat).requires_grad_(true);
  value_of(*loss, input_of(3), decision_of_logits(wide_TE), 2).backward();
  CHECK(wide_TE.grad().isfinite().all().item<bool>());
}

TEST_CASE("Coverage counts the active experts alone") {
  class Growing : public BareRouter {
    Tensor active_experts_E() const override { return at::tensor(std::vector<int64_t>{1, 1, 0}, at::kLong).to(at::kBool); }
  };
  Rows two = kCoverageLogits, masked = kCoverageLogits;
  for (auto& row : two) row.pop_back();
  for (auto& row : masked) row[2] = -1e9;
  const RouteOutput out = decision_of_logits(tensor_of(masked));
  const RouteInput in = input_of(7, kCoverageSequence);
  const auto loss = make_loss("coverage");
  const Growing router;
  const double found =
      loss->value(collect_statistics(*loss, LossScope::kStep, {in, out, router, 3}).front(), router).item<double>();
  CHECK_THAT(found, WithinAbs(plain_coverage(two, kCoverageSequence), 1e-13));
}

TEST_CASE("Coverage takes its landmarks: 1 at balance, and 1 where all rows choose the same experts, for it compares rows") {
  const auto loss = make_loss("coverage");
  for (const int64_t k : {1, 2}) {
    const Landmarks marks = loss->landmarks(4, k), grown = loss->landmarks_among(2, 4, k);
    CHECK(marks.balance == 1);
    CHECK(marks.collapse == 1);
    CHECK(grown.balance == 1);
  }
  CHECK_THAT(coverage_of(Rows(4, {0, 0, 0, 0})), WithinAbs(1, 1e-14));
  CHECK_THAT(coverage_of(Rows(4, {0, -1e9, -1e9, -1e9})), WithinAbs(1, 1e-14));
}

TEST_CASE("Coverage attaches to every router with scores, whatever its plan, and refuses one without") {
  const LossEntry& entry = Registry<LossEntry>::instance().find("coverage");
  RouterFacts merge, scoreless;
  merge.plan = PlanForm::kMerge;
  scoreless.has_scores = false;
  CHECK(entry.refuses({}).empty());
  CHECK(entry.refuses(merge).empty());
  CHECK_FALSE(entry.refuses(scoreless).empty());
}
