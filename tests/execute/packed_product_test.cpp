// The kernel for few rows and short sums against sums in double, where the processor has it.
#include "core/packed_product.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using namespace moelab;

namespace {

// Numbers that begin `shift` floats after a line of the cache, with marks before and after them.
class Numbers {
 public:
  Numbers(int64_t count, int64_t shift, uint32_t seed) : count_(count), all_(allocate(count + 32 + shift)), shift_(shift) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> range(-1, 1);
    std::fill_n(all_.get(), count + 32 + shift, kMark);
    for (int64_t i = 0; i < count; ++i) data()[i] = range(random);
  }
  float* data() const { return all_.get() + 16 + shift_; }
  bool marks_stand() const { return data()[-1] == kMark && data()[count_] == kMark && data()[count_ + 7] == kMark; }

 private:
  static constexpr float kMark = 12345;
  struct Free {
    void operator()(float* at) const { std::free(at); }
  };
  using Memory = std::unique_ptr<float[], Free>;
  static Memory allocate(int64_t count) {
    return Memory(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(count * 4 + 63) / 64 * 64)));
  }
  int64_t count_;
  Memory all_;
  int64_t shift_;
};

struct Case {
  int64_t rows, columns, terms;
  bool a_turned, b_turned;
};

MatrixView<float> view(const Numbers& numbers, int64_t rows, int64_t columns, bool turned) {
  return turned ? MatrixView<float>{numbers.data(), columns, rows}.t() : MatrixView<float>{numbers.data(), rows, columns};
}

float at(const MatrixView<float>& m, int64_t row, int64_t column) {
  return m.turned ? m.data[column * m.columns + row] : m.data[row * m.columns + column];
}

// |error| ≤ terms·2⁻²⁴·Σ|a·b|, and one rounding of the sum.
void check_product(const Case& c, Put put, int64_t shift) {
  const Numbers a_memory(c.rows * c.terms, shift, 1), b_memory(c.terms * c.columns, shift, 2);
  const Numbers out(c.rows * c.columns, put == Put::kStream ? 0 : shift, 3);
  const std::vector<float> before(out.data(), out.data() + c.rows * c.columns);
  const MatrixView<float> a = view(a_memory, c.rows, c.terms, c.a_turned), b = view(b_memory, c.terms, c.columns, c.b_turned);
  packed_product(a, b, out.data(), put);
  CHECK(out.marks_stand());
  for (int64_t i = 0; i < c.rows * c.columns; ++i) {
    double sum = put == Put::kAdd ? before[static_cast<size_t>(i)] : 0, size = std::fabs(sum);
    for (int64_t k = 0; k < c.terms; ++k) {
      const double term = static_cast<double>(at(a, i / c.columns, k)) * at(b, k, i % c.columns);
      sum += term;
      size += std::fabs(term);
    }
    if (!(std::fabs(out.data()[i] - sum) <= static_cast<double>(c.terms + 2) * std::ldexp(size, -24)))
      FAIL("result " << i << " of " << c.rows << "×" << c.columns << " from " << c.terms << " terms (a turned " << c.a_turned
                     << ", b turned " << c.b_turned << "): " << out.data()[i] << " for " << sum);
  }
}

// False prints why the rest of a test has nothing to look at.
bool kernel_is_here() {
  const Numbers numbers(16 * 16, 0, 1);
  const MatrixView<float> square{numbers.data(), 16, 16};
  if (packed_product_pays(square, square)) return true;
  WARN("no AVX2, or a processor on which the library has wider ones: the library's products are used");
  return false;
}

}  // namespace

TEST_CASE("packed products are sums of products at every edge of their tiles, bands and blocks") {
  if (!kernel_is_here()) return;
  const int64_t rows[] = {1, 5, 6, 7, 48, 49, 55}, columns[] = {1, 8, 15, 16, 24, 257}, terms[] = {0, 1, 7, 8, 9, 256, 259};
  for (const bool a_turned : {false, true})
    for (const bool b_turned : {false, true})
      for (const int64_t r : rows)
        for (const int64_t c : columns)
          for (const int64_t t : terms)
            for (const Put put : {Put::kStore, Put::kStream, Put::kAdd})
              check_product({r, c, t, a_turned, b_turned}, put, /*shift=*/(r + c + t) % 3);
  for (const bool a_turned : {false, true}) check_product({300, 520, 530, a_turned, false}, Put::kStore, 0);
}

TEST_CASE("a packed product's bits depend neither on where its operands lie nor on the thread, nor a row's on the others") {
  if (!kernel_is_here()) return;
  constexpr int64_t kRows = 61, kColumns = 130, kTerms = 300;
  std::vector<std::vector<float>> results;
  const auto run = [&](int64_t shift, int64_t rows) {
    const Numbers a(kRows * kTerms, shift, 1), b(kTerms * kColumns, shift, 2), out(kRows * kColumns, shift, 3);
    packed_product({a.data(), rows, kTerms}, {b.data(), kTerms, kColumns}, out.data(), Put::kStore);
    results.emplace_back(out.data(), out.data() + 8 * kColumns);
  };
  run(0, kRows);
  run(1, kRows);
  run(0, 8);
  std::thread([&] { run(5, kRows); }).join();
  for (const std::vector<float>& result : results) CHECK(result == results.front());
}

TEST_CASE("a packed product passes NaN and infinity on to the results that have them as a term, and to no other") {
  if (!kernel_is_here()) return;
  for (const float odd : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const Numbers a(9 * 20, 0, 1), b(20 * 18, 0, 2), out(9 * 18, 0, 3);
    a.data()[4 * 20 + 13] = odd;
    packed_product({a.data(), 9, 20}, {b.data(), 20, 18}, out.data(), Put::kStore);
    for (int64_t i = 0; i < 9 * 18; ++i) CHECK(std::isfinite(out.data()[i]) == (i / 18 != 4));
  }
}

TEST_CASE("multiply leaves to the library what the packed kernel is not for") {
  const std::vector<float> memory(2000 * 32);
  const auto pays = [&](int64_t rows, int64_t columns, int64_t terms, bool turned) {
    const MatrixView<float> a{memory.data(), turned ? terms : rows, turned ? rows : terms, turned};
    return packed_product_pays(a, {memory.data(), terms, columns});
  };
  CHECK_FALSE(pays(1, 32, 32, false));     // a vector
  CHECK_FALSE(pays(32, 1, 32, false));
  CHECK_FALSE(pays(32, 32, 2000, false));  // long sums
  CHECK_FALSE(pays(32, 32, 2000, true));
}
