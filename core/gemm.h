// One matrix product on raw memory: the library's BLAS without the cost of a tensor call, or our own kernel where it is faster.
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

// kStore: out = a·b. kStream: the same, for what nobody reads soon; it may go past the caches. kAdd: out += a·b.
enum class Put { kStore, kStream, kAdd };

// `out` is [a.outer(), b.inner()] in row-major order and overlaps neither.
template <class Scalar>
void multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, Put put = Put::kStore);

// The library's product alone, for measurements beside ours; kStream is kStore there.
template <class Scalar>
void library_multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, Put put = Put::kStore);

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

extern template void multiply(const MatrixView<float>&, const MatrixView<float>&, float*, Put);
extern template void multiply(const MatrixView<double>&, const MatrixView<double>&, double*, Put);
extern template void multiply(const MatrixView<c10::BFloat16>&, const MatrixView<c10::BFloat16>&, c10::BFloat16*, Put);
extern template void library_multiply(const MatrixView<float>&, const MatrixView<float>&, float*, Put);

}  // namespace moelab
