// The losses by plain loops in double, straight from the papers' sums: what the tensor code is compared with.
#pragma once

#include "tests/support/decisions.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace moelab::test {

using Choices = std::vector<std::vector<int64_t>>;

inline double plain_cv2(const std::vector<double>& sums, bool sample = false) {
  double mean = 0, variance = 0;
  for (double sum : sums) mean += sum / sums.size();
  for (double sum : sums) variance += (sum - mean) * (sum - mean) / (sums.size() - (sample ? 1 : 0));
  return variance / (mean * mean);
}

inline Rows plain_softmax(Rows rows) {
  for (auto& row : rows) {
    double total = 0;
    for (double& value : row) total += value = std::exp(value);
    for (double& value : row) value /= total;
  }
  return rows;
}

inline std::vector<double> plain_column_sums(const Rows& rows) {
  std::vector<double> sums(rows.front().size());
  for (const auto& row : rows)
    for (size_t e = 0; e < row.size(); ++e) sums[e] += row[e];
  return sums;
}

// E · Σ f·P over the first `counted` choices of each row.
inline double plain_balance(const Choices& choices, const Rows& probabilities, size_t counted) {
  const double rows = probabilities.size(), experts = probabilities.front().size();
  std::vector<double> count(probabilities.front().size());
  for (const auto& row : choices)
    for (size_t k = 0; k < counted; ++k)
      if (row[k] >= 0) count[row[k]] += 1;
  const std::vector<double> mass = plain_column_sums(probabilities);
  double sum = 0;
  for (size_t e = 0; e < count.size(); ++e) sum += count[e] / rows * mass[e] / rows;
  return experts * sum;
}

// The k-th largest of the row, with or without entry e.
inline double plain_threshold(std::vector<double> row, size_t e, size_t k, bool include_self) {
  if (!include_self) row.erase(row.begin() + e);
  std::sort(row.begin(), row.end(), std::greater<>());
  return row[k - 1];
}

inline Rows plain_load(const Rows& clean, const Rows& noisy, const Rows& std, size_t k, bool include_self) {
  Rows load = clean;
  for (size_t t = 0; t < clean.size(); ++t)
    for (size_t e = 0; e < clean[t].size(); ++e) {
      const double z = (clean[t][e] - plain_threshold(noisy[t], e, k, include_self)) / std[t][e];
      load[t][e] = 0.5 * (1 + std::erf(z / std::sqrt(2.0)));
    }
  return load;
}

inline double plain_z(const Rows& logits) {
  double sum = 0;
  for (const auto& row : logits) {
    double total = 0;
    for (double value : row) total += std::exp(value);
    sum += std::log(total) * std::log(total);
  }
  return sum / logits.size();
}

inline double plain_entropy(const Rows& probabilities) {
  double sum = 0;
  for (const auto& row : probabilities)
    for (double p : row)
      if (p > 0) sum -= p * std::log(p);
  return sum / probabilities.size();
}

}  // namespace moelab::test
