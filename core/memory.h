// Memory of the process, below LibTorch.
#pragma once

#include <cstdint>

namespace moelab {

// Keeps freed blocks in the process instead of handing them back to the system. LibTorch's CPU allocator is malloc, and
// mapping and faulting large blocks anew every step costs eager code about a third of its time. Call once, early in main.
void keep_freed_memory();

int64_t physical_memory();  // of the machine, in bytes

}  // namespace moelab
