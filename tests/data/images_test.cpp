// Labelled images as a data set: hand-made ones, and the prepared Fashion-MNIST where it can be had.
#include "datasets/images.h"
#include "tests/data/data_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <set>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

// `count` images of 1 × 2 × 2 pixels; all four pixels of image i are first + i, and its label is i mod 3.
LabelledImages plain_images(int64_t count, int64_t first) {
  const Tensor number_N = at::arange(count, at::kLong);
  return {number_N.add(first).view({count, 1, 1, 1}).expand({count, 1, 2, 2}).contiguous().to(at::kByte),
          number_N.remainder(3).to(at::kByte)};
}

const DatasetEntry& fashion() { return Registry<DatasetEntry>::instance().find("fashion_mnist"); }

// Asks for a preparation only where nobody knows yet whether it can be done.
Failure prepared() {
  return failure_of([] { fashion().prepare(); });
}

}  // namespace

TEST_CASE("pixels have mean 0 and variance 1 over the training split, and validation uses the same scale") {
  // Pixels 10, 20, …: two images of value 10 and 30: mean 20, standard deviation 10.
  const Tensor two = at::tensor({10, 30}, at::kByte).view({2, 1, 1, 1}), one = at::tensor({50}, at::kByte).view({1, 1, 1, 1});
  const auto data = make_image_dataset({two, at::tensor({0, 1}, at::kByte)}, {one, at::tensor({1}, at::kByte)}, 2);
  CHECK(data->eval_batch(0, 1).values.item<float>() == 3.0f);  // (50 - 20) / 10
  const Tensor seen = data->train_batch(0, 0, 0, 64, 64).values.reshape({-1});
  CHECK(
      (seen.eq(-1).logical_or(seen.eq(1)).all().item<bool>() && seen.eq(1).any().item<bool>() && seen.eq(-1).any().item<bool>()));
  // One grey for all pixels has no variance to divide by.
  const auto flat = make_image_dataset({one, at::tensor({0}, at::kByte)}, {one, at::tensor({0}, at::kByte)}, 1);
  CHECK(flat->eval_batch(0, 1).values.item<float>() == 0.0f);
}

TEST_CASE("images keep their labels, the splits stay apart, and a batch depends on seed, step and index alone") {
  const auto data = make_image_dataset(plain_images(120, 0), plain_images(9, 200), 3);
  CHECK(data->shape().kind == DataKind::kImages);
  CHECK((data->shape().sample == std::vector<int64_t>{1, 2, 2} && data->shape().classes == 3 && data->vocabulary() == 0));
  CHECK((data->train_samples() == 120 && data->eval_sequences() == 9 && data->domains() == 0));
  CHECK_FALSE(data->token_counts_V().defined());
  CHECK(std::isnan(data->bytes_of(data->eval_batch(0, 1).targets_BL)));
  const Batch eval = data->eval_batch(0, 9);
  CHECK(values(eval.targets_BL) == std::vector<int64_t>{0, 1, 2, 0, 1, 2, 0, 1, 2});
  CHECK(at::equal(data->eval_batch(4, 2).values, eval.values.narrow(0, 4, 2)));
  std::set<float> held_out, seen;
  for (int64_t i = 0; i < 9; ++i) held_out.insert(eval.values[i][0][0][0].item<float>());
  const auto grey_of =
      [&](const Tensor& image) {  // undoes the scale: 120 greys 0 … 119 have mean 59.5 and variance (120² - 1) / 12
        return std::lround(image[0][0][0].item<double>() * std::sqrt((120.0 * 120 - 1) / 12) + 59.5);
      };
  for (int64_t step = 0; step < 40; ++step) {
    const Batch batch = data->train_batch(7, step, 0, 32, 32);
    for (int64_t b = 0; b < 32; ++b) {
      seen.insert(batch.values[b][0][0][0].item<float>());
      CHECK(batch.targets_BL[b][0].item<int64_t>() == grey_of(batch.values[b]) % 3);
    }
  }
  CHECK(seen.size() == 120);  // 1280 draws of 120 images: one of them is missed with probability 120·e^-10.7 = 0.003
  for (const float grey : held_out) CHECK(seen.count(grey) == 0);

  const Batch whole = data->train_batch(1, 5, 0, 12, 12), slice = data->train_batch(1, 5, 3, 4, 12);
  CHECK(at::equal(slice.values, whole.values.narrow(0, 3, 4)));
  CHECK(at::equal(slice.targets_BL, whole.targets_BL.narrow(0, 3, 4)));
  CHECK((values(slice.sequence_B) == std::vector<int64_t>{3, 4, 5, 6}));
  CHECK_FALSE(at::equal(whole.values, data->train_batch(1, 6, 0, 12, 12).values));
  CHECK_FALSE(at::equal(whole.values, data->train_batch(2, 5, 0, 12, 12).values));
  CHECK(data->train_batch(1, 5, 4, 0, 12).values.sizes() == at::IntArrayRef({0, 1, 2, 2}));
}

TEST_CASE("parts that do not fit each other are refused") {
  LabelledImages few = plain_images(4, 0), wide = plain_images(4, 0);
  few.labels_N = few.labels_N.narrow(0, 0, 3);
  wide.pixels = at::zeros({4, 1, 2, 3}, at::kByte);
  const auto failure = [](LabelledImages train, LabelledImages validation, int64_t classes) {
    return failure_of([&] { make_image_dataset(std::move(train), std::move(validation), classes); });
  };
  CHECK(failure(few, plain_images(4, 0), 3).says("the training split has not one label per image"));
  CHECK(failure(plain_images(4, 0), plain_images(4, 0), 2).says("the training split has the label 2, above its 2 classes"));
  CHECK(failure(plain_images(4, 0), wide, 3).says("images of different sizes"));
  CHECK(failure(plain_images(4, 0), plain_images(0, 0), 3).says("the validation split holds no image"));
}

TEST_CASE("the prepared Fashion-MNIST is the known one") {
  const Failure failure = prepared();
  if (failure.code == ExitCode::kData) SKIP("Fashion-MNIST cannot be prepared here: " + failure.message);
  REQUIRE(failure.code == ExitCode::kDone);
  CHECK(fashion().verify().find("4 files") != std::string::npos);
  CHECK(fashion().prepare().find("already prepared") != std::string::npos);
  const auto data = make("fashion_mnist", 0);
  CHECK((data->shape().sample == std::vector<int64_t>{1, 28, 28} && data->shape().classes == 10));
  CHECK((data->train_samples() == 60000 && data->eval_sequences() == 10000));
  const Batch eval = data->eval_batch(0, 10000);
  CHECK(at::equal(at::bincount(eval.targets_BL.squeeze(1)), at::full({10}, 1000, at::kLong)));  // the authors' balanced classes
  CHECK((eval.targets_BL[0].item<int64_t>() == 9 &&
         eval.targets_BL[1].item<int64_t>() == 2));  // as the package's label file begins
  // The mean and deviation that are known of it are 0.2860 and 0.3530 of 255; a black pixel is -0.8102 of that scale.
  CHECK(std::abs(eval.values.min().item<double>() + 0.2860 / 0.3530) < 1e-3);
  CHECK(std::abs(eval.values.max().item<double>() - (1 - 0.2860) / 0.3530) < 1e-3);
}

TEST_CASE("Fashion-MNIST that is missing or damaged is refused with the remedy") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path());
  const std::string file = folder.path() + "/data/fashion_mnist/train-images-idx3-ubyte.gz";
  for (const std::string& content : {std::string(), std::string("images"), std::string(26421856, 'x')}) {
    if (!content.empty()) write_text(file, content);
    for (const Failure& failure : {failure_of([] { make("fashion_mnist", 0); }), failure_of([] { fashion().verify(); })}) {
      INFO(failure.message);
      CHECK(failure.code == ExitCode::kData);
      CHECK(failure.message.find(file + ": ") == 0);
      CHECK(failure.says("moelab data prepare fashion_mnist"));
      CHECK(failure.one_line());
    }
  }
}

TEST_CASE("Fashion-MNIST that cannot be fetched says so in one line and leaves nothing behind") {
  if (std::filesystem::exists("/usr/share/datasets/fashion-mnist")) SKIP("the package is installed, so nothing is fetched");
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path());
  const Environment path("PATH", folder.path());  // no program can be found
  const Failure failure = prepared();
  INFO(failure.message);
  CHECK(failure.code == ExitCode::kData);
  CHECK(failure.says("apt-get"));
  CHECK(failure.one_line());
  CHECK(std::filesystem::is_empty(folder.path() + "/data/fashion_mnist"));
}
