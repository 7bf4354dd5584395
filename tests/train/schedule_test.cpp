// Learning-rate schedules against numbers worked by hand.
#include "core/error.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>

namespace moelab::test {
namespace {

void check_rates(const ScheduleSettings& schedule, const std::vector<double>& expected) {
  for (size_t step = 0; step < expected.size(); ++step) {
    CAPTURE(step);
    const double rate = learning_rate(2, schedule, static_cast<int64_t>(step), static_cast<int64_t>(expected.size()));
    CHECK(std::abs(rate - expected[step]) < 1e-14);
  }
}

TEST_CASE("the linear schedule warms up and falls along a line to its final fraction") {
  check_rates({2, "linear", 0.5}, {1, 2, 2, 1.8, 1.6, 1.4, 1.2});
  CHECK(learning_rate(2, {2, "linear", 0.5}, 7, 7) == 1);
}

TEST_CASE("the wsd schedule warms up, stays, and falls over the last part of all steps") {
  check_rates({2, "wsd", 0.2, 0.4, "linear"}, {1, 2, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8});
  check_rates({2, "wsd", 0, 0.4, "sqrt"}, {1, 2, 2, 2, 2, 2, 2, 1, 2 - std::sqrt(2.0), 2 - std::sqrt(3.0)});
  check_rates({0, "wsd", 0.5, 0, "linear"}, {2, 2, 2, 2});
}

TEST_CASE("a decay that would begin within the warm-up waits for its end, and one step is no division by zero") {
  check_rates({3, "wsd", 0, 1, "linear"}, {2.0 / 3, 4.0 / 3, 2, 2, 1});
  CHECK(learning_rate(2, {0, "wsd", 0.5, 1, "linear"}, 0, 1) == 2);
  CHECK(learning_rate(2, {0, "linear", 0.5}, 0, 0) == 2);
  CHECK(learning_rate(2, {9, "linear", 0.5}, 3, 4) == 2 * 4.0 / 9);
}

TEST_CASE("[schedule] reads them, and refuses another name") {
  const ScheduleSettings read = tiny_experiment(
                                    "switch", {"schedule.decay=wsd", "schedule.decay_fraction=0.25", "schedule.decay_shape=sqrt"})
                                    .train.schedule;
  CHECK(read.decay == "wsd");
  CHECK(read.decay_fraction == 0.25);
  CHECK(read.decay_shape == "sqrt");
  CHECK_THROWS_AS(tiny_experiment("switch", {"schedule.decay=exponential"}), Error);
}

}  // namespace
}  // namespace moelab::test
