// The one measure of equality (design: max|a−b| / max(max|b|, 1e-30)). Other shapes, and NaN, are infinitely far apart.
#pragma once

#include "core/tensor.h"

namespace moelab {

double relative_error(const Tensor& a, const Tensor& b);

}  // namespace moelab
