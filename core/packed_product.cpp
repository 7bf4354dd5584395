// Blocks of b are copied to panels of 16 columns, bands of a to strips of 6 rows; a tile of 6 × 16 sums stays in registers while
// it goes through up to 256 terms: 12 registers of sums, 2 of b, 1 of a. A panel (16 KB) stays in the first cache, a block
// (256 KB) in the second, and while one is multiplied the next is fetched: with few rows, weights are read while others are used.
#include "core/packed_product.h"

#include <algorithm>
#include <memory>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define MOELAB_AVX2 __attribute__((target("avx2,fma")))
#define MOELAB_AVX2_INLINE inline __attribute__((target("avx2,fma"), always_inline))

namespace moelab {
namespace {

constexpr int64_t kRows = 6, kColumns = 16;
constexpr int64_t kDepth = 256, kWidth = 256;  // of a block of b: terms and columns
constexpr int64_t kBand = 8 * kRows;           // rows of a that are copied at once: whole lines of the cache, if it is turned
constexpr int64_t kHeight = 6 * kBand;         // rows of results that stay in the second cache while their terms are added
constexpr int64_t kLanes = 8;
constexpr int64_t kStrip = kRows * kDepth + kLanes;  // its last term is written eight wide, too

struct Packed {
  alignas(64) float b[kDepth * kWidth];
  float a[kBand / kRows * kStrip];
};

Packed& packed_here() {
  thread_local const std::unique_ptr<Packed> packed(new Packed);
  return *packed;
}

int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

const float* block_of(const MatrixView<float>& b, int64_t term, int64_t column) {
  return b.data + (b.turned ? column * b.columns + term : term * b.columns + column);
}

// What is copied next, fetched in equal shares.
class Ahead {
 public:
  // Terms `term` on and columns `column` on, so many; a's rows are its transpose's columns.
  Ahead(const MatrixView<float>& b, int64_t term, int64_t terms, int64_t column, int64_t columns, int64_t shares)
      : row_(block_of(b, term, column)),
        step_(b.columns),
        rows_(b.turned ? columns : terms),
        width_(b.turned ? terms : columns),
        each_(whole(rows_, shares)) {}

  MOELAB_AVX2_INLINE void fetch() {
    constexpr int64_t kLine = 16;
    for (int64_t end = std::max<int64_t>(0, rows_ - each_); rows_ > end; --rows_, row_ += step_)
      for (int64_t i = 0; i < width_; i += kLine) __builtin_prefetch(row_ + i, 0, 2);
  }

 private:
  const float* row_;
  int64_t step_, rows_, width_, each_;
};

// The block of b after this one. Experts' weights lie behind one another, so after a matrix comes the next expert's.
Ahead block_after(MatrixView<float> b, int64_t term, int64_t column, int64_t tiles) {
  if ((term += kDepth) >= b.outer()) {
    term = 0;
    column += kWidth;
  }
  if (column >= b.inner()) {
    column = 0;
    b.data += b.rows * b.columns;
  }
  return {b, term, std::min(kDepth, b.outer() - term), column, std::min(kWidth, b.inner() - column), tiles};
}

// The band of a after this one, of the same terms or else of the next.
Ahead band_after(const MatrixView<float>& a, int64_t row, int64_t top, int64_t bottom, int64_t term, int64_t tiles) {
  if ((row += kBand) >= bottom) {
    row = top;
    term = std::min(term + kDepth, a.inner());
  }
  return {a.t(), term, std::min(kDepth, a.inner() - term), row, std::min(kBand, bottom - row), tiles};
}

struct Next {
  Ahead block, band;
};

// A block of b as panels.
struct Block {
  const float* panels;
  int64_t terms, columns;
};

template <Put put>
MOELAB_AVX2_INLINE void put_lanes(__m256 sum, float* out) {
  if constexpr (put == Put::kStream) _mm256_stream_ps(out, sum);
  else if constexpr (put == Put::kAdd) _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum));
  else _mm256_storeu_ps(out, sum);
}

template <Put put>
MOELAB_AVX2_INLINE void put_row(const __m256 (&sums)[2], float* out, int64_t columns) {
  if (columns >= kColumns) {
    put_lanes<put>(sums[0], out);
    put_lanes<put>(sums[1], out + kLanes);
    return;
  }
  alignas(32) float all[kColumns];
  _mm256_store_ps(all, sums[0]);
  _mm256_store_ps(all + kLanes, sums[1]);
  for (int64_t i = 0; i < columns; ++i) out[i] = put == Put::kAdd ? out[i] + all[i] : all[i];
}

// a: `turned` = term after term, kRows at a time; else row after row, kDepth apart.
template <int rows, Put put, bool turned>
MOELAB_AVX2_INLINE void tile(const float* a, const float* b, int64_t terms, float* out, int64_t step, int64_t columns) {
  __m256 sums[rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    if (put != Put::kStream) __builtin_prefetch(out + r * step, 1);
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < terms; ++k) {
    const __m256 left = _mm256_load_ps(b + k * kColumns), right = _mm256_load_ps(b + k * kColumns + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m256 factor = _mm256_broadcast_ss(turned ? a + k * kRows + r : a + r * kDepth + k);
      sums[r][0] = _mm256_fmadd_ps(factor, left, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(factor, right, sums[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) put_row<put>(sums[r], out + r * step, columns);
}

template <int rows, Put put, bool turned>
MOELAB_AVX2 void tiles(const float* a, const Block& b, float* out, int64_t step, Next& next) {
  for (int64_t c = 0; c < b.columns; c += kColumns) {
    next.block.fetch();
    next.band.fetch();
    tile<rows, put, turned>(a, b.panels + c * b.terms, b.terms, out + c, step, b.columns - c);
  }
}

template <Put put, bool turned>
void strip(int64_t rows, const float* a, const Block& b, float* out, int64_t step, Next& next) {
  switch (rows) {
    case 1: return tiles<1, put, turned>(a, b, out, step, next);
    case 2: return tiles<2, put, turned>(a, b, out, step, next);
    case 3: return tiles<3, put, turned>(a, b, out, step, next);
    case 4: return tiles<4, put, turned>(a, b, out, step, next);
    case 5: return tiles<5, put, turned>(a, b, out, step, next);
    default: return tiles<6, put, turned>(a, b, out, step, next);
  }
}

using Strip = void (*)(int64_t, const float*, const Block&, float*, int64_t, Next&);

Strip strip_for(Put put, bool turned) {
  switch (put) {
    case Put::kStream: return turned ? &strip<Put::kStream, true> : &strip<Put::kStream, false>;
    case Put::kAdd: return turned ? &strip<Put::kAdd, true> : &strip<Put::kAdd, false>;
    default: return turned ? &strip<Put::kStore, true> : &strip<Put::kStore, false>;
  }
}

// Eight terms of eight columns; b holds a column's terms beside one another, to holds a term's columns so.
MOELAB_AVX2_INLINE void turn_lanes(const float* b, int64_t step, float* to) {
  __m256 by_one[kLanes], by_two[kLanes], by_four[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) by_one[i] = _mm256_loadu_ps(b + i * step);
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    by_two[i] = _mm256_unpacklo_ps(by_one[i], by_one[i + 1]);
    by_two[i + 1] = _mm256_unpackhi_ps(by_one[i], by_one[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 4) {
    by_four[i] = _mm256_shuffle_ps(by_two[i], by_two[i + 2], 0x44);
    by_four[i + 1] = _mm256_shuffle_ps(by_two[i], by_two[i + 2], 0xee);
    by_four[i + 2] = _mm256_shuffle_ps(by_two[i + 1], by_two[i + 3], 0x44);
    by_four[i + 3] = _mm256_shuffle_ps(by_two[i + 1], by_two[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) {
    _mm256_store_ps(to + i * kColumns, _mm256_permute2f128_ps(by_four[i], by_four[i + 4], 0x20));
    _mm256_store_ps(to + (i + 4) * kColumns, _mm256_permute2f128_ps(by_four[i], by_four[i + 4], 0x31));
  }
}

// A block as panels; the last one's missing columns are zeros.
MOELAB_AVX2 void pack_b(const MatrixView<float>& all, int64_t term, int64_t terms, int64_t column, int64_t columns, float* to) {
  const bool turned = all.turned;
  const int64_t step = all.columns;
  const float* b = block_of(all, term, column);
  const int64_t full = columns / kColumns * kColumns, whole = turned ? terms / kLanes * kLanes : terms;
  if (turned) {
    for (int64_t c = 0; c < full; c += kLanes)
      for (int64_t k = 0; k < whole; k += kLanes)
        turn_lanes(b + c * step + k, step, to + c / kColumns * kColumns * terms + k * kColumns + c % kColumns);
  } else {
    for (int64_t k = 0; k < whole; ++k)
      for (int64_t c = 0; c < full; c += kLanes)
        _mm256_store_ps(to + c / kColumns * kColumns * terms + k * kColumns + c % kColumns, _mm256_loadu_ps(b + k * step + c));
  }
  for (int64_t c = 0; c < columns; c += kColumns)
    for (int64_t k = c < full ? whole : 0; k < terms; ++k)
      for (int64_t i = 0; i < kColumns; ++i)
        to[c * terms + k * kColumns + i] = c + i >= columns ? 0 : turned ? b[(c + i) * step + k] : b[k * step + c + i];
}

// Terms `term` on of a's rows `row` on, strip after strip.
MOELAB_AVX2 void pack_a(const MatrixView<float>& a, int64_t row, int64_t rows, int64_t term, int64_t terms, float* to) {
  if (!a.turned) {
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(a.data + (row + r) * a.columns + term, terms, to + r / kRows * kStrip + r % kRows * kDepth);
    return;
  }
  const float* from = a.data + term * a.columns + row;
  for (int64_t k = 0; k < terms; ++k, from += a.columns)
    for (int64_t r = 0; r < rows; r += kRows) {
      float* strip = to + r / kRows * kStrip + k * kRows;
      // Two more than are meant; the next term overwrites them.
      if (row + r + kLanes <= a.columns) _mm256_storeu_ps(strip, _mm256_loadu_ps(from + r));
      else std::copy_n(from + r, std::min(kRows, rows - r), strip);
    }
}

// One call: its results in pieces of `height_` rows, each a block of b after another.
class Product {
 public:
  Product(const MatrixView<float>& a, const MatrixView<float>& b, float* out, Put put)
      : a_(a), b_(b), out_(out), put_(put == Put::kStream && !can_stream() ? Put::kStore : put), packed_(packed_here()) {
    const int64_t rows = a.outer(), pieces = a.inner() > kDepth ? whole(rows, kHeight) : 1;
    height_ = whole(rows, pieces * kRows) * kRows;
  }

  void run() {
    for (int64_t top = 0; top < a_.outer(); top += height_)
      for (int64_t column = 0; column < b_.inner(); column += kWidth)
        for (int64_t term = 0; term == 0 || term < a_.inner(); term += kDepth)  // of no term, too: zeros
          run_block(top, std::min(a_.outer(), top + height_), column, term);
    if (put_ == Put::kStream) _mm_sfence();  // before another thread is told that they are there
  }

 private:
  // Whole lines, in one go.
  bool can_stream() const {
    return a_.inner() <= kDepth && b_.inner() % kLanes == 0 && reinterpret_cast<uintptr_t>(out_) % (kLanes * sizeof(float)) == 0;
  }

  void run_block(int64_t top, int64_t bottom, int64_t column, int64_t term) {
    const Block block{packed_.b, std::min(kDepth, a_.inner() - term), std::min(kWidth, b_.inner() - column)};
    pack_b(b_, term, block.terms, column, block.columns, packed_.b);
    const Strip multiply_strip = strip_for(term == 0 ? put_ : Put::kAdd, a_.turned);
    const int64_t panels = whole(block.columns, kColumns);
    Ahead next_block = block_after(b_, term, column, whole(bottom - top, kRows) * panels);
    for (int64_t row = top; row < bottom; row += kBand) {
      const int64_t rows = std::min(kBand, bottom - row);
      pack_a(a_, row, rows, term, block.terms, packed_.a);
      Next next{next_block, band_after(a_, row, top, bottom, term, whole(rows, kRows) * panels)};
      for (int64_t r = 0; r < rows; r += kRows)
        multiply_strip(std::min(kRows, rows - r), packed_.a + r / kRows * kStrip, block, out_ + (row + r) * b_.inner() + column,
                       b_.inner(), next);
      next_block = next.block;
    }
  }

  MatrixView<float> a_, b_;
  float* out_;
  Put put_;
  Packed& packed_;
  int64_t height_;
};

// The library's kernels are wider than ours where there is AVX-512, but on AMD's processors it keeps to AVX2.
bool as_wide_as_the_library() {
  static const bool is = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         (!__builtin_cpu_supports("avx512f") || __builtin_cpu_is("amd"));
  return is;
}

}  // namespace

bool packed_product_pays(const MatrixView<float>& a, const MatrixView<float>& b) {
  constexpr int64_t kFew = 8;      // rows: below, copying b costs more than multiplying it
  constexpr int64_t kLong = 1280;  // terms: above, results are read and written again too often
  return as_wide_as_the_library() && b.inner() >= kLanes && a.outer() >= kFew && a.inner() <= kLong;
}

void packed_product(const MatrixView<float>& a, const MatrixView<float>& b, float* out, Put put) {
  Product(a, b, out, put).run();
}

}  // namespace moelab

#else

namespace moelab {

bool packed_product_pays(const MatrixView<float>&, const MatrixView<float>&) { return false; }
void packed_product(const MatrixView<float>& a, const MatrixView<float>& b, float* out, Put put) { multiply(a, b, out, put); }

}  // namespace moelab

#endif
