#include "core/io/safetensors.h"

#include "io_support.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>
#include <catch2/catch_test_macros.hpp>

#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

using namespace moelab;
using namespace moelab::io_test;

namespace {

// Any bit pattern, NaNs with payloads included.
Tensor random_bits(at::ScalarType type) {
  if (type == at::kBool) return at::randint(0, 2, {3, 5}, at::kLong).to(at::kBool);
  const auto width = static_cast<int64_t>(elementSize(type));
  return at::randint(0, 256, {3, 5 * width}, at::kByte).view(type);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const std::string bytes_a(static_cast<const char*>(a.const_data_ptr()), a.nbytes());
  return bytes_a == std::string(static_cast<const char*>(b.const_data_ptr()), b.nbytes());
}

std::string little_endian(uint64_t number) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(number >> (8 * i));
  return bytes;
}

std::string raw_file(const std::string& header, size_t data_bytes) {
  return little_endian(header.size()) + header + std::string(data_bytes, '\0');
}

std::string read_error(const TempFolder& folder, const std::string& bytes) {
  put_bytes(folder / "x.safetensors", bytes);
  return error_of([&] { read_safetensors(folder / "x.safetensors"); });
}

}  // namespace

TEST_CASE("every dtype comes back bit for bit, in the order given, with its metadata") {
  const TempFolder folder;
  const std::vector<at::ScalarType> types{at::kBool, at::kByte, at::kChar,     at::kShort, at::kInt,
                                          at::kLong, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};
  std::vector<NamedTensor> tensors;
  for (size_t i = 0; i < types.size(); ++i) {
    tensors.push_back({"layers.3." + std::to_string(9 - i) + ".\"w\"\xC3\xA9", random_bits(types[i])});
  }
  const Metadata metadata{{"format", "pt"}, {"note", "line\nbreak"}};
  const FileDigest digest = write_safetensors(folder / "a", tensors, metadata);
  CHECK(digest == digest_file(folder / "a"));
  const SafetensorsFile back = read_safetensors(folder / "a");
  CHECK(back.metadata == metadata);
  REQUIRE(back.tensors.size() == tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    CHECK(back.tensors[i].name == tensors[i].name);
    CHECK(same_bits(back.tensors[i].tensor, tensors[i].tensor));
  }
}

TEST_CASE("scalars, empty tensors, transposed ones and those on the graph keep their shape and values") {
  const TempFolder folder;
  const Tensor transposed = at::arange(6, at::kFloat).view({2, 3}).t();
  const Tensor trained = at::arange(2, at::kFloat).set_requires_grad(true);
  write_safetensors(folder / "a", {{"z_empty", at::empty({0, 4})}, {"a_empty", at::empty({2, 0}, at::kBool)},
                                   {"scalar", at::full({}, 2.5F, at::kFloat)}, {"t", transposed}, {"trained", trained}});
  const std::vector<NamedTensor> back = read_safetensors(folder / "a").tensors;
  REQUIRE(back.size() == 5);
  CHECK(back[0].name == "z_empty");
  CHECK(back[0].tensor.sizes() == at::IntArrayRef({0, 4}));
  CHECK(back[1].tensor.sizes() == at::IntArrayRef({2, 0}));
  CHECK(back[2].tensor.dim() == 0);
  CHECK(back[2].tensor.item<float>() == 2.5F);
  CHECK(at::equal(back[3].tensor, transposed));
  CHECK(at::equal(back[4].tensor, trained));
  CHECK_FALSE(back[4].tensor.requires_grad());
}

TEST_CASE("the bytes are laid out as the format says") {
  const TempFolder folder;
  const Tensor b = at::tensor({1, 258}, at::kShort);
  write_safetensors(folder / "a", {{"b", b}, {"a", at::tensor({1.0}, at::kFloat)}}, {{"k", "v"}});
  const std::string bytes = bytes_of(folder / "a");
  const size_t header_bytes = bytes.size() - 8 - 8;  // 8 of length, 4 + 4 of data
  CHECK(bytes.substr(0, 8) == little_endian(header_bytes));
  CHECK(bytes[8] == '{');
  CHECK((8 + header_bytes) % 64 == 0);
  CHECK(bytes.substr(8 + header_bytes) == std::string("\x01\x00\x02\x01\x00\x00\x80\x3F", 8));
  const auto expected = nlohmann::json::parse(R"({"__metadata__": {"k": "v"},
    "b": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})");
  CHECK(nlohmann::json::parse(bytes.substr(8, header_bytes)) == expected);
}

TEST_CASE("no tensor at all makes a file that reads back") {
  const TempFolder folder;
  write_safetensors(folder / "a", {});
  CHECK(bytes_of(folder / "a") == little_endian(56) + "{}" + std::string(54, ' '));
  CHECK(read_safetensors(folder / "a").tensors.empty());
}

TEST_CASE("the header alone tells names, types, shapes and sizes") {
  const TempFolder folder;
  write_safetensors(folder / "a", {{"w", at::empty({2, 3}, at::kBFloat16)}, {"n", at::full({}, 7, at::kLong)}});
  const SafetensorsHeader header = read_safetensors_header(folder / "a");
  REQUIRE(header.tensors.size() == 2);
  CHECK(header.tensors[0].dtype == "BF16");
  CHECK(header.tensors[0].shape == std::vector<int64_t>{2, 3});
  CHECK(header.tensors[0].bytes == 12);
  CHECK(header.tensors[1].shape.empty());
  CHECK(header.tensors[1].offset == 12);
}

TEST_CASE("a file written by another program is read: unpadded header, unaligned data, unsorted entries") {
  const TempFolder folder;
  const std::string header = R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("a":{"shape":[],"dtype":"F32","data_offsets":[1,5]}} )";
  put_bytes(folder / "a", little_endian(header.size()) + header + std::string("\x07\x00\x00\x80\x3F", 5));
  const std::vector<NamedTensor> back = read_safetensors(folder / "a").tensors;
  CHECK(back[0].tensor.item<int>() == 7);
  CHECK(back[1].tensor.item<float>() == 1.0F);
}

TEST_CASE("what does not add up in a file is refused in one line that names the file and the fault") {
  const TempFolder folder;
  struct Case {
    std::string bytes;
    std::string fault;
  };
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"w":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  const std::string w = R"("dtype":"U8","shape":[2],"data_offsets":)";
  const std::vector<Case> cases{
      {"", "truncated: no header"},
      {little_endian(UINT64_MAX) + "{}", "limit 100 MB"},
      {little_endian(100'000'001) + "{}", "limit 100 MB"},
      {little_endian(3) + "{}", "truncated: a header of 3 bytes, 2 left"},
      {raw_file("", 0), "does not begin with '{'"},
      {raw_file(" {}", 0), "does not begin with '{'"},
      {raw_file("{\"w\":", 0), "not JSON"},
      {raw_file("{} x", 0), "not JSON"},
      {raw_file("{\"\xff\":1}", 0), "not JSON"},
      {raw_file("{\"w\":" + std::string(1000, '['), 0), "nested too deeply"},
      {raw_file("{\"w\":1}", 0), "'w' has no dtype"},
      {raw_file(one("7", "[2]", "[0,2]"), 2), "'w' has no dtype"},
      {raw_file(one("\"C64\"", "[2]", "[0,2]"), 2), "unknown dtype 'C64'"},
      {raw_file(one("\"U8\"", "2", "[0,2]"), 2), "'w' has no shape"},
      {raw_file(one("\"U8\"", "[-2]", "[0,2]"), 2), "bad number in shape"},
      {raw_file(one("\"U8\"", "[2.0]", "[0,2]"), 2), "bad number in shape"},
      {raw_file(one("\"U8\"", "[2]", "[0,18446744073709551615]"), 2), "bad number in data_offsets"},
      {raw_file(one("\"U8\"", "[2]", "[0]"), 2), "bad data_offsets"},
      {raw_file(one("\"U8\"", "[2]", "[2,0]"), 2), "bad data_offsets"},
      {raw_file(one("\"U8\"", "[3]", "[0,2]"), 2), "has 2 bytes of data, its shape and dtype U8 need 3"},
      {raw_file(one("\"F32\"", "[2]", "[0,2]"), 2), "need 8"},
      {raw_file(one("\"F32\"", "[4294967296,4294967296]", "[0,0]"), 0), "overflows"},
      {raw_file(one("\"F32\"", "[0,4294967296,4294967296]", "[0,0]"), 0), "overflows"},
      {raw_file(one("\"F32\"", "[4611686018427387904]", "[0,0]"), 0), "overflows"},
      {raw_file(one("\"U8\"", "[2]", "[0,2]"), 1), "truncated: tensor 'w' ends at byte 2"},
      {raw_file(one("\"U8\"", "[2]", "[0,2]"), 3), "1 bytes after the last tensor"},
      {raw_file(one("\"U8\"", "[2]", "[1,3]"), 3), "gap in the data before tensor 'w'"},
      {raw_file("{\"a\":{" + w + "[0,2]},\"b\":{" + w + "[1,3]}}", 3), "tensor 'b' overlaps"},
      {raw_file("{\"a\":{" + w + "[0,2]},\"b\":{" + w + "[0,2]}}", 2), "tensor 'b' overlaps"},
      {raw_file("{\"a\":{" + w + "[0,2]},\"a\":{" + w + "[0,2]}}", 2), "names 'a' twice"},
      {raw_file("{\"a\":{\"dtype\":\"F32\"," + w + "[0,2]}}", 2), "names 'dtype' twice"},
      {raw_file(R"({"__metadata__":[]})", 0), "the metadata are not an object"},
      {raw_file(R"({"__metadata__":{"k":1}})", 0), "metadata 'k' is not a string"},
      {raw_file(one("\"BOOL\"", "[1]", "[0,1]"), 0) + "\x02", "neither 0 nor 1"},
  };
  for (const Case& hostile : cases) {
    const std::string error = read_error(folder, hostile.bytes);
    INFO(hostile.fault << " in: " << error);
    CHECK(contains(error, "5: '" + (folder / "x.safetensors") + "': "));
    CHECK(contains(error, hostile.fault));
    CHECK_FALSE(contains(error, "\n"));
  }
}

TEST_CASE("a file cut at any byte is refused") {
  const TempFolder folder;
  write_safetensors(folder / "a", {{"w", at::arange(9, at::kFloat)}, {"flag", at::full({}, true, at::kBool)}}, {{"k", "v"}});
  const std::string bytes = bytes_of(folder / "a");
  for (size_t size = 0; size < bytes.size(); ++size) CHECK(contains(read_error(folder, bytes.substr(0, size)), "5: "));
  CHECK(read_error(folder, bytes).empty());
}

TEST_CASE("random damage to a header never does worse than an error or another reading") {
  const TempFolder folder;
  write_safetensors(folder / "a", {{"w", at::arange(9, at::kFloat)}, {"v", at::empty({2, 2}, at::kLong)}}, {{"k", "v"}});
  const std::string bytes = bytes_of(folder / "a");
  std::mt19937 draw(7);
  for (int i = 0; i < 1000; ++i) {
    std::string damaged = bytes;
    for (int flips = 0; flips <= i % 3; ++flips) damaged = with_flipped_bit(damaged, draw() % (8 * 192));
    const std::string error = read_error(folder, damaged);
    CHECK((error.empty() || error.starts_with("5: ")));
  }
}

TEST_CASE("what cannot be written is refused with the path and the reason") {
  const TempFolder folder;
  const Tensor w = at::arange(2);
  CHECK(error_of([&] { write_safetensors("/dev/full", {{"w", w}}); }) ==
        "5: cannot write '/dev/full': No space left on device");
  CHECK(contains(error_of([&] { write_safetensors(folder / "no/a", {{"w", w}}); }), "No such file or directory"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "a", {{"w", w}, {"w", w}}); }), "name 'w' twice"));
  const Tensor complex_w = w.to(at::kComplexFloat);
  CHECK(contains(error_of([&] { write_safetensors(folder / "a", {{"w", complex_w}}); }), "tensor 'w' has dtype"));
  CHECK_FALSE(std::filesystem::exists(folder / "a"));
}
