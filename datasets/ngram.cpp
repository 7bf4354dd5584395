#include "datasets/ngram.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace moelab {
namespace {

constexpr int kLongestContext = 7;  // one more byte fills the 64-bit number

uint64_t string_number(std::span<const uint8_t> bytes) {
  uint64_t number = 0;
  for (const uint8_t byte : bytes) number = number << 8 | byte;
  return number;
}

}  // namespace

NgramModel::NgramModel(std::span<const uint8_t> train, int longest) {
  check_invariant(longest >= 0 && longest <= kLongestContext, "an n-gram context of " + std::to_string(longest) + " bytes");
  for (int context = 0; context <= longest; ++context) levels_.emplace_back(train, context + 1);
}

NgramModel::Level::Level(std::span<const uint8_t> text, size_t length) {
  std::vector<uint64_t> all;
  all.reserve(text.size());
  for (size_t end = length; end <= text.size(); ++end) all.push_back(string_number(text.subspan(end - length, length)));
  std::sort(all.begin(), all.end());
  for (size_t i = 0, next = 0; i < all.size(); i = next) {
    while (next < all.size() && all[next] == all[i]) ++next;
    strings.push_back(all[i]);
    counts.push_back(static_cast<uint32_t>(next - i));
  }
}

double NgramModel::Level::interpolate(uint64_t context, uint8_t next, double shorter) const {
  const auto followers = std::ranges::equal_range(strings, context, {}, [](uint64_t string) { return string >> 8; });
  if (followers.empty()) return shorter;
  uint64_t total = 0, hits = 0;
  for (auto it = followers.begin(); it != followers.end(); ++it) {
    const uint32_t count = counts[it - strings.begin()];
    total += count;
    if ((*it & 0xff) == next) hits = count;
  }
  const double kinds = static_cast<double>(followers.size());
  return (static_cast<double>(hits) + kinds * shorter) / (static_cast<double>(total) + kinds);
}

std::vector<double> NgramModel::probabilities(std::span<const uint8_t> history, uint8_t next) const {
  std::vector<double> by_context;
  double probability = 1.0 / 256;
  for (size_t k = 0; k < levels_.size(); ++k) {
    if (k <= history.size()) probability = levels_[k].interpolate(string_number(history.last(k)), next, probability);
    by_context.push_back(probability);
  }
  return by_context;
}

std::vector<double> bits_per_byte(const NgramModel& model, std::span<const uint8_t> text) {
  std::vector<double> bits(model.longest() + 1, 0.0);
  for (size_t i = 0; i < text.size(); ++i) {
    const size_t known = std::min<size_t>(i, model.longest());
    const std::vector<double> probability = model.probabilities(text.subspan(i - known, known), text[i]);
    for (size_t k = 0; k < bits.size(); ++k) bits[k] -= std::log2(probability[k]);
  }
  for (double& sum : bits) sum /= static_cast<double>(text.size());
  return bits;
}

}  // namespace moelab
