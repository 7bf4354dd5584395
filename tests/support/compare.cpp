#include "tests/support/compare.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moelab {

double relative_error(const Tensor& a, const Tensor& b) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  if (a.sizes() != b.sizes()) return kInfinite;
  if (b.numel() == 0) return 0;
  const Tensor found = a.detach().to(at::kDouble), expected = b.detach().to(at::kDouble);
  const double error = found.sub(expected).abs().max().item<double>() / std::max(expected.abs().max().item<double>(), 1e-30);
  return std::isnan(error) ? kInfinite : error;  // the larger of 0 and NaN may be 0
}

}  // namespace moelab
