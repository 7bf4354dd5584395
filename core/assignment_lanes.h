// Eight numbers at a time, for the loops of the assignment solvers over the scores of one row. Plain compiler vectors: without
// AVX2 each becomes two of four. By reference throughout, for a vector by value would tie the calling convention to the
// processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace moelab {

inline constexpr int64_t kLanes = 8;
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));

// Such a function is compiled twice, and the loader takes the one that the processor can run. What it calls has to be inlined.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define MOELAB_LANES __attribute__((target_clones("avx2", "default")))
#else
#define MOELAB_LANES
#endif
#define MOELAB_INLINE [[gnu::always_inline]] inline

template <class Lanes, class Element>
MOELAB_INLINE void load(Lanes& to, const Element* from) {
  std::memcpy(&to, from, sizeof to);
}
template <class Lanes, class Element>
MOELAB_INLINE void store(Element* to, const Lanes& from) {
  std::memcpy(to, &from, sizeof from);
}

template <class Lanes>
MOELAB_INLINE void keep_larger(Lanes& lanes, const Lanes& other) {
  lanes = other > lanes ? other : lanes;
}
template <class Lanes>
MOELAB_INLINE void keep_smaller(Lanes& lanes, const Lanes& other) {
  lanes = other < lanes ? other : lanes;
}

// Lane i of `to` is lane i ^ step of `of`. Merged with its partners at steps 4, 2 and 1, each lane stands for all eight.
template <int step, class Lanes>
MOELAB_INLINE void partner(Lanes& to, const Lanes& of) {
  to = __builtin_shufflevector(of, of, step, 1 ^ step, 2 ^ step, 3 ^ step, 4 ^ step, 5 ^ step, 6 ^ step, 7 ^ step);
}

template <class Lanes>
MOELAB_INLINE auto largest(const Lanes& of) {
  Lanes lanes = of, other;
  partner<4>(other, lanes), keep_larger(lanes, other);
  partner<2>(other, lanes), keep_larger(lanes, other);
  partner<1>(other, lanes), keep_larger(lanes, other);
  return lanes[0];
}
template <class Lanes>
MOELAB_INLINE auto smallest(const Lanes& of) {
  return -largest(-of);
}

// The largest and the second largest so far; the same number twice is both.
template <class Lanes>
struct TopLanes {
  Lanes best, second;

  template <class Element>
  MOELAB_INLINE explicit TopLanes(Element none) : best(Lanes{} + none), second(best) {}

  MOELAB_INLINE void add(const Lanes& value) {
    const Lanes loser = value > best ? best : value;
    keep_larger(second, loser);
    keep_larger(best, value);
  }
  template <int step>
  MOELAB_INLINE void add_partner() {
    Lanes other_best, other_second;
    partner<step>(other_best, best), partner<step>(other_second, second);
    keep_larger(second, other_second);
    add(other_best);
  }
  MOELAB_INLINE void fold() { add_partner<4>(), add_partner<2>(), add_partner<1>(); }
};

// Where a walk along a row, kLanes at a time, first met what it looked for.
class FirstHit {
 public:
  MOELAB_INLINE void look(const Ints& hit) {
    const Ints here = hit ? index_ : first_;
    keep_smaller(first_, here);
    index_ += static_cast<int32_t>(kLanes);
  }
  MOELAB_INLINE int32_t get() const { return smallest(first_); }

 private:
  Ints index_ = {0, 1, 2, 3, 4, 5, 6, 7}, first_ = Ints{} + std::numeric_limits<int32_t>::max();
};

}  // namespace moelab
