// Rows of sequences of any lengths laid out as a grid [B,L], one sequence per row, so that attention stays within sequences.
#pragma once

#include "core/tensor.h"

namespace moelab {

class SequenceGrid {
 public:
  // The rows of a sequence go in the order of their positions, ties by row; sequences may be interleaved. int64, on the CPU.
  SequenceGrid(const Tensor& sequence_T, const Tensor& position_T, int64_t sequences);

  Tensor lay(const Tensor& rows) const;   // [T,…] to [B,L,…]; places without a row get 0
  Tensor take(const Tensor& grid) const;  // and back

  const Tensor& real_BL() const { return real_BL_; }  // bool; undefined where every place has a row

 private:
  int64_t sequences_, length_ = 0;
  Tensor cell_T_;  // b·L + l of each row; undefined where that is the row itself
  Tensor real_BL_;
};

}  // namespace moelab
