// Compiled with -O3 and OpenMP's simd notes (CMakeLists.txt); float loops exist in three widths, chosen when the library is
// loaded.
//
// exp in float: x = n·ln 2 + r with |r| ≤ ln 2 / 2, and a polynomial in r within 4e-9 of e^r. Φ, the normal distribution, in
// float: ½ + z·P(z²)/Q(z²) within 2e-8 up to |z| = 5.5, then 0 or 1. The coefficients are least squares whose weights were raised
// where the error was largest, until it was level. Terms are summed in pairs: the processor overlaps few turns of such a long
// loop, so the longest chain of additions is what it waits for. In double both are the C library's.
#include "core/row_loops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define MOELAB_WIDTHS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MOELAB_WIDTHS
#endif
#define MOELAB_INLINE inline __attribute__((always_inline))

namespace moelab {
namespace {

// For x ≤ 0. Below −87.7 the power's bits are those of 0.
MOELAB_INLINE float exp_of(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5·2²³: adding it leaves the nearest integer in the low bits
  const float bounded = x < -88.0f ? -88.0f : x;  // NaN stays
  const float shifted = bounded * 1.44269504f + kRounder, n = shifted - kRounder;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const float rr = r * r, low = (0.5f + 0.16666533f * r) + rr * (0.0416672424f + 0.00836760983f * r + 0.00138636683f * rr);
  const float sum = (1.0f + r) + rr * low;
  return sum * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
}
MOELAB_INLINE double exp_of(double x) { return std::exp(x); }

template <class Sum>
struct Normal {
  Sum below;    // Φ(z)
  Sum density;  // φ(z)
};

MOELAB_INLINE Normal<float> normal_of(float z) {
  const float s = z * z, ss = s * s;
  const float p = (0.398942235f + 0.0338519909f * s) + ss * ((0.00467721605f + 1.68818245e-4f * s) +
                                                             ss * (6.35200015e-6f + 2.27495332e-8f * s));
  const float q = (1.0f + 0.251520277f * s) + ss * ((0.0286454845f + 0.00188440382f * s) +
                                                    ss * (7.36447474e-5f + 1.1974999e-6f * s));
  const float size = std::fabs(z), half = size > 5.5f ? 0.5f : size * p / q;  // NaN stays
  return {0.5f + std::copysign(half, z), exp_of(-0.5f * s) * 0.398942280f};
}
MOELAB_INLINE Normal<double> normal_of(double z) {
  return {0.5 * std::erfc(-z * 0.70710678118654752440), std::exp(-0.5 * z * z) * 0.39894228040143267794};
}

template <class Sum>
struct Activated {
  Sum value;
  Sum slope;
};

template <class Sum>
MOELAB_INLINE Sum sigmoid_of(Sum z) {
  const Sum power = exp_of(-std::fabs(z));
  return (z < 0 ? power : Sum(1)) / (Sum(1) + power);
}

template <FfnActivation kind, class Sum>
MOELAB_INLINE Activated<Sum> activated(Sum z) {
  if constexpr (kind == FfnActivation::kRelu) return {z < 0 ? Sum(0) : z, z > 0 ? Sum(1) : Sum(0)};  // NaN stays
  if constexpr (kind == FfnActivation::kGelu) {
    const Normal<Sum> normal = normal_of(z);
    return {z * normal.below, normal.below + z * normal.density};
  }
  if constexpr (kind == FfnActivation::kGeluTanh) {  // z·(1 + tanh u)/2 = z·σ(2u)
    constexpr Sum kTwo = Sum(1.59576912160573071176), kCube = Sum(0.044715);
    const Sum share = sigmoid_of(kTwo * (z + kCube * z * z * z));
    return {z * share, share + z * share * (1 - share) * kTwo * (1 + 3 * kCube * z * z)};
  }
  const Sum share = sigmoid_of(z);  // silu
  return {z * share, share * (1 + z * (1 - share))};
}

template <FfnActivation kind, class Scalar, class Sum>
MOELAB_INLINE void activate_loop(const Scalar* h, const Scalar* up, Scalar* a, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Sum value = activated<kind>(static_cast<Sum>(h[i])).value;
    if constexpr (kind == FfnActivation::kSwiglu) value *= static_cast<Sum>(up[i]);
    a[i] = static_cast<Scalar>(value);
  }
}

template <FfnActivation kind, class Scalar, class Sum>
MOELAB_INLINE Sum activate_backward_loop(const Scalar* h, const Scalar* up, Sum gate, Scalar* a, Scalar* grad, Scalar* grad_up,
                                         int64_t count) {
  Sum product = 0;
#pragma omp simd reduction(+ : product)
  for (int64_t i = 0; i < count; ++i) {
    const Activated<Sum> at = activated<kind>(static_cast<Sum>(h[i]));
    const Sum from_above = static_cast<Sum>(grad[i]);
    Sum value = at.value, slope = at.slope;
    if constexpr (kind == FfnActivation::kSwiglu) {
      grad_up[i] = static_cast<Scalar>(gate * from_above * value);
      value *= static_cast<Sum>(up[i]);
      slope *= static_cast<Sum>(up[i]);
    }
    a[i] = static_cast<Scalar>(value);
    product += from_above * value;
    grad[i] = static_cast<Scalar>(gate * from_above * slope);
  }
  return product;
}

template <class Scalar, class Sum>
MOELAB_INLINE void any_activate(FfnActivation activation, const Scalar* h, const Scalar* up, Scalar* a, int64_t count) {
  switch (activation) {
    case FfnActivation::kRelu: return activate_loop<FfnActivation::kRelu, Scalar, Sum>(h, up, a, count);
    case FfnActivation::kGelu: return activate_loop<FfnActivation::kGelu, Scalar, Sum>(h, up, a, count);
    case FfnActivation::kGeluTanh: return activate_loop<FfnActivation::kGeluTanh, Scalar, Sum>(h, up, a, count);
    case FfnActivation::kSwiglu: return activate_loop<FfnActivation::kSwiglu, Scalar, Sum>(h, up, a, count);
  }
}

template <class Scalar, class Sum>
MOELAB_INLINE Sum any_activate_backward(FfnActivation activation, const Scalar* h, const Scalar* up, Sum gate, Scalar* a,
                                        Scalar* grad, Scalar* grad_up, int64_t count) {
  switch (activation) {
    case FfnActivation::kRelu: return activate_backward_loop<FfnActivation::kRelu>(h, up, gate, a, grad, grad_up, count);
    case FfnActivation::kGelu: return activate_backward_loop<FfnActivation::kGelu>(h, up, gate, a, grad, grad_up, count);
    case FfnActivation::kGeluTanh: return activate_backward_loop<FfnActivation::kGeluTanh>(h, up, gate, a, grad, grad_up, count);
    default: return activate_backward_loop<FfnActivation::kSwiglu>(h, up, gate, a, grad, grad_up, count);
  }
}

template <class Scalar>
MOELAB_INLINE void any_softmax(const Scalar* logits, Scalar* probs, int64_t count) {
  Scalar largest = -std::numeric_limits<Scalar>::infinity(), sum = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    probs[i] = exp_of(logits[i] - largest);
    sum += probs[i];
  }
  const Scalar scale = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) probs[i] *= scale;
}

template <class Scalar, class Sum>
MOELAB_INLINE Sum any_dot(const Scalar* a, const Scalar* b, int64_t count) {
  Sum sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<Sum>(a[i]) * static_cast<Sum>(b[i]);
  return sum;
}

template <class Scalar>
MOELAB_INLINE void any_softmax_backward(const Scalar* probs, Scalar* grad, int64_t count) {
  const Scalar mean = any_dot<Scalar, Scalar>(probs, grad, count);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad[i] = probs[i] * (grad[i] - mean);
}

// By insertion: k is small, and equal values keep the earlier place first.
template <class Scalar>
void insertion_topk(const Scalar* row, int64_t count, int64_t k, int64_t* best) {
  int64_t filled = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (filled == k && (k == 0 || !(row[e] > row[best[k - 1]]))) continue;
    int64_t at = filled < k ? filled++ : k - 1;
    for (; at > 0 && row[e] > row[best[at - 1]]; --at) best[at] = best[at - 1];
    best[at] = e;
  }
}

constexpr int64_t kChunk = 16, kMostChunks = 64, kTaken = std::numeric_limits<int64_t>::min();

// Orders as (value, earlier place first) does: the float's bits as a signed number, above the place's complement.
MOELAB_INLINE int64_t key_of(float value, int64_t place) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);  // −0 is 0
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return (static_cast<int64_t>(ordered) << 32) | static_cast<int64_t>(~static_cast<uint32_t>(place));
}

MOELAB_INLINE int64_t largest_of(const int64_t* keys, int64_t count) {
  int64_t largest = kTaken;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < count; ++j) largest = keys[j] > largest ? keys[j] : largest;
  return largest;
}

// The largest of a chunk below `bound`, which is one of its keys: no two are equal.
MOELAB_INLINE int64_t largest_below(const int64_t* keys, int64_t bound) {
  int64_t largest = kTaken;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < kChunk; ++j) {
    const int64_t key = keys[j] < bound ? keys[j] : kTaken;
    largest = key > largest ? key : largest;
  }
  return largest;
}

MOELAB_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One by one: a vector could not be loaded before the entry that was written last has left the processor's store buffer.
MOELAB_INLINE int64_t largest_top(const int64_t* tops, int64_t count) {
  int64_t largest = kTaken;
  for (int64_t c = 0; c < count; c += 4)
    largest = larger(largest, larger(larger(tops[c], tops[c + 1]), larger(tops[c + 2], tops[c + 3])));
  return largest;
}

// Chunks of 16 keys with the largest of each: a choice looks at the chunks' largest, then for the next one of that chunk. Keys
// stay as they are, for the reason above.
MOELAB_WIDTHS void chunked_topk(const float* row, int64_t count, int64_t k, int64_t* best) {
  const int64_t chunks = (count + kChunk - 1) / kChunk, tops = (chunks + 3) / 4 * 4;
  alignas(64) int64_t keys[kMostChunks * kChunk], largest[kMostChunks];
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) keys[e] = key_of(row[e], e);
  std::fill(keys + count, keys + chunks * kChunk, kTaken);
  std::fill(largest + chunks, largest + tops, kTaken);
  for (int64_t c = 0; c < chunks; ++c) largest[c] = largest_of(keys + c * kChunk, kChunk);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t key = largest_top(largest, tops);
    best[i] = static_cast<int64_t>(~static_cast<uint32_t>(key));
    largest[best[i] / kChunk] = largest_below(keys + best[i] / kChunk * kChunk, key);
  }
}

}  // namespace

MOELAB_WIDTHS void softmax_row(const float* logits, float* probs, int64_t count) { any_softmax(logits, probs, count); }
void softmax_row(const double* logits, double* probs, int64_t count) { any_softmax(logits, probs, count); }

MOELAB_WIDTHS void softmax_row_backward(const float* probs, float* grad, int64_t count) {
  any_softmax_backward(probs, grad, count);
}
void softmax_row_backward(const double* probs, double* grad, int64_t count) { any_softmax_backward(probs, grad, count); }

void topk_of_row(const float* row, int64_t count, int64_t k, int64_t* best) {
  if (count >= kChunk && count <= kChunk * kMostChunks) return chunked_topk(row, count, k, best);
  insertion_topk(row, count, k, best);
}
void topk_of_row(const double* row, int64_t count, int64_t k, int64_t* best) { insertion_topk(row, count, k, best); }

#define MOELAB_ROW_LOOPS(Scalar, Sum, widths)                                                                                 \
  widths void activate_row(FfnActivation activation, const Scalar* h, const Scalar* up, Scalar* a, int64_t count) {           \
    any_activate<Scalar, Sum>(activation, h, up, a, count);                                                                   \
  }                                                                                                                           \
  widths Sum activate_row_backward(FfnActivation activation, const Scalar* h, const Scalar* up, Sum gate, Scalar* a,          \
                                   Scalar* grad, Scalar* grad_up, int64_t count) {                                            \
    return any_activate_backward<Scalar, Sum>(activation, h, up, gate, a, grad, grad_up, count);                              \
  }                                                                                                                           \
  widths void scale_row(Scalar* row, Sum weight, int64_t count) {                                                             \
    for (int64_t i = 0; i < count; ++i) row[i] = static_cast<Scalar>(weight * static_cast<Sum>(row[i]));                      \
  }                                                                                                                           \
  widths void add_row(Sum* to, const Scalar* row, Sum weight, int64_t count) {                                                \
    for (int64_t i = 0; i < count; ++i) to[i] += weight * static_cast<Sum>(row[i]);                                           \
  }                                                                                                                           \
  widths void shift_row(Scalar* row, const Scalar* by, int64_t count) {                                                       \
    for (int64_t i = 0; i < count; ++i) row[i] = static_cast<Scalar>(static_cast<Sum>(row[i]) + static_cast<Sum>(by[i]));     \
  }                                                                                                                           \
  widths Sum dot_rows(const Scalar* a, const Scalar* b, int64_t count) { return any_dot<Scalar, Sum>(a, b, count); }
#define MOELAB_ONE_WIDTH
MOELAB_ROW_LOOPS(float, float, MOELAB_WIDTHS)
MOELAB_ROW_LOOPS(double, double, MOELAB_WIDTHS)
MOELAB_ROW_LOOPS(c10::BFloat16, float, MOELAB_ONE_WIDTH)

}  // namespace moelab
