#include "device.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>

#include <dlfcn.h>

namespace moelab::testing {
namespace {

// Before main: LibTorch asks for its CUDA half once, when its first graph runs.
const std::string no_cuda = []() -> std::string {
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) return dlerror();
  return at::globalContext().hasCUDA() ? "" : "LibTorch finds no CUDA device";
}();

void move_tensors(const Module& module) {
  const at::NoGradGuard no_grad;
  for (const auto& tensors : {module.parameters(), module.buffers()})
    for (const NamedTensor& entry : tensors) Tensor(entry.tensor).set_data(entry.tensor.to(at::kCUDA));
}

}  // namespace

const std::string& why_no_cuda() { return no_cuda; }

void move_to_cuda(const ExpertBank& bank) {
  move_tensors(bank);
  if (bank.base()) move_tensors(*bank.base());
}

}  // namespace moelab::testing
