// A tree of named parameters and buffers: all the state that a checkpoint keeps. It does what torch::nn::Module does for
// us here; that header costs 23 s of compile time in every file that sees it.
#pragma once

#include "core/tensor.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab {

class Module {
 public:
  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  virtual ~Module();

  // Full names, own entries before those of the children, in order of registration: "layers.3.moe.router.weight".
  std::vector<NamedTensor> parameters(const std::string& prefix = "") const;
  std::vector<NamedTensor> buffers(const std::string& prefix = "") const;

  // Parameters that the optimiser may move: those that require a gradient.
  std::vector<NamedTensor> trainable(const std::string& prefix = "") const;

  // Sums of elements over parameters().
  int64_t parameter_count() const;

  void zero_grad() const;

 protected:
  // The returned handle shares storage with the registered tensor, so a member may keep it. State is only ever changed in
  // place (copy_), never rebound: a handle that points elsewhere would silently leave the checkpoint.
  Tensor add_parameter(const std::string& name, Tensor value, bool trainable = true);
  Tensor add_buffer(const std::string& name, Tensor value);
  // A child without a name is a part of this module: its tensors are named as our own.
  void add_child(const std::string& name, std::shared_ptr<Module> child);

 private:
  struct Child {
    std::string name;
    std::shared_ptr<Module> module;
  };
  std::vector<NamedTensor> parameters_;
  std::vector<NamedTensor> buffers_;
  std::vector<Child> children_;
};

}  // namespace moelab
