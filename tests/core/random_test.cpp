#include "core/random.h"
#include "core/error.h"

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numbers>
#include <set>

using namespace moelab;

namespace {

using PhiloxWords = std::array<uint32_t, 4>;

// Philox 4x32-10, from Salmon et al., SC 2011: an implementation apart from the one under test.
PhiloxWords slow_philox(PhiloxWords c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
  }
  return c;
}

PhiloxWords engine_words(uint64_t key, uint64_t subsequence, uint64_t offset) {
  at::Philox4_32 engine(key, subsequence, offset);
  PhiloxWords words;
  for (uint32_t& word : words) word = engine();
  return words;
}

// The 64-bit word of one column, by the layout that core/random.cpp states.
uint64_t slow_column_word(RandomKey key, int64_t sequence, int64_t position, int64_t column) {
  const auto s = static_cast<uint64_t>(sequence);
  const PhiloxWords block = slow_philox({static_cast<uint32_t>(column / 2), static_cast<uint32_t>(position),
                                         static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)},
                                        static_cast<uint32_t>(key.value), static_cast<uint32_t>(key.value >> 32));
  const size_t half = 2 * static_cast<size_t>(column % 2);
  return block[half] | uint64_t{block[half + 1]} << 32;
}

Tensor same_sequence(int64_t rows, int64_t id) { return at::full({rows}, id, at::kLong); }
Tensor positions_up_to(int64_t rows) { return at::arange(rows, at::kLong); }

using RowDraw = Tensor (*)(RandomKey, const Tensor&, const Tensor&, int64_t, at::ScalarType);
constexpr std::array<RowDraw, 3> kRowDraws{uniform_rows, normal_rows, gumbel_rows};

double kolmogorov_distance(const Tensor& draws, const std::function<double(double)>& distribution) {
  const Tensor sorted = std::get<0>(draws.flatten().to(at::kDouble).sort());
  const double* x = sorted.const_data_ptr<double>();
  const double n = static_cast<double>(sorted.numel());
  double distance = 0;
  for (int64_t i = 0; i < sorted.numel(); ++i) {
    const double f = distribution(x[i]);
    distance = std::max({distance, std::abs(f - i / n), std::abs(f - (i + 1) / n)});
  }
  return distance * std::sqrt(n);
}

constexpr double kKolmogorovBound = 2.5;  // exceeded with probability 2 exp(-2 · 2.5²) = 7e-6

void check_moments(const Tensor& draws, double mean, double variance, double kurtosis) {
  const double n = static_cast<double>(draws.numel());
  const double seen_mean = draws.mean().item<double>();
  CHECK(std::abs(seen_mean - mean) < 5 * std::sqrt(variance / n));
  CHECK(std::abs((draws - mean).square().mean().item<double>() - variance) < 5 * variance * std::sqrt((kurtosis - 1) / n));
}

double correlation(const Tensor& a, const Tensor& b) {
  const Tensor x = (a - a.mean()).flatten(), y = (b - b.mean()).flatten();
  return (x.dot(y) / (x.norm() * y.norm())).item<double>();
}

double normal_cdf(double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); }

}  // namespace

TEST_CASE("the engine gives the published Philox 4x32-10 answers") {
  // kat_vectors of Random123: counter 0 key 0; all ones; digits of pi.
  const PhiloxWords zeros{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  const PhiloxWords ones{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
  const PhiloxWords pi{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  CHECK(engine_words(0, 0, 0) == zeros);
  CHECK(engine_words(~0ull, ~0ull, ~0ull) == ones);
  CHECK(engine_words(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88) == pi);
  CHECK(slow_philox({0, 0, 0, 0}, 0, 0) == zeros);
  CHECK(slow_philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0) == pi);
}

TEST_CASE("rows follow the stated layout: block, position, sequence in the counter") {
  const RandomKey key = random_key(7, "layout");
  const std::vector<int64_t> sequences{0, 5, -1, int64_t{1} << 40}, positions{0, 1, 2'000'000'000, -1};
  const Tensor uniform = uniform_rows(key, at::tensor(sequences), at::tensor(positions), 7, at::kDouble);
  const Tensor normal = normal_rows(key, at::tensor(sequences), at::tensor(positions), 7, at::kDouble);
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t n = 0; n < 7; ++n) {
      const auto word = [&](int64_t column) { return slow_column_word(key, sequences[t], positions[t], column); };
      CHECK(uniform[t][n].item<double>() == static_cast<double>(word(n) >> 11) / 9007199254740992.0);
      const double u = (static_cast<double>(word(n - n % 2) >> 12) + 0.5) / 4503599627370496.0;
      const double angle = 2 * std::numbers::pi * (static_cast<double>(word(n - n % 2 + 1) >> 11) / 9007199254740992.0);
      const double expected = std::sqrt(-2 * std::log(u)) * (n % 2 == 0 ? std::cos(angle) : std::sin(angle));
      CHECK(std::abs(normal[t][n].item<double>() - expected) < 1e-12);
    }
  }
}

TEST_CASE("a row's draws do not depend on the batch around it") {
  const RandomKey key = random_key(1, "noise").with("layer", 3);
  const Tensor sequence = at::arange(60, at::kLong).div(20, "floor"), position = at::arange(60, at::kLong).remainder(20);
  const Tensor order = (at::arange(60, at::kLong) * 37).remainder(60);
  for (RowDraw draw : kRowDraws) {
    const Tensor whole = draw(key, sequence, position, 5, at::kFloat);
    CHECK(at::equal(draw(key, sequence, position, 5, at::kFloat), whole));
    CHECK(at::equal(draw(key, sequence.index_select(0, order), position.index_select(0, order), 5, at::kFloat),
                    whole.index_select(0, order)));
    const Tensor first = draw(key, sequence.slice(0, 0, 23), position.slice(0, 0, 23), 5, at::kFloat);
    const Tensor rest = draw(key, sequence.slice(0, 23), position.slice(0, 23), 5, at::kFloat);
    CHECK(at::equal(at::cat({first, rest}), whole));
    CHECK(at::equal(draw(key, sequence.slice(0, 0, 60, 3), position.slice(0, 0, 60, 3), 5, at::kFloat),
                    whole.slice(0, 0, 60, 3)));
  }
}

TEST_CASE("a column does not depend on the number of columns") {
  const RandomKey key = random_key(2, "columns");
  const Tensor sequence = same_sequence(40, 9), position = positions_up_to(40);
  for (RowDraw draw : kRowDraws) {
    const Tensor wide = draw(key, sequence, position, 8, at::kDouble);
    for (int64_t columns : {0, 1, 3, 7}) {
      CHECK(at::equal(draw(key, sequence, position, columns, at::kDouble), wide.slice(1, 0, columns)));
    }
  }
  CHECK(uniform_rows(key, sequence.slice(0, 0, 0), position.slice(0, 0, 0), 4, at::kFloat).sizes() == at::IntArrayRef{0, 4});
}

TEST_CASE("rows have the distribution of their name") {
  const RandomKey key = random_key(3, "moments");
  const Tensor sequence = same_sequence(50'000, 0), position = positions_up_to(50'000);
  SECTION("uniform") {
    const Tensor draws = uniform_rows(key, sequence, position, 4, at::kDouble);
    check_moments(draws, 0.5, 1.0 / 12, 1.8);
    CHECK(kolmogorov_distance(draws, [](double x) { return x; }) < kKolmogorovBound);
    CHECK(draws.min().item<double>() >= 0);
  }
  SECTION("normal") {
    const Tensor draws = normal_rows(key, sequence, position, 4, at::kDouble);
    check_moments(draws, 0, 1, 3);
    CHECK(kolmogorov_distance(draws, normal_cdf) < kKolmogorovBound);
  }
  SECTION("standard Gumbel") {
    const Tensor draws = gumbel_rows(key, sequence, position, 4, at::kDouble);
    check_moments(draws, std::numbers::egamma, std::numbers::pi * std::numbers::pi / 6, 5.4);
    CHECK(kolmogorov_distance(draws, [](double x) { return std::exp(-std::exp(-x)); }) < kKolmogorovBound);
  }
  SECTION("the columns of a row are uncorrelated") {
    for (RowDraw draw : kRowDraws) {
      const Tensor draws = draw(key, sequence, position, 4, at::kDouble);
      for (int64_t n = 1; n < 4; ++n) CHECK(std::abs(correlation(draws.select(1, 0), draws.select(1, n))) < 5 / std::sqrt(5e4));
    }
  }
}

TEST_CASE("streams of another purpose, layer, step, seed, sequence or position are others, without correlation") {
  const int64_t rows = 20'000;
  const Tensor position = positions_up_to(rows);
  const auto stream = [&](RandomKey key, int64_t id, int64_t shift) {
    return normal_rows(key, same_sequence(rows, id), position + shift, 2, at::kDouble);
  };
  const RandomKey base = random_key(1, "noise").with("layer", 0).with("step", 0);
  const std::vector<Tensor> streams{
      stream(base, 0, 0),
      stream(random_key(1, "drop").with("layer", 0).with("step", 0), 0, 0),
      stream(random_key(1, "noise").with("layer", 1).with("step", 0), 0, 0),
      stream(random_key(1, "noise").with("layer", 0).with("step", 1), 0, 0),
      stream(random_key(1, "noise").with("step", 0).with("layer", 0), 0, 0),
      stream(random_key(2, "noise").with("layer", 0).with("step", 0), 0, 0),
      stream(base, 1, 0),
      stream(base, 0, 1),
  };
  for (size_t a = 0; a < streams.size(); ++a) {
    for (size_t b = a + 1; b < streams.size(); ++b) CHECK(std::abs(correlation(streams[a], streams[b])) < 5 / std::sqrt(4e4));
  }
}

TEST_CASE("keys of many purposes and indices are distinct") {
  std::set<uint64_t> seen;
  for (int64_t seed = 0; seed < 10; ++seed) {
    for (const char* purpose : {"", "a", "noise", "a purpose of more than sixteen bytes"}) {
      for (int64_t index = -500; index < 500; ++index) seen.insert(random_key(seed, purpose).with("step", index).value);
    }
  }
  CHECK(seen.size() == 40'000);
  CHECK(random_key(4, "x").with("y", 2).value == random_key(4, "x").with("y", 2).value);
}

TEST_CASE("float and double draws agree to rounding") {
  const RandomKey key = random_key(5, "rounding");
  const Tensor sequence = same_sequence(1000, 2), position = positions_up_to(1000);
  CHECK(at::equal(normal_rows(key, sequence, position, 3, at::kDouble).to(at::kFloat),
                  normal_rows(key, sequence, position, 3, at::kFloat)));
  CHECK(at::equal(gumbel_rows(key, sequence, position, 3, at::kDouble).to(at::kFloat),
                  gumbel_rows(key, sequence, position, 3, at::kFloat)));
  const Tensor exact = uniform_rows(key, sequence, position, 3, at::kDouble);
  const Tensor rounded = uniform_rows(key, sequence, position, 3, at::kFloat);
  CHECK((exact - rounded.to(at::kDouble)).abs().max().item<double>() <= 0x1p-24);
}

TEST_CASE("a uniform stays below 1 in every floating type, over a million draws") {
  const RandomKey key = random_key(6, "below one");
  const Tensor sequence = same_sequence(1000, 0), position = positions_up_to(1000);
  for (at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16}) {
    const Tensor draws = uniform_rows(key, sequence, position, 1000, dtype);
    CHECK(draws.scalar_type() == dtype);
    CHECK(draws.max().item<double>() < 1);
    CHECK(draws.max().item<double>() >= 0.99);
    CHECK(draws.min().item<double>() >= 0);
  }
}

TEST_CASE("an element of a tensor depends on its index alone, whatever the shape") {
  const RandomKey key = random_key(8, "weights");
  const Tensor flat = normal_tensor(key, {1001}, 0.02, at::kFloat);
  CHECK(at::equal(normal_tensor(key, {7, 11, 13}, 0.02, at::kFloat).flatten(), flat));
  CHECK(at::equal(normal_tensor(key, {100}, 0.02, at::kFloat), flat.slice(0, 0, 100)));
  const Tensor cut = truncated_normal_tensor(key, {1001}, 0.02, at::kFloat);
  CHECK(at::equal(truncated_normal_tensor(key, {100}, 0.02, at::kFloat), cut.slice(0, 0, 100)));
  CHECK(normal_tensor(key, {3, 0}, 1.0, at::kFloat).numel() == 0);
}

TEST_CASE("tensors have the distribution of their name") {
  const RandomKey key = random_key(9, "tensors");
  check_moments(normal_tensor(key, {300, 500}, 0.5, at::kDouble), 0, 0.25, 3);
  const Tensor cut = truncated_normal_tensor(key, {150'000}, 0.1, at::kDouble);
  CHECK(cut.abs().max().item<double>() <= 0.2);
  CHECK(cut.abs().max().item<double>() > 0.199);
  const double mass = normal_cdf(2) - normal_cdf(-2);
  CHECK(kolmogorov_distance(cut, [&](double x) { return (normal_cdf(x / 0.1) - normal_cdf(-2)) / mass; }) < kKolmogorovBound);
}

TEST_CASE("integers are uniform below their bound") {
  const RandomKey key = random_key(10, "integers");
  std::array<int, 6> counts{};
  for (int64_t i = 0; i < 60'000; ++i) counts.at(static_cast<size_t>(uniform_integer(key, i, 6)))++;
  for (int count : counts) CHECK(std::abs(count - 10'000) < 5 * std::sqrt(60'000 * 5.0 / 36));
  CHECK(uniform_integer(key, 3, 1) == 0);
  const int64_t huge = std::numeric_limits<int64_t>::max();
  CHECK(uniform_integer(key, 3, huge) == uniform_integer(key, 3, huge));
  CHECK(uniform_integer(key, 3, huge) < huge);
  CHECK_THROWS_AS(uniform_integer(key, 0, 0), Error);
}

TEST_CASE("a real is the first column of the row of its index") {
  const RandomKey key = random_key(11, "reals");
  const Tensor rows = uniform_rows(key, positions_up_to(50), same_sequence(50, 0), 1, at::kDouble);
  for (int64_t i = 0; i < 50; ++i) CHECK(uniform_real(key, i) == rows[i][0].item<double>());
}

TEST_CASE("rows that are named badly are refused") {
  const RandomKey key = random_key(12, "bad");
  const Tensor good = positions_up_to(3);
  CHECK_THROWS_AS(uniform_rows(key, good, positions_up_to(2), 1, at::kFloat), Error);
  CHECK_THROWS_AS(uniform_rows(key, good.to(at::kInt), good, 1, at::kFloat), Error);
  CHECK_THROWS_AS(uniform_rows(key, good, good.view({3, 1}), 1, at::kFloat), Error);
  CHECK_THROWS_AS(uniform_rows(key, good, good, -1, at::kFloat), Error);
  CHECK_THROWS_AS(uniform_rows(key, good, good + (int64_t{1} << 31), 1, at::kFloat), Error);
}
