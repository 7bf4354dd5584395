// In which order whole documents are put end to end, after Lory (Zhong et al., 2024, arXiv:2405.03133) and in-context
// pretraining (Shi et al., 2024, arXiv:2310.10638): at random, or along a path of similar ones.
#pragma once

#include "core/params.h"
#include "core/random.h"
#include "core/tensor.h"

#include <cstdint>
#include <span>
#include <vector>

namespace moelab {

// 0 … count-1 in a uniform order that depends on the key alone.
std::vector<int64_t> shuffled_order(RandomKey key, int64_t count);

// How often tokens and pairs of neighbouring tokens occur in each document, hashed into kProfileEntries places. Two documents
// are as similar as the cosine of the roots of these counts: the overlap of the two distributions.
class DocumentProfiles {
 public:
  // Error(kUsage) for more than kMostSimilar documents: each is compared with each.
  explicit DocumentProfiles(int64_t documents);

  void set(int64_t document, std::span<const int64_t> tokens);

  // All documents once. From each the path goes to the most similar of its kNeighbours nearest that it has not seen; where it
  // has seen them all, it starts again at the first document that is left. The same on any number of threads.
  std::vector<int64_t> similar_path() const;

 private:
  std::vector<std::vector<int64_t>> neighbours() const;  // the nearest first, ties by lower number

  Tensor profile_NF_;  // whole numbers in float32
};

inline constexpr int64_t kProfileEntries = 1024;
inline constexpr int64_t kNeighbours = 32;
inline constexpr int64_t kMostSimilar = 32768;

}  // namespace moelab
