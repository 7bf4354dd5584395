// One matrix product on raw memory: the library's BLAS without the cost of a tensor call.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace moelab {

// A matrix in row-major order without gaps, [rows,columns]; `turned` = its transpose is meant.
template <class Scalar>
struct MatrixView {
  const Scalar* data;
  int64_t rows;
  int64_t columns;
  bool turned = false;
  MatrixView t() const { return {data, rows, columns, !turned}; }
  int64_t outer() const { return turned ? columns : rows; }
  int64_t inner() const { return turned ? rows : columns; }
};

// out = a·b, or out += a·b. `out` is [a.outer(), b.inner()] in row-major order and overlaps neither.
template <class Scalar>
void multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, bool add = false);

// Products of this thread use one thread while it lives, and the kernel that one thread gets: without it the library may take
// another one where more threads are allowed, even inside a parallel region that leaves it one.
class OneThreadProducts {
 public:
  OneThreadProducts();
  ~OneThreadProducts();
  OneThreadProducts(const OneThreadProducts&) = delete;
  OneThreadProducts& operator=(const OneThreadProducts&) = delete;

 private:
  int before_;
};

extern template void multiply(const MatrixView<float>&, const MatrixView<float>&, float*, bool);
extern template void multiply(const MatrixView<double>&, const MatrixView<double>&, double*, bool);
extern template void multiply(const MatrixView<c10::BFloat16>&, const MatrixView<c10::BFloat16>&, c10::BFloat16*, bool);

}  // namespace moelab
