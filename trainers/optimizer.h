// AdamW and SGD over LibTorch's fused kernels. Moments are addressed by the parameter's name, so checkpoints and surgery find
// them; a parameter that requires no gradient is left alone, bit for bit, and begins with fresh moments when it does.
#pragma once

#include "core/expert.h"
#include "core/module.h"
#include "trainers/settings.h"

#include <map>
#include <string>
#include <vector>

namespace moelab {

class Optimizer {
 public:
  // Vectors, embeddings and router weights are not decayed; names that contain ".router." take the router's learning rate.
  Optimizer(const OptimizerSettings& settings, std::vector<NamedTensor> parameters);

  // One update from the parameters' gradients; a missing gradient counts as zero. `untouched` slices keep their values and
  // moments.
  void step(double lr, const std::vector<ExpertBank::Slice>& untouched = {});

  // Clears or copies the moments of one row of a stacked parameter: what expert surgery needs.
  void reset_slice(const ExpertBank::Slice& slice);
  void copy_slice(const ExpertBank::Slice& from, const ExpertBank::Slice& to);

  // The slice's part of each moment, where the optimiser knows its parameter; writes reach the moments.
  std::vector<Tensor> moments(const ExpertBank::Slice& slice) const;

  // Everything a checkpoint must keep: "m.<name>", "v.<name>", "step.<name>", in the order of the parameters.
  std::vector<NamedTensor> state() const;

 private:
  struct Entry {
    std::string name;
    Tensor parameter;
    Tensor first;    // AdamW: first moment; SGD: momentum
    Tensor second;   // AdamW: second moment; undefined for SGD
    Tensor updates;  // float32 count of updates, as the fused kernel wants it
    double lr_scale;
    double weight_decay;
  };
  using Group = std::pair<double, double>;  // (lr scale, weight decay): the fused kernel takes one of each per call

  Entry& entry_of(const Tensor& stacked);  // of the parameter that it is, or is a view of
  std::map<Group, std::vector<Entry*>> active_groups();
  void update_adamw(const std::vector<Entry*>& entries, double lr);
  void update_sgd(const std::vector<Entry*>& entries, double lr);

  OptimizerSettings settings_;
  std::vector<Entry> entries_;
};

// √Σ‖gradient‖² over the parameters that have one, summed in their order.
double gradient_norm(const std::vector<NamedTensor>& parameters);

// Multiplies all gradients by limit/norm where norm exceeds limit.
void clip_gradients(const std::vector<NamedTensor>& parameters, double norm, double limit);

}  // namespace moelab
