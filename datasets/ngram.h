// Interpolated n-gram models of bytes after Witten and Bell (1991, The zero-frequency problem), method C, as baselines.
//
// With h the last k bytes, h' the last k-1, c(h) how often something follows h in the training text, c(h,b) how often b
// does, and N(h) how many different bytes do:
//
//   P_k(b | h) = (c(h,b) + N(h) · P_{k-1}(b | h')) / (c(h) + N(h)),    P_{-1}(b) = 1/256
//
// Where h was never seen, P_k = P_{k-1}.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moelab {

class NgramModel {
 public:
  // `longest` is the longest context in bytes, 0 … 7.
  NgramModel(std::span<const uint8_t> train, int longest);

  int longest() const { return static_cast<int>(levels_.size()) - 1; }

  // P_0 … P_longest of `next` after `history`, its last byte latest. Contexts longer than the history are cut to it.
  std::vector<double> probabilities(std::span<const uint8_t> history, uint8_t next) const;

 private:
  // All different (k+1)-byte strings of the text as big-endian numbers, sorted: those that continue one context are neighbours.
  struct Level {
    std::vector<uint64_t> strings;
    std::vector<uint32_t> counts;

    Level(std::span<const uint8_t> text, size_t length);
    double interpolate(uint64_t context, uint8_t next, double shorter) const;  // P_k from P_{k-1}
  };

  std::vector<Level> levels_;
};

// Bits per byte that each model, with contexts of at most 0 … longest bytes, needs for `text`, predicting every byte of it
// from those before it. NaN for an empty text.
std::vector<double> bits_per_byte(const NgramModel& model, std::span<const uint8_t> text);

}  // namespace moelab
