#include "core/gemm.h"

#include "core/packed_product.h"
#include "core/tensor.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <limits>
#include <type_traits>

// The Fortran entries of the BLAS inside LibTorch; weak, because another build of it may hide them.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                                  const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                                  const int*, const double*, const int*, const double*, double*, const int*);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int);  // answers with the number before; 0 = the global one
}

namespace moelab {
namespace {

template <class Scalar>
constexpr auto gemm_entry() {
  if constexpr (std::is_same_v<Scalar, float>) return &sgemm_;
  else return &dgemm_;
}

template <class Scalar>
bool fits_blas(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  return a.rows <= kMost && a.columns <= kMost && b.rows <= kMost && b.columns <= kMost;
}

// Row-major a·b is column-major bᵀ·aᵀ.
template <class Scalar>
void blas_multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, Put put) {
  const int m = static_cast<int>(b.inner()), n = static_cast<int>(a.outer()), k = static_cast<int>(a.inner());
  const int step_b = static_cast<int>(b.columns), step_a = static_cast<int>(a.columns);
  const Scalar one = 1, beta = put == Put::kAdd ? 1 : 0;
  gemm_entry<Scalar>()(b.turned ? "T" : "N", a.turned ? "T" : "N", &m, &n, &k, &one, b.data, &step_b, a.data, &step_a, &beta,
                       out, &m);
}

template <class Scalar>
Tensor tensor_of(const MatrixView<Scalar>& view) {
  const Tensor all = at::from_blob(const_cast<Scalar*>(view.data), {view.rows, view.columns},
                                   c10::CppTypeToScalarType<Scalar>::value);
  return view.turned ? all.t() : all;
}

template <class Scalar>
void tensor_multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, Put put) {
  const at::NoGradGuard no_grad;
  Tensor result = at::from_blob(out, {a.outer(), b.inner()}, c10::CppTypeToScalarType<Scalar>::value);
  if (put == Put::kAdd) result.addmm_(tensor_of(a), tensor_of(b));
  else at::mm_out(result, tensor_of(a), tensor_of(b));
}

}  // namespace

OneThreadProducts::OneThreadProducts() : before_(&MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
OneThreadProducts::~OneThreadProducts() {
  if (&MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
}

template <class Scalar>
void library_multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, Put put) {
  if (a.outer() == 0 || b.inner() == 0) return;
  if constexpr (!std::is_same_v<Scalar, c10::BFloat16>) {
    if (gemm_entry<Scalar>() != nullptr && fits_blas(a, b)) return blas_multiply(a, b, out, put);
  }
  tensor_multiply(a, b, out, put);
}

template <class Scalar>
void multiply(const MatrixView<Scalar>& a, const MatrixView<Scalar>& b, Scalar* out, Put put) {
  if constexpr (std::is_same_v<Scalar, float>) {
    if (packed_product_pays(a, b)) return packed_product(a, b, out, put);
  }
  library_multiply(a, b, out, put);
}

template void library_multiply(const MatrixView<float>&, const MatrixView<float>&, float*, Put);
template void multiply(const MatrixView<float>&, const MatrixView<float>&, float*, Put);
template void multiply(const MatrixView<double>&, const MatrixView<double>&, double*, Put);
template void multiply(const MatrixView<c10::BFloat16>&, const MatrixView<c10::BFloat16>&, c10::BFloat16*, Put);

}  // namespace moelab
