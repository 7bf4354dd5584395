// Loops over threads. The one file behind this header is compiled with OpenMP: the library's own at::parallel_for is a template
// that runs serially, without a word, in every source compiled without it.
#pragma once

#include <cstdint>
#include <functional>

namespace moelab {

// Calls body(first, last) for pieces that cover [begin, end), of `grain` and more where possible, on as many threads as
// at::get_num_threads() allows; inside another parallel loop, on the calling one. What a body throws reaches the caller.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t first, int64_t last)>& body);

}  // namespace moelab
