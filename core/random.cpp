#include "core/random.h"

#include "core/error.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <ATen/core/PhiloxRNGEngine.h>
#include <ATen/ops/empty.h>

#include <array>
#include <cmath>
#include <limits>
#include <numbers>

// Layout of a stream. The Philox key is RandomKey.value; the four counter words are
//
//   (block within the row, position, low half of sequence, high half of sequence)
//
// and one 128-bit block holds two draws of 64 bits: column n comes from half n % 2 of block n / 2. Rows cannot overlap while
// a position fits 32 bits and a row has at most 2^33 columns. A tensor is the row (0, 0), whatever its shape.
//
// Logarithms and cosines are taken one by one: ATen's vectorised ones may differ by a bit between the body and the tail of
// a tensor, and then a row would depend on its neighbours.

namespace moelab {
namespace {

using DrawPair = std::array<double, 2>;

at::Philox4_32 philox_at(RandomKey key, int64_t sequence, int64_t position) {
  return at::Philox4_32(key.value, static_cast<uint64_t>(sequence), static_cast<uint64_t>(position) << 32);
}

uint64_t next_word(at::Philox4_32& engine) {
  const uint64_t low = engine();
  return low | static_cast<uint64_t>(engine()) << 32;
}

double next_uniform(at::Philox4_32& engine) { return static_cast<double>(next_word(engine) >> 11) * 0x1p-53; }  // [0, 1)

// (0, 1). One bit less, since the half steps at the top would round to 1.
double next_open_uniform(at::Philox4_32& engine) {
  return (static_cast<double>(next_word(engine) >> 12) + 0.5) * 0x1p-52;
}

DrawPair uniform_pair(at::Philox4_32& engine) {
  const double first = next_uniform(engine);
  return {first, next_uniform(engine)};
}

DrawPair normal_pair(at::Philox4_32& engine) {  // Box-Muller
  const double radius = std::sqrt(-2.0 * std::log(next_open_uniform(engine)));
  const double angle = 2.0 * std::numbers::pi * next_uniform(engine);
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

DrawPair gumbel_pair(at::Philox4_32& engine) {
  const double first = -std::log(-std::log(next_open_uniform(engine)));
  return {first, -std::log(-std::log(next_open_uniform(engine)))};
}

using PairMaker = DrawPair (*)(at::Philox4_32&);

void fill_row(double* row, int64_t columns, at::Philox4_32 engine, PairMaker make_pair) {
  for (int64_t n = 0; n < columns; n += 2) {
    const DrawPair pair = make_pair(engine);
    row[n] = pair[0];
    if (n + 1 < columns) row[n + 1] = pair[1];
  }
}

void check_row_names(const Tensor& sequence_T, const Tensor& position_T, int64_t columns) {
  for (const Tensor& names : {sequence_T, position_T}) {
    check_invariant(names.defined() && names.dim() == 1 && names.scalar_type() == at::kLong && names.device().is_cpu(),
                    "random rows are named by int64 tensors [T] on the CPU");
  }
  check_invariant(sequence_T.numel() == position_T.numel(),
                  "random rows need as many positions as sequences: " + std::to_string(position_T.numel()) + " against " +
                      std::to_string(sequence_T.numel()));
  check_invariant(columns >= 0, "random rows cannot have " + std::to_string(columns) + " columns");
}

bool fits_32_bits(int64_t position) { return position == static_cast<int32_t>(position); }

Tensor draw_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns, PairMaker make_pair) {
  check_row_names(sequence_T, position_T, columns);
  const Tensor sequence = sequence_T.contiguous(), position = position_T.contiguous();
  const int64_t* sequences = sequence.const_data_ptr<int64_t>();
  const int64_t* positions = position.const_data_ptr<int64_t>();
  Tensor draws = at::empty({sequence.numel(), columns}, at::kDouble);
  double* out = draws.mutable_data_ptr<double>();
  for (int64_t t = 0; t < sequence.numel(); ++t) {
    if (!fits_32_bits(positions[t])) check_invariant(false, "position " + std::to_string(positions[t]) + " of a random row");
    fill_row(out + t * columns, columns, philox_at(key, sequences[t], positions[t]), make_pair);
  }
  return draws;
}

Tensor draw_tensor(RandomKey key, at::IntArrayRef shape, PairMaker make_pair) {
  Tensor draws = at::empty(shape, at::kDouble);
  fill_row(draws.mutable_data_ptr<double>(), draws.numel(), philox_at(key, 0, 0), make_pair);
  return draws;
}

// The largest number below 1, so that rounding a uniform to a short type never gives 1.
double below_one(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return 1.0 - std::numeric_limits<float>::epsilon() / 2;
    case at::kHalf: return 1.0 - static_cast<double>(std::numeric_limits<c10::Half>::epsilon()) / 2;
    case at::kBFloat16: return 1.0 - static_cast<double>(std::numeric_limits<c10::BFloat16>::epsilon()) / 2;
    default: return 1.0 - std::numeric_limits<double>::epsilon() / 2;
  }
}

}  // namespace

// XXH3 (64 bits) of the purpose, seeded by the parent, then of the index, seeded by that.
RandomKey RandomKey::with(std::string_view purpose, int64_t index) const {
  const uint64_t named = XXH3_64bits_withSeed(purpose.data(), purpose.size(), value);
  return {XXH3_64bits_withSeed(&index, sizeof index, named)};
}

RandomKey random_key(int64_t seed, std::string_view purpose) {
  return RandomKey{static_cast<uint64_t>(seed)}.with(purpose);
}

Tensor uniform_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns,
                    at::ScalarType dtype) {
  return draw_rows(key, sequence_T, position_T, columns, uniform_pair).clamp_max_(below_one(dtype)).to(dtype);
}

Tensor normal_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns,
                   at::ScalarType dtype) {
  return draw_rows(key, sequence_T, position_T, columns, normal_pair).to(dtype);
}

Tensor gumbel_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns,
                   at::ScalarType dtype) {
  return draw_rows(key, sequence_T, position_T, columns, gumbel_pair).to(dtype);
}

Tensor normal_tensor(RandomKey key, at::IntArrayRef shape, double std, at::ScalarType dtype) {
  return draw_tensor(key, shape, normal_pair).mul_(std).to(dtype);
}

// Inverse of the normal distribution function between -2 and 2. `std` is that of the normal before the cut.
Tensor truncated_normal_tensor(RandomKey key, at::IntArrayRef shape, double std, at::ScalarType dtype) {
  const double mass = std::erf(std::numbers::sqrt2);  // P(|z| < 2)
  Tensor draws = draw_tensor(key, shape, uniform_pair).mul_(2 * mass).sub_(mass).erfinv_().mul_(std::numbers::sqrt2);
  return draws.clamp_(-2, 2).mul_(std).to(dtype);
}

int64_t uniform_integer(RandomKey key, int64_t index, int64_t bound) {
  check_invariant(bound > 0, "a random integer needs a bound above 0, not " + std::to_string(bound));
  const uint64_t range = static_cast<uint64_t>(bound);
  const uint64_t limit = std::numeric_limits<uint64_t>::max() / range * range;  // words from here on would favour small values
  at::Philox4_32 engine = philox_at(key, index, 0);
  uint64_t word = next_word(engine);
  while (word >= limit) word = next_word(engine);
  return static_cast<int64_t>(word % range);
}

double uniform_real(RandomKey key, int64_t index) {
  at::Philox4_32 engine = philox_at(key, index, 0);
  return next_uniform(engine);
}

}  // namespace moelab
