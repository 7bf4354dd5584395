// Draws from finite distributions, the same on every machine.
#pragma once

#include <cstdint>
#include <vector>

namespace moelab {

// Probability of source s in proportion to (s + 1)^-exponent.
std::vector<double> zipf_prior(int64_t sources, double exponent);

// Running sums of each row of `count` weights, scaled so that each row ends at exactly 1.
std::vector<double> running_sums(std::vector<double> weights, int64_t count);

// The entry of a row of running sums that `uniform`, in [0, 1), falls into.
int64_t draw_from(const double* sums, int64_t count, double uniform);

}  // namespace moelab
