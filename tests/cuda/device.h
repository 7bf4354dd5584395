// The device that these tests are for. The program links LibTorch's CPU half alone; this loads the other one beside it.
#pragma once

#include "core/expert.h"

#include <string>

namespace moelab::testing {

// Why no CUDA device can be used here, in one line; "" where one can.
const std::string& why_no_cuda();

// Moves parameters and buffers, those of the base too. Handles that the bank keeps stay those of its parameters.
void move_to_cuda(const ExpertBank& bank);

}  // namespace moelab::testing
