#include "tests/routers/expert_choice_support.h"

#include <array>

using namespace moelab;

namespace {

// Dykstra's projections by multiplication, with plain loops: experts' sums, rows' caps, entries at most 1. The entropy's weight
// falls from 0.1 by a tenth per round.
Rows slow_dykstra(const Rows& s, double places, double cap, double lambda, int64_t iterations) {
  const size_t rows = s.size(), experts = s[0].size();
  Rows a(rows, std::vector<double>(experts)), entry(rows, std::vector<double>(experts, 1));
  std::vector<double> row(rows, 1);
  double now = std::max(0.1, lambda);
  for (size_t t = 0; t < rows; ++t)
    for (size_t e = 0; e < experts; ++e) a[t][e] = std::exp(s[t][e] / now);
  for (int64_t i = 0; i < iterations; ++i) {
    for (size_t e = 0; e < experts; ++e) {
      double sum = 0;
      for (size_t t = 0; t < rows; ++t) sum += a[t][e];
      for (size_t t = 0; t < rows; ++t) a[t][e] *= places / sum;
    }
    for (size_t t = 0; t < rows; ++t) {
      double sum = 0;
      for (double& value : a[t]) sum += value *= row[t];
      row[t] = std::max(1.0, sum / cap);
      for (double& value : a[t]) value /= row[t];
    }
    for (size_t t = 0; t < rows; ++t)
      for (size_t e = 0; e < experts; ++e) {
        const double b = a[t][e] * entry[t][e];
        entry[t][e] = std::max(1.0, b);
        a[t][e] = b / entry[t][e];
      }
    const double next = std::max(lambda, 0.9 * now);
    for (size_t t = 0; t < rows; ++t) {
      row[t] = std::pow(row[t], now / next);
      for (size_t e = 0; e < experts; ++e) {
        a[t][e] = std::pow(a[t][e], now / next);
        entry[t][e] = std::pow(entry[t][e], now / next);
      }
    }
    now = next;
  }
  for (size_t t = 0; t < rows; ++t)
    for (size_t e = 0; e < experts; ++e) a[t][e] *= entry[t][e];
  return a;
}

// The best total of S over all ways to give 3 experts 2 of 6 rows each, no row to more than `cap`, and the runner-up's.
struct BestPair {
  double best = -1, second = -1;
  Pairs pairs;
};

BestPair brute_force(const Rows& s, int64_t cap) {
  std::vector<std::pair<int64_t, int64_t>> twos;
  for (int64_t a = 0; a < 6; ++a)
    for (int64_t b = a + 1; b < 6; ++b) twos.push_back({a, b});
  BestPair found;
  for (size_t i = 0; i < twos.size() * twos.size() * twos.size(); ++i) {
    const std::array<std::pair<int64_t, int64_t>, 3> taken{twos[i % 15], twos[i / 15 % 15], twos[i / 225]};
    std::vector<int64_t> count(6, 0);
    double value = 0;
    for (int64_t e = 0; e < 3; ++e)
      for (const int64_t t : {taken[e].first, taken[e].second}) {
        ++count[t];
        value += s[t][e];
      }
    if (*std::max_element(count.begin(), count.end()) > cap) continue;
    if (value > found.best) {
      found = {value, found.best, {}};
      for (int64_t e = 0; e < 3; ++e) found.pairs.insert({{taken[e].first, e}, {taken[e].second, e}});
    } else {
      found.second = std::max(found.second, value);
    }
  }
  return found;
}

}  // namespace

TEST_CASE("cap_per_token at a small lambda finds the best assignment of all, where it is clearly the best (spec 3.3)") {
  int64_t clear = 0;
  for (int64_t seed = 0; seed < 40; ++seed)
    for (const int64_t cap : {1, 2}) {
      const Tensor z_TE = random_tensor(seed, {6, 3}) * 2;
      const BestPair best = brute_force(softmax_rows(z_TE), cap);
      if (best.best - best.second < 0.02) continue;
      ++clear;
      const ChoiceOptions options{{"cap_per_token", cap}, {"cap_iterations", int64_t{2000}}};
      CHECK(pairs_of(route(*choosing(3, each_takes(2), options), RouteCase(z_TE))) == best.pairs);
    }
  CHECK(clear > 50);
}

TEST_CASE("cap_per_token equals Dykstra's projections by plain loops, whose largest entries keep to the cap") {
  for (const int64_t seed : {5, 6, 7, 8}) {
    const Tensor z_TE = random_tensor(seed, {14, 4});
    std::vector<int64_t> all(14), count(14, 0);
    for (size_t t = 0; t < all.size(); ++t) all[t] = static_cast<int64_t>(t);
    const ChoiceOptions options{{"cap_per_token", int64_t{2}}, {"cap_lambda", 0.02}, {"cap_iterations", int64_t{200}}};
    const Pairs expected = slow_choice(slow_dykstra(softmax_rows(z_TE), 5, 2, 0.02, 200), all, 5);
    for (const auto& [t, e] : expected) ++count[t];
    REQUIRE(*std::max_element(count.begin(), count.end()) <= 2);  // else rows refuse, which the loops do not
    CHECK(pairs_of(route(*choosing(4, each_takes(5), options), RouteCase(z_TE))) == expected);
  }
}

TEST_CASE("with a cap every expert still takes exactly C rows, and no row has more than its cap, converged or not") {
  for (const double scale : {0.3, 1.0, 2.0})
    for (const int64_t iterations : {1, 100}) {
      const RouteCase input(random_tensor(3, {256, 16}) * scale);
      const auto most = [&](int64_t cap) {
        const RouteOutput out = route(*choosing(16, each_takes(24), {{"cap_per_token", cap}, {"cap_iterations", iterations}}),
                                      input);
        CHECK(sparse(out).offsets_E1.equal(at::arange(17, at::kLong) * 24));
        const std::vector<int64_t> count = per_row(out, 256);
        return *std::max_element(count.begin(), count.end());
      };
      CHECK(most(0) > 2);
      CHECK(most(2) == 2);
    }
}

TEST_CASE("a cap that cannot hold gives way to the least one that can") {
  for (const int64_t rows : {1, 3}) {
    const RouteOutput out = route(*choosing(4, share(1), {{"cap_per_token", int64_t{1}}}),
                                  RouteCase(random_tensor(1, {rows, 4})));
    CHECK(pairs_of(out).size() == 4);
    for (const int64_t n : per_row(out, rows)) CHECK(n <= (rows == 1 ? 4 : 2));
  }
}
