// IDX files, the format of MNIST and its kin: two zero bytes, the type of the elements (8 = unsigned bytes, the only one read
// here), the number of dimensions, each dimension as a big-endian 32-bit number, then the elements, the last index fastest.
#pragma once

#include "core/tensor.h"

#include <string>

namespace moelab {

// uint8, with the file's dimensions. Files compressed by gzip are read as well. Error(kData) names the file and what is wrong.
Tensor read_idx(const std::string& path);

}  // namespace moelab
