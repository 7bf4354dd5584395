#include "tests/support/compare.h"

#include <algorithm>
#include <limits>

namespace moelab {

double relative_error(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes()) return std::numeric_limits<double>::infinity();
  if (b.numel() == 0) return 0;
  const Tensor found = a.detach().to(at::kDouble), expected = b.detach().to(at::kDouble);
  return found.sub(expected).abs().max().item<double>() / std::max(expected.abs().max().item<double>(), 1e-30);
}

}  // namespace moelab
