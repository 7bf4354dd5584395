// Labelled images as a data set, shared by everything that is read from files of them.
#pragma once

#include "core/dataset.h"

#include <memory>

namespace moelab {

struct LabelledImages {
  Tensor pixels;    // uint8 [N, channels, height, width]
  Tensor labels_N;  // uint8, below `classes`
};

// Pixels are shifted and scaled by two numbers, so that those of the training split have mean 0 and variance 1. Training images
// are drawn uniformly, anew for every place of every batch; validation images come in their order. Error(kData) where the parts
// do not fit each other.
std::shared_ptr<const Dataset> make_image_dataset(LabelledImages train, LabelledImages validation, int64_t classes);

}  // namespace moelab
