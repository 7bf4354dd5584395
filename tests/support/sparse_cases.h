// Seeded random sparse plans, and the error measure of the executors' tests.
#pragma once

#include "core/expert.h"
#include "core/plan.h"
#include "tests/support/compare.h"

#include <random>

namespace moelab::testing {

struct SparseCase {
  SparsePlan plan;
  Tensor gate_TK;  // a leaf that requires a gradient
};

// Every row chooses k distinct experts; each pair is dropped with probability `drop`, and some experts take nobody.
SparseCase random_sparse_case(std::mt19937_64& draw, int64_t rows, int64_t experts, int64_t k, double drop,
                              at::ScalarType dtype);

Tensor random_leaf(std::mt19937_64& draw, std::vector<int64_t> shape, at::ScalarType dtype, bool requires_grad = true);

// An `ffn` bank; the biases are given random values, so that they are seen.
std::unique_ptr<ExpertBank> ffn_bank(int64_t width, int64_t experts, int64_t hidden, const std::string& activation, bool bias,
                                     at::ScalarType dtype, int64_t seed = 1);

}  // namespace moelab::testing
