// Draws from a Dirichlet distribution, the same on every machine.
#pragma once

#include "core/random.h"

#include <cstdint>

namespace moelab {

// Draws one after the other from one key.
class DrawSequence {
 public:
  explicit DrawSequence(RandomKey key) : key_(key) {}
  double uniform() { return uniform_real(key_, used_++); }  // [0, 1)
  double open_uniform() { return 1 - uniform(); }           // (0, 1]
  double normal();

 private:
  RandomKey key_;
  int64_t used_ = 0;
};

// Fills row[0 … count) with one draw of Dirichlet(alpha, …, alpha).
void draw_dirichlet(DrawSequence& draws, double alpha, double* row, int64_t count);

}  // namespace moelab
