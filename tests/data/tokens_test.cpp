// Files of 16-bit tokens.
#include "datasets/token_stream.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

#include <ATen/ATen.h>

#include <cmath>
#include <numeric>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

// Least significant byte first, written out by hand.
std::string as_file(const std::vector<int64_t>& tokens) {
  std::string bytes;
  for (const int64_t token : tokens) {
    bytes += static_cast<char>(token % 256);
    bytes += static_cast<char>(token / 256);
  }
  return bytes;
}

std::vector<int64_t> counted(int64_t first, int64_t count) {
  std::vector<int64_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

}  // namespace

TEST_CASE("a row of tokens made of pieces reads as one") {
  const auto bytes = std::make_shared<const std::vector<uint8_t>>(std::vector<uint8_t>{0, 1, 2, 3});
  TokenStream stream{std::span(*bytes), bytes};
  stream.append(TokenStream(std::vector<uint16_t>{}));
  stream.append(TokenStream(std::vector<uint16_t>{400, 500, 600}));
  CHECK(stream.size() == 7);
  const std::vector<int64_t> whole{0, 1, 2, 3, 400, 500, 600};
  for (int64_t first = 0; first <= 7; ++first)
    for (int64_t count = 0; first + count <= 7; ++count) {
      std::vector<int64_t> found(count), of_part(count);
      stream.copy(first, count, found.data());
      const TokenStream part = stream.part(first, count);
      part.copy(0, count, of_part.data());
      CHECK(found == std::vector<int64_t>(whole.begin() + first, whole.begin() + first + count));
      CHECK(of_part == found);
      CHECK(part.size() == count);
    }
  CHECK(stream.at(4) == 400);
  CHECK_THROWS(stream.at(7));
  CHECK_THROWS(stream.part(6, 2));
}

TEST_CASE("a token file is read little-endian, and its end is held out") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/t", as_file(counted(1000, 200)));
  const auto data = make("tokens", 8, {{"path", folder.path() + "/t"}, {"validation", 0.1}});
  CHECK(data->vocabulary() == 1200);
  CHECK(values(data->token_counts_V().narrow(0, 1000, 180)) == std::vector<int64_t>(180, 1));
  CHECK(data->token_counts_V().sum().item<int64_t>() == 180);
  CHECK(data->eval_sequences() == 3);
  const Batch eval = data->eval_batch(0, 3);
  CHECK(values(eval.targets_BL.flatten().narrow(0, 0, 20)) == counted(1180, 20));
  CHECK(values(eval.targets_BL.flatten().narrow(0, 20, 4)) == std::vector<int64_t>(4, -1));
  CHECK(values(eval.tokens_BL.flatten().narrow(0, 0, 20)) == counted(1179, 20));  // the first follows training's last token
  for (int64_t step = 0; step < 50; ++step) CHECK(data->train_batch(1, step, 0, 4, 4).targets_BL.max().item<int64_t>() < 1180);
  CHECK(data->train_bytes().empty());
}

TEST_CASE("a folder's *.bin files are one row in the order of their paths, and other files may be held out") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/all/b/1.bin", as_file(counted(20, 10)));
  write_text(folder.path() + "/all/a.bin", as_file(counted(10, 10)));
  write_text(folder.path() + "/all/notes.txt", "odd");
  write_text(folder.path() + "/held", as_file(counted(50, 5)));
  const auto data = make("tokens", 4, {{"path", folder.path() + "/all"}, {"validation_path", folder.path() + "/held"},
                                       {"start_token", int64_t{7}}});
  const std::vector<uint16_t> train = data->train_tokens();
  CHECK(std::vector<int64_t>(train.begin(), train.end()) == counted(10, 20));
  CHECK((data->validation_tokens() == std::vector<uint16_t>{50, 51, 52, 53, 54}));
  CHECK(values(data->eval_batch(0, 1).tokens_BL) == std::vector<int64_t>{7, 50, 51, 52});
  CHECK(data->vocabulary() == 55);
}

TEST_CASE("bytes per token are what the option says, and nothing where it is silent") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/t", as_file(counted(0, 100)));
  const auto make_with = [&](double bytes) {
    return make("tokens", 4, {{"path", folder.path() + "/t"}, {"bytes_per_token", bytes}});
  };
  const Tensor targets_BL = at::tensor({3, 4, -1, 5, -1}, at::kLong).unsqueeze(0);
  CHECK(make_with(2.5)->bytes_of(targets_BL) == 7.5);
  CHECK(make_with(2.5)->is_text());
  CHECK(std::isnan(make_with(0.0)->bytes_of(targets_BL)));
  CHECK_FALSE(make_with(0.0)->is_text());
  CHECK(make_with(2.5)->text_of({1, 2}).empty());
}

TEST_CASE("unusable token files are refused in one line with the documented exit code") {
  const ScratchFolder folder = scratch();
  const std::string path = folder.path();
  write_text(path + "/empty", "");
  write_text(path + "/odd", "abc");
  write_text(path + "/good", as_file(counted(0, 100)));
  write_text(path + "/all/a.bin", as_file(counted(0, 10)));
  write_text(path + "/all/b.bin", as_file({1, 2, 64, 3}));
  std::filesystem::create_directories(path + "/hollow");
  const auto failure = [&](const std::string& name, std::map<std::string, OptionValue> more = {}) {
    more["path"] = name.empty() ? name : path + name;
    return failure_of([&] { make("tokens", 16, more); });
  };
  const std::vector<std::tuple<Failure, ExitCode, std::string>> cases{
      {failure(""), ExitCode::kUsage, "needs `path`"},
      {failure("/absent"), ExitCode::kData, path + "/absent: no such file or folder; check `path`"},
      {failure("/empty"), ExitCode::kData, path + "/empty: the file is empty"},
      {failure("/odd"), ExitCode::kData, path + "/odd: its 3 bytes are no whole number of 16-bit tokens"},
      {failure("/hollow"), ExitCode::kData, "no file *.bin"},
      {failure("/all", {{"vocabulary", int64_t{64}}}), ExitCode::kData,
       path + "/all/b.bin: token 64 at byte 4 is not below `vocabulary` = 64"},
      {failure("/good", {{"validation_path", path + "/absent"}}), ExitCode::kData, "check `validation_path`"},
      {failure("/good", {{"start_token", int64_t{100}}}), ExitCode::kUsage,
       "`start_token` = 100 is not below the vocabulary of 100"},
      {failure("/good", {{"validation", 0.9}}), ExitCode::kUsage, "the training split has 10 tokens"},
  };
  for (const auto& [found, code, part] : cases) {
    INFO(found.message);
    CHECK(found.code == code);
    CHECK(found.says(part));
    CHECK(found.one_line());
  }
}
