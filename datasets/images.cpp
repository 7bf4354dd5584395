#include "datasets/images.h"

#include "core/error.h"
#include "core/random.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>

#include <fmt/format.h>

#include <cmath>

namespace moelab {
namespace {

struct PixelScale {
  double mean = 0;
  double deviation = 1;
};

PixelScale scale_of(const Tensor& pixels) {
  const Tensor counts = at::bincount(pixels.reshape({-1}), {}, 256);
  const auto* count = counts.const_data_ptr<int64_t>();
  double total = 0, sum = 0, squares = 0;
  for (int value = 0; value < 256; ++value) {
    const auto often = static_cast<double>(count[value]);
    total += often;
    sum += often * value;
    squares += often * value * value;
  }
  const double mean = sum / total, variance = squares / total - mean * mean;
  return {mean, variance > 0 ? std::sqrt(variance) : 1};
}

class ImageDataset : public Dataset {
 public:
  ImageDataset(LabelledImages train, LabelledImages validation, int64_t classes)
      : train_(std::move(train)), validation_(std::move(validation)), classes_(classes), scale_(scale_of(train_.pixels)) {}

  DataShape shape() const override {
    return {.kind = DataKind::kImages, .classes = classes_, .sample = train_.pixels.sizes().slice(1).vec()};
  }
  int64_t train_samples() const override { return train_.labels_N.numel(); }

  Batch train_batch(int64_t seed, int64_t step, int64_t first, int64_t count, int64_t batch) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= batch, "a slice of a training batch lies outside it");
    const RandomKey key = random_key(seed, "data").with("step", step);
    const Tensor image_B = at::empty({count}, at::kLong);
    for (int64_t b = 0; b < count; ++b) image_B.mutable_data_ptr<int64_t>()[b] = uniform_integer(key, first + b, train_samples());
    return batch_of(train_, image_B, first);
  }

  int64_t eval_sequences() const override { return validation_.labels_N.numel(); }
  Batch eval_batch(int64_t first, int64_t count) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= eval_sequences(), "a validation slice lies outside the split");
    return batch_of(validation_, at::arange(first, first + count, at::kLong), first);
  }

 private:
  Batch batch_of(const LabelledImages& split, const Tensor& image_B, int64_t first) const {
    return {.values = split.pixels.index_select(0, image_B).to(at::kFloat).sub(scale_.mean).div(scale_.deviation),
            .targets_BL = split.labels_N.index_select(0, image_B).to(at::kLong).unsqueeze(1),
            .sequence_B = at::arange(first, first + image_B.numel(), at::kLong)};
  }

  LabelledImages train_;
  LabelledImages validation_;
  int64_t classes_;
  PixelScale scale_;
};

void require_images(const char* split, const LabelledImages& images, int64_t classes) {
  if (images.pixels.dim() != 4 || images.labels_N.dim() != 1 || images.pixels.size(0) != images.labels_N.size(0))
    data_error(fmt::format("the {} split has not one label per image", split));
  if (images.labels_N.numel() == 0) data_error(fmt::format("the {} split holds no image", split));
  const auto highest = images.labels_N.max().item<int64_t>();
  if (highest >= classes) data_error(fmt::format("the {} split has the label {}, above its {} classes", split, highest, classes));
}

}  // namespace

std::shared_ptr<const Dataset> make_image_dataset(LabelledImages train, LabelledImages validation, int64_t classes) {
  require_images("training", train, classes);
  require_images("validation", validation, classes);
  if (train.pixels.sizes().slice(1) != validation.pixels.sizes().slice(1))
    data_error("the two splits hold images of different sizes");
  return std::make_shared<ImageDataset>(std::move(train), std::move(validation), classes);
}

}  // namespace moelab
