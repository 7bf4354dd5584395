#include "datasets/dirichlet.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moelab {
namespace {

// Logarithm of a Gamma(shape, 1) draw: Marsaglia and Tsang (2000) for shape + 1, then Gamma(a) = Gamma(a + 1) · U^(1/a). The
// logarithm keeps tiny shapes from underflowing. The standard library's draw differs from one implementation to the next.
double log_gamma_draw(DrawSequence& draws, double shape) {
  const double d = shape + 1 - 1.0 / 3;
  const double c = 1 / std::sqrt(9 * d);
  while (true) {
    const double x = draws.normal();
    const double v = std::pow(1 + c * x, 3);
    if (v <= 0) continue;
    if (std::log(draws.open_uniform()) < 0.5 * x * x + d - d * v + d * std::log(v)) {
      return std::log(d * v) + std::log(draws.open_uniform()) / shape;
    }
  }
}

}  // namespace

double DrawSequence::normal() {  // Box and Muller
  const double radius = std::sqrt(-2 * std::log(open_uniform()));
  return radius * std::cos(2 * std::numbers::pi * uniform());
}

void draw_dirichlet(DrawSequence& draws, double alpha, double* row, int64_t count) {
  for (int64_t v = 0; v < count; ++v) row[v] = log_gamma_draw(draws, alpha);
  const double largest = *std::max_element(row, row + count);
  double total = 0;
  for (int64_t v = 0; v < count; ++v) total += row[v] = std::exp(row[v] - largest);
  for (int64_t v = 0; v < count; ++v) row[v] /= total;
}

}  // namespace moelab
