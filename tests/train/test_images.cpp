// A data set of this binary: sixteen-pixel images that need no download, 40 to train and 10 to validate.
#include "datasets/images.h"

#include "core/random.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>

namespace moelab::test {
namespace {

LabelledImages drawn_images(const char* split, int64_t count) {
  Tensor pixels = at::empty({count, 1, 4, 4}, at::kByte);
  for (int64_t i = 0; i < pixels.numel(); ++i)
    pixels.mutable_data_ptr<uint8_t>()[i] = static_cast<uint8_t>(uniform_integer(random_key(1, split), i, 256));
  return {pixels, at::arange(count, at::kLong).remainder(3).to(at::kByte)};
}

const Registration<DatasetEntry> registration_test_images{{
    .name = "test_images",
    .title = "Noise in three classes",
    .citation = "none",
    .doc = "drawn, not photographed",
    .holds = DataKind::kImages,
    .make = [](const DatasetSpec&) { return make_image_dataset(drawn_images("train", 40), drawn_images("validation", 10), 3); },
}};

}  // namespace
}  // namespace moelab::test
