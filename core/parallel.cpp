// Compiled with OpenMP, whose runtime is LibTorch's own; see CMakeLists.txt.
#include "core/parallel.h"

#include <ATen/Parallel.h>

#ifndef INTRA_OP_PARALLEL
#error "core/parallel.cpp needs OpenMP: without it every parallel loop runs on one thread"
#endif

namespace moelab {

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(begin, end, grain, body);
}

}  // namespace moelab
