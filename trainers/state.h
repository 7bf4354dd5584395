// What a checkpoint keeps of a training run. Stacked expert parameters (and their moments) are written one name per global
// expert, "layers.3.moe.experts.17.w_in", so that a file says nothing of how experts were spread.
#pragma once

#include "core/dataset.h"
#include "core/io/checkpoint.h"
#include "core/model/model.h"
#include "trainers/optimizer.h"

#include <string>
#include <vector>

namespace moelab {

// `trained_only` leaves out a base that stands still under adapters; `restore` then finds it in the model, and refuses another.
CheckpointContent checkpoint_content(const Model& model, const Optimizer& optimizer, nlohmann::json state,
                                     bool trained_only = false);

// Copies a checkpoint's tensors into the model and the optimiser. Throws Error(kData) naming the first tensor that is
// missing, unknown, or of another shape or dtype; nothing has been changed then.
void restore(const Checkpoint& checkpoint, const Model& model, const Optimizer& optimizer);
void restore_model(const Checkpoint& checkpoint, const Model& model);

struct Start {
  std::string from;  // the folder of an earlier run, one of its checkpoints, or a safetensors file
  double noise = 0;  // on experts that start as copies of a dense layer (upcycling.h)
  int64_t seed = 0;  // keys that noise
};

// Starts the model from what an earlier run learned. Tensors are matched by name. What the source lacks must belong to a routed
// place of the model (routers, experts, adapters) and keeps its initial value; what the model lacks is refused, as Error(kData)
// naming the tensor. A dense feed-forward layer in the block of a mixture becomes each of its feed-forward experts; experts of
// another shape or activation are Error(kUsage) that names both.
void start_from(const Start& start, const Model& model);

// Error(kData) where nothing of the kind lies there; what it holds is not read.
void require_source(const std::string& from);

// Error(kData) where the checkpoint was trained on other tokens than these data hold: a file or the tokenizer has changed.
void require_same_data(const Checkpoint& checkpoint, const Dataset& data);

}  // namespace moelab
