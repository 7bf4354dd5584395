// Products of float matrices of the sizes that experts have, by our own kernel. The library's BLAS, made for large matrices, has
// 0.6 to 1.03 of its speed with 32 rows and 0.6 to 1.1 with 1024 (AVX2, two machines; weights not in the caches).
#pragma once

#include "core/gemm.h"

namespace moelab {

// Whether the kernel is there (a processor with AVX2, for which the library's kernels are not wider) and faster for these.
bool packed_product_pays(const MatrixView<float>& a, const MatrixView<float>& b);

// As multiply. Each result is one sum in the order of its terms, 256 at a time; its bits depend on nothing else.
void packed_product(const MatrixView<float>& a, const MatrixView<float>& b, float* out, Put put);

}  // namespace moelab
