// Dense feed-forward layers of an earlier run in blocks where the model has a mixture: what its experts start from.
#pragma once

#include "core/model/model.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab {

struct DenseSource {
  std::string from;  // "runs/pretrained: layers.3.dense", for messages
  const Site* site = nullptr;
  std::shared_ptr<ExpertBank> bank;  // the layer, as a bank of one expert
};

// Takes the tensors "layers.3.dense.*" out of `stored` where the model has a mixture at "layers.3.moe", and gives the norm before
// them its name there. The activation is what the config beside the checkpoint says; of a lone file it is taken to be that of the
// experts, where the names of the tensors allow it.
std::vector<DenseSource> take_dense_layers(std::vector<NamedTensor>& stored, const Model& model, const std::string& from);

// Error(kUsage) where a feed-forward expert of the mixture has another shape or activation, or there is none.
void require_fit(const DenseSource& source);

}  // namespace moelab
