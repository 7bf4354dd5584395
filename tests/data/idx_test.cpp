// IDX files by hand: whole ones, and damage of every kind.
#include "datasets/idx.h"
#include "datasets/process.h"
#include "tests/data/data_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

// Two images of 2 × 3 bytes: 0 … 11.
const std::string kTwoImages(
    "\0\0\x08\x03"
    "\0\0\0\x02"
    "\0\0\0\x02"
    "\0\0\0\x03"
    "\0\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b",
    28);

std::string compressed(const std::string& bytes) {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/plain", bytes);
  return run_process({"gzip", "-9", "-n", "-c", folder.path() + "/plain"}).output;
}

Failure reading(const std::string& bytes) {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/file", bytes);
  Failure failure = failure_of([&] { read_idx(folder.path() + "/file"); });
  if (failure.message.find(folder.path() + "/file: ") != 0) failure.message = "no place in: " + failure.message;
  return failure;
}

}  // namespace

TEST_CASE("an IDX file is read with its dimensions, compressed or not") {
  const ScratchFolder folder = scratch();
  for (const std::string& bytes : {kTwoImages, compressed(kTwoImages)}) {
    write_text(folder.path() + "/images", bytes);
    const Tensor images = read_idx(folder.path() + "/images");
    CHECK(images.scalar_type() == at::kByte);
    CHECK(at::equal(images, at::arange(12, at::kByte).view({2, 2, 3})));
  }
  write_text(folder.path() + "/labels", std::string("\0\0\x08\x01\0\0\0\x03\x07\xff\x01", 11));
  CHECK(at::equal(read_idx(folder.path() + "/labels"), at::tensor({7, 255, 1}, at::kByte)));
  write_text(folder.path() + "/none", std::string("\0\0\x08\x02\0\0\0\0\0\0\0\x05", 12));
  CHECK(read_idx(folder.path() + "/none").sizes() == at::IntArrayRef({0, 5}));
}

TEST_CASE("a damaged IDX file is refused with its name and what is wrong, in one line") {
  const std::string zipped = compressed(kTwoImages);
  std::string wrong_type = kTwoImages, no_magic = kTwoImages, no_dimensions = kTwoImages, huge = kTwoImages, flipped = zipped,
              wrong_sum = zipped;
  wrong_type[2] = 0x0d;  // float32
  no_magic[1] = 'x';
  no_dimensions[3] = 0;
  huge[4] = huge[8] = huge[12] = '\x7f';
  flipped[flipped.size() / 2] = static_cast<char>(flipped[flipped.size() / 2] ^ 0x55);
  wrong_sum[wrong_sum.size() - 6] = static_cast<char>(wrong_sum[wrong_sum.size() - 6] ^ 1);
  const std::vector<std::pair<std::string, std::string>> cases{
      {"", "it ends 4 bytes too early"},
      {kTwoImages.substr(0, 10), "it ends 2 bytes too early"},
      {kTwoImages.substr(0, 25), "it ends 3 bytes too early"},
      {kTwoImages + "x", "it goes on after its last element"},
      {wrong_type, "elements of type 13 instead of unsigned bytes"},
      {no_magic, "no IDX file"},
      {no_dimensions, "no IDX file"},
      {huge, "its header asks for more than 4 GiB"},
      {zipped.substr(0, zipped.size() - 4), "damaged: "},
      {wrong_sum, "damaged: "},
      {compressed(kTwoImages + "x"), "it goes on after its last element"},
  };
  for (const auto& [bytes, part] : cases) {
    const Failure failure = reading(bytes);
    INFO(failure.message);
    CHECK(failure.code == ExitCode::kData);
    CHECK(failure.says(part));
    CHECK(failure.one_line());
  }
  CHECK(reading(flipped).code == ExitCode::kData);
  CHECK(failure_of([] { read_idx("/nowhere/images"); }).says("/nowhere/images: No such file or directory"));
}
