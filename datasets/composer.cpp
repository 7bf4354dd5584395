#include "datasets/composer.h"

#include "core/error.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

namespace moelab {
namespace {

// Profiles have this length, rounded to whole numbers: every product and every sum on the way to a cosine is then a whole
// number below 2^24, exact in float32 in whatever order it is added up.
constexpr double kProfileLength = 4000;
constexpr int64_t kRowsAtOnce = 256;
constexpr uint64_t kGoldenRatio = 0x9e3779b97f4a7c15;  // Fibonacci hashing (Knuth, vol. 3, 6.4)

size_t profile_entry(uint64_t kind) { return kind * kGoldenRatio >> (64 - std::countr_zero(uint64_t{kProfileEntries})); }

uint64_t pair_kind(int64_t first, int64_t second) {
  return (static_cast<uint64_t>(first) + 1) << 32 | static_cast<uint64_t>(second);
}

// The `count` largest of a row, without entry `self`.
std::vector<int64_t> largest_others(const float* row, int64_t entries, int64_t self, int64_t count) {
  std::vector<int64_t> order(entries);
  std::iota(order.begin(), order.end(), 0);
  order.erase(order.begin() + self);
  count = std::min<int64_t>(count, std::ssize(order));
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [row](int64_t a, int64_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
  order.resize(count);
  return order;
}

}  // namespace

std::vector<int64_t> shuffled_order(RandomKey key, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = 0; i + 1 < count; ++i) std::swap(order[i], order[i + uniform_integer(key, i, count - i)]);
  return order;
}

DocumentProfiles::DocumentProfiles(int64_t documents) {
  if (documents > kMostSimilar)
    usage_error(fmt::format("`composer` = \"similarity\" compares each of {} documents with each, and stops at {}; "
                            "use \"random\"", documents, kMostSimilar));
  profile_NF_ = at::zeros({documents, kProfileEntries}, at::kFloat);
}

void DocumentProfiles::set(int64_t document, std::span<const int64_t> tokens) {
  std::vector<double> profile(kProfileEntries, 0.0);
  for (size_t i = 0; i < tokens.size(); ++i) {
    ++profile[profile_entry(static_cast<uint64_t>(tokens[i]))];
    if (i > 0) ++profile[profile_entry(pair_kind(tokens[i - 1], tokens[i]))];
  }
  const double total = std::accumulate(profile.begin(), profile.end(), 0.0);  // = the square of the roots' length
  float* row = profile_NF_.mutable_data_ptr<float>() + document * kProfileEntries;
  for (size_t i = 0; total > 0 && i < profile.size(); ++i)
    row[i] = static_cast<float>(std::round(kProfileLength * std::sqrt(profile[i] / total)));
}

std::vector<std::vector<int64_t>> DocumentProfiles::neighbours() const {
  const int64_t documents = profile_NF_.size(0);
  std::vector<std::vector<int64_t>> all;
  for (int64_t first = 0; first < documents; first += kRowsAtOnce) {
    const Tensor rows = profile_NF_.narrow(0, first, std::min(kRowsAtOnce, documents - first));
    const Tensor similarity_RN = at::mm(rows, profile_NF_.t()).contiguous();
    for (int64_t r = 0; r < rows.size(0); ++r)
      all.push_back(largest_others(similarity_RN.const_data_ptr<float>() + r * documents, documents, first + r, kNeighbours));
  }
  return all;
}

std::vector<int64_t> DocumentProfiles::similar_path() const {
  const std::vector<std::vector<int64_t>> near = neighbours();
  std::vector<bool> seen(near.size());
  std::vector<int64_t> path;
  for (size_t start = 0; start < near.size(); ++start) {
    for (int64_t here = static_cast<int64_t>(start); here >= 0 && !seen[here];) {
      seen[here] = true;
      path.push_back(here);
      const auto next = std::find_if(near[here].begin(), near[here].end(), [&](int64_t document) { return !seen[document]; });
      here = next == near[here].end() ? -1 : *next;
    }
  }
  return path;
}

}  // namespace moelab
