// The one torch header that public headers include, and the legend of the shape suffixes.
//
//   T rows (tokens, padding removed)   D model width        E experts (always the global number)
//   K choices per row                  N kept pairs         F expert width
//   S slots                            B sequences          G groups of rows, or parameter groups
//   C capacity of an expert            V vocabulary         L layers
//
// `logits_TE` has one row per token and one column per expert; `offsets_E1` has E + 1 entries.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace moelab {

using at::Tensor;

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

}  // namespace moelab
