// Records of routing decisions and the ratios formed from them, against numbers worked by hand (diagnostics.md 1.1, 1.6, 1.7).
#include "core/diagnostics.h"

#include "core/error.h"
#include "tests/losses/plain_losses.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

#include <numeric>
#include <random>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;

namespace {

RouteOutput chosen_only(const Choices& choices, const Rows& probabilities = {}) {
  Scores scores;
  if (!probabilities.empty()) scores.loss_TE = tensor_of(probabilities);
  return decision_of(choices_of(choices), choices_of(choices).to(at::kDouble), scores);
}

// Two choices of four rows over four experts with two places each, served row by row.
RouteOutput four_by_four() {
  const Rows probabilities = {{.25, .25, .25, .25}, {1, 0, 0, 0}, {.5, .5, 0, 0}, {.25, .25, .25, .25}};
  RouteOutput out = chosen_only({{0, 1}, {0, 2}, {0, 1}, {1, 0}}, probabilities);
  out.assignment.kept_TK = choices_of({{1, 1}, {1, 1}, {0, 1}, {0, 0}}).to(at::kBool);
  out.assignment.dropped_TK = out.assignment.kept_TK.logical_not();
  out.places = 8;
  return out;
}

using Metrics = std::map<std::string, double>;

Metrics metrics_for(const RouteOutput& out, int64_t rows, int64_t experts) {
  return metrics_of(record_of(input_of(rows), out, experts));
}

// k distinct experts of each row at random, by Fisher–Yates on raw bits.
RoutingRecord random_record(std::mt19937_64& bits, int64_t rows, int64_t experts, int64_t k) {
  Choices choices;
  std::vector<int64_t> deck(experts);
  std::iota(deck.begin(), deck.end(), 0);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < k; ++j) std::swap(deck[j], deck[j + bits() % (experts - j)]);
    choices.emplace_back(deck.begin(), deck.begin() + k);
  }
  return record_of(input_of(rows), chosen_only(choices), experts);
}

void check_equal(const RoutingRecord& a, const RoutingRecord& b) {
  CHECK(a.experts == b.experts);
  CHECK(a.active_E == b.active_E);
  CHECK(a.chosen_E == b.chosen_E);
  CHECK(a.accepted_E == b.accepted_E);
  CHECK(a.rows == b.rows);
  CHECK(a.left_behind == b.left_behind);
  CHECK(a.dropped == b.dropped);
  CHECK(a.first_chosen == b.first_chosen);
  CHECK(a.first_dropped == b.first_dropped);
  CHECK(a.places == b.places);
  CHECK(a.entropy_rows == b.entropy_rows);
  CHECK_THAT(a.entropy_sum, WithinRel(b.entropy_sum, 1e-14));
}

}  // namespace

TEST_CASE("A uniform load has every metric at its ideal") {
  const Metrics m = metrics_for(chosen_only({{0}, {1}, {2}, {3}}, Rows(4, {.25, .25, .25, .25})), 4, 4);
  CHECK(m.at("load_cv2") == 0);
  CHECK(m.at("max_violation") == 0);
  CHECK(m.at("max_over_mean") == 1);
  CHECK(m.at("min_over_mean") == 1);
  CHECK_THAT(m.at("load_entropy"), WithinAbs(1, 1e-12));
  CHECK_THAT(m.at("effective_experts"), WithinAbs(4, 1e-12));
  CHECK_THAT(m.at("inverse_simpson"), WithinAbs(4, 1e-12));
  CHECK(m.at("dead") == 0);
  CHECK(m.at("dropped") == 0);
  CHECK(m.at("dropped_first") == 0);
  CHECK(std::isnan(m.at("dropped_later")));  // there is one choice only
  CHECK(m.at("left_behind") == 0);
  CHECK(std::isnan(m.at("capacity_used")));
  CHECK_THAT(m.at("router_entropy"), WithinAbs(1, 1e-12));
}

TEST_CASE("A load on one expert has every metric at its end: CV² = E-1, MaxVio = E-1, one effective expert") {
  const Metrics m = metrics_for(chosen_only({{2}, {2}, {2}}, Rows(3, {0, 0, 1, 0})), 3, 4);
  CHECK_THAT(m.at("load_cv2"), WithinAbs(3, 1e-12));
  CHECK_THAT(m.at("max_violation"), WithinAbs(3, 1e-12));
  CHECK(m.at("min_over_mean") == 0);
  CHECK(m.at("load_entropy") == 0);
  CHECK(m.at("effective_experts") == 1);
  CHECK(m.at("inverse_simpson") == 1);
  CHECK(m.at("dead") == 3);
  CHECK(m.at("router_entropy") == 0);
}

TEST_CASE("A 4×4 case with drops has the metrics worked by hand") {
  const RoutingRecord record = record_of(input_of(4), four_by_four(), 4);
  CHECK(record.chosen_E == std::vector<int64_t>{4, 3, 1, 0});
  CHECK(record.accepted_E == std::vector<int64_t>{2, 2, 1, 0});
  const Metrics m = metrics_of(record);
  CHECK_THAT(m.at("load_cv2"), WithinAbs(10.0 / 16, 1e-12));  // (2² + 1² + 1² + 2²)/4 over mean² = 4
  CHECK(m.at("max_over_mean") == 2);
  CHECK(m.at("max_violation") == 1);
  CHECK(m.at("min_over_mean") == 0);
  const double entropy = .5 * std::log(2.0) + .375 * std::log(8 / 3.0) + .125 * std::log(8.0);
  CHECK_THAT(m.at("load_entropy"), WithinAbs(entropy / std::log(4.0), 1e-12));
  CHECK_THAT(m.at("effective_experts"), WithinAbs(std::exp(entropy), 1e-12));
  CHECK_THAT(m.at("inverse_simpson"), WithinAbs(64.0 / (16 + 9 + 1), 1e-12));
  CHECK(m.at("dead") == 1);
  CHECK(m.at("dead_share") == 1.0 / 4);
  CHECK(m.at("dropped") == 3.0 / 8);
  CHECK(m.at("dropped_first") == 2.0 / 4);
  CHECK(m.at("dropped_later") == 1.0 / 4);
  CHECK(m.at("left_behind") == 1.0 / 4);
  CHECK(m.at("capacity_used") == 5.0 / 8);
  CHECK_THAT(m.at("router_entropy"), WithinAbs((1 + 0 + .5 + 1) / 4, 1e-12));
}

TEST_CASE("A pair that a policy refused, and a -1, are neither chosen nor dropped") {
  RouteOutput out = chosen_only({{0, 1}, {1, -1}});
  out.assignment.kept_TK = choices_of({{1, 0}, {1, 0}}).to(at::kBool);
  const RoutingRecord record = record_of(input_of(2), out, 2);
  CHECK(record.chosen_E == std::vector<int64_t>{1, 1});
  CHECK(record.dropped == 0);
  CHECK(record.left_behind == 0);
}

TEST_CASE("One expert is perfectly even and perfectly undecided; no rows, no ratios") {
  const Metrics one = metrics_for(chosen_only({{0}, {0}}, {{1}, {1}}), 2, 1);
  CHECK(one.at("load_cv2") == 0);
  CHECK(one.at("load_entropy") == 1);
  CHECK(one.at("router_entropy") == 1);
  const Metrics none = metrics_for(chosen_only({}), 0, 3);
  CHECK(none.size() == metric_docs().size());
  for (const auto& [name, value] : none) CHECK(std::isnan(value));
}

TEST_CASE("Rows that chose nothing at all leave every expert dead and no load to speak of") {
  const Metrics m = metrics_for(chosen_only({{-1}, {-1}}), 2, 3);
  CHECK(m.at("dead") == 3);
  CHECK(m.at("left_behind") == 1);
  CHECK(std::isnan(m.at("load_cv2")));
  CHECK(std::isnan(m.at("dropped")));
}

// Three of four experts, evenly loaded: even, none dead, and undecided at ln 3; then the fourth one comes and gets nothing.
TEST_CASE("Only experts that were active at some time in the window are counted") {
  RouteOutput out = chosen_only({{0}, {1}, {2}}, Rows(3, {1. / 3, 1. / 3, 1. / 3, 0}));
  out.places = 8;
  RoutingRecord record = record_of(input_of(3), out, 4, choices_of({{1, 1, 1, 0}})[0].to(at::kBool));
  CHECK(record.active_experts() == 3);
  CHECK(record.active_E == std::vector<int64_t>{3, 3, 3, 0});
  const Metrics three = metrics_of(record);
  CHECK(three.at("load_cv2") == 0);
  CHECK(three.at("min_over_mean") == 1);
  CHECK(three.at("dead") == 0);
  CHECK(three.at("capacity_used") == 3.0 / 6);
  CHECK_THAT(three.at("load_entropy"), WithinAbs(1, 1e-12));
  CHECK_THAT(three.at("router_entropy"), WithinAbs(1, 1e-12));
  record.add(record_of(input_of(3), out, 4));
  const Metrics four = metrics_of(record);
  CHECK(record.active_E == std::vector<int64_t>{6, 6, 6, 3});
  CHECK(four.at("dead") == 1);
  CHECK(four.at("capacity_used") == 6.0 / 14);
  CHECK_THAT(four.at("router_entropy"), WithinAbs(std::log(3.0) / std::log(4.0), 1e-12));
}

// Two rows of (1/2, 1/2, 0, 0) and one of (0, 1, 0, 0): the experts' shares in the outputs are 1/3, 2/3, 0, 0.
TEST_CASE("A merge plan has no counts, but weights in the outputs and the entropy of its probabilities") {
  RouteOutput out;
  out.plan = MergePlan{.alpha_GE = tensor_of({{.5, .5, 0, 0}, {0, 1, 0, 0}}), .group_of_token_T = choices_of({{0, 1, 0}})[0]};
  out.scores.loss_TE = tensor_of({{.5, .5, 0, 0}, {0, 1, 0, 0}, {.5, .5, 0, 0}});
  RoutingRecord record = record_of(input_of(3), out, 4);
  CHECK(record.weight_E == std::vector<double>{1, 2, 0, 0});
  const Metrics m = metrics_of(record);
  for (const auto& [name, value] : m)
    CHECK(std::isnan(value) ==
          (name != "router_entropy" && name != "weight_max_over_mean" && name != "weight_effective_experts"));
  CHECK_THAT(m.at("router_entropy"), WithinAbs(2.0 / 3 * .5, 1e-12));
  CHECK_THAT(m.at("weight_max_over_mean"), WithinAbs(8.0 / 3, 1e-12));
  CHECK_THAT(m.at("weight_effective_experts"), WithinAbs(std::exp(std::log(3.0) - 2.0 / 3 * std::log(2.0)), 1e-12));
  record.add(record);
  CHECK(record.weight_E == std::vector<double>{2, 4, 0, 0});
  std::vector<RoutingRecord> ranks(2, record);
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) { ranks[comm->rank()].all_reduce(*comm); });
  CHECK(ranks[1].weight_E == std::vector<double>{4, 8, 0, 0});
  const Metrics three = metrics_of(record_of(input_of(3), out, 4, choices_of({{1, 1, 1, 0}})[0].to(at::kBool)));
  CHECK_THAT(three.at("weight_max_over_mean"), WithinAbs(2, 1e-12));  // one expert is not there
}

TEST_CASE("Records add up in any grouping, from an empty one too") {
  std::mt19937_64 bits(7);
  const RoutingRecord a = random_record(bits, 5, 4, 2), b = random_record(bits, 9, 4, 2);
  const RoutingRecord c = record_of(input_of(4), four_by_four(), 4);
  RoutingRecord left, right = b;
  for (const RoutingRecord* part : {&a, &b, &c}) left.add(*part);
  right.add(c);
  RoutingRecord grouped = a;
  grouped.add(right);
  check_equal(left, grouped);
  CHECK(left.rows == 18);
  RoutingRecord narrow;
  narrow.chosen_E = {1};
  CHECK_THROWS_AS(narrow.add(c), Error);
}

TEST_CASE("All-reduced records equal the sum over ranks, on every rank") {
  std::mt19937_64 bits(8);
  std::vector<RoutingRecord> parts;
  for (int rank = 0; rank < 3; ++rank) parts.push_back(random_record(bits, 3 + rank, 6, 2));
  parts[1].entropy_sum = 0.7, parts[2].entropy_sum = 0.1;
  RoutingRecord whole;
  for (const RoutingRecord& part : parts) whole.add(part);
  std::vector<RoutingRecord> reduced = parts;
  run_on_threads(3, [&](std::shared_ptr<Comm> comm) { reduced[comm->rank()].all_reduce(*comm); });
  for (const RoutingRecord& record : reduced) check_equal(record, whole);
}

// diagnostics.md 1.6; means over seeded windows, bounds about four standard errors wide.
TEST_CASE("Uniform random routing sits on the noise floor: CV² = (E-k)/(kT), dead experts as (1-k/E)^T") {
  struct Floor {
    int64_t experts, k, rows;
  };
  for (const auto& [experts, k, rows] : {Floor{8, 2, 1024}, Floor{64, 1, 64}, Floor{64, 8, 512}}) {
    CAPTURE(experts, k, rows);
    const double windows = 100, cv2_floor = static_cast<double>(experts - k) / (k * rows);
    std::mt19937_64 bits(experts * 1000 + k);
    double cv2 = 0, violation = 0, entropy = 0, dead = 0;
    for (int window = 0; window < windows; ++window) {
      const Metrics m = metrics_of(random_record(bits, rows, experts, k));
      cv2 += m.at("load_cv2") / windows;
      violation += m.at("max_violation") / windows;
      entropy += m.at("load_entropy") / windows;
      dead += m.at("dead") / experts / windows;
    }
    CHECK_THAT(cv2, WithinRel(cv2_floor, 4 * std::sqrt(2.0 / (experts - 1) / windows)));
    const double violation_floor = std::sqrt(2 * std::log(experts) * cv2_floor);
    CHECK(violation > 0.6 * violation_floor);
    CHECK(violation < 1.15 * violation_floor);
    CHECK_THAT(dead, WithinAbs(std::pow(1 - static_cast<double>(k) / experts, rows), 0.025));
    if (cv2_floor < 0.1) CHECK_THAT(1 - entropy, WithinRel(cv2_floor / (2 * std::log(experts)), 0.35));
  }
}

TEST_CASE("Every metric is documented") {
  for (const MetricDoc& doc : metric_docs())
    for (const std::string& text : {doc.name, doc.equation, doc.range, doc.doc}) CHECK_FALSE(text.empty());
}
