// Counter-based random draws (Philox 4x32-10). A draw is a pure function of its key and of the row's (sequence, position):
// the number of ranks, micro-batches, padding, thread count, and stopping and resuming cannot change it.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <string>
#include <string_view>

namespace moelab {

// Names one stream. Equal keys give equal draws, also under another function below: one key serves one purpose.
struct RandomKey {
  uint64_t value = 0;

  // The key of a sub-stream: key.with("layer", 3).with("noise", 0).
  RandomKey with(std::string_view purpose, int64_t index = 0) const;
};

RandomKey random_key(int64_t seed, std::string_view purpose);

// Rows of draws: row t depends on (key, sequence_T[t], position_T[t]) alone, and column n only on n besides. Both index
// tensors are int64 [T] on the CPU, positions fit 32 bits. The values are made in double and rounded to `dtype`.
Tensor uniform_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns,
                    at::ScalarType dtype);  // [T, columns] in [0, 1)
Tensor normal_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns,
                   at::ScalarType dtype);   // standard normal
Tensor gumbel_rows(RandomKey key, const Tensor& sequence_T, const Tensor& position_T, int64_t columns,
                   at::ScalarType dtype);   // standard Gumbel: -ln(-ln u)

// Draws of a whole tensor, for initial weights: element i depends on (key, i).
Tensor normal_tensor(RandomKey key, at::IntArrayRef shape, double std, at::ScalarType dtype);
// Cut at 2 std, where `std` is that of the normal before the cut (afterwards it is 0.88 of it).
Tensor truncated_normal_tensor(RandomKey key, at::IntArrayRef shape, double std, at::ScalarType dtype);

// One integer in [0, bound), uniform, that depends on (key, index).
int64_t uniform_integer(RandomKey key, int64_t index, int64_t bound);
double uniform_real(RandomKey key, int64_t index);  // [0, 1)

}  // namespace moelab
