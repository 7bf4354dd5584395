#include "datasets/discrete.h"

#include <algorithm>
#include <cmath>

namespace moelab {

std::vector<double> zipf_prior(int64_t sources, double exponent) {
  std::vector<double> prior(sources);
  double total = 0;
  for (int64_t s = 0; s < sources; ++s) total += prior[s] = std::pow(static_cast<double>(s + 1), -exponent);
  for (double& share : prior) share /= total;
  return prior;
}

std::vector<double> running_sums(std::vector<double> weights, int64_t count) {
  for (size_t begin = 0; begin < weights.size(); begin += count) {
    for (int64_t i = 1; i < count; ++i) weights[begin + i] += weights[begin + i - 1];
    const double total = weights[begin + count - 1];
    for (int64_t i = 0; i < count; ++i) weights[begin + i] /= total;
  }
  return weights;
}

int64_t draw_from(const double* sums, int64_t count, double uniform) {
  return std::upper_bound(sums, sums + count, uniform) - sums;
}

}  // namespace moelab
