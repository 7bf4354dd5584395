#include "datasets/byte_text.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

#include <ATen/ATen.h>

#include <set>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

std::string cycling_text(size_t size, int first, int kinds) {
  std::string text;
  for (size_t i = 0; i < size; ++i) text += static_cast<char>(first + (i * i + i / 7) % kinds);
  return text;
}

std::set<int64_t> bytes_seen_in_training(const Dataset& data, int steps) {
  std::set<int64_t> seen;
  for (int step = 0; step < steps; ++step) {
    const Batch batch = data.train_batch(7, step, 0, 8, 8);
    for (const int64_t token : values(batch.tokens_BL)) seen.insert(token);
    for (const int64_t token : values(batch.targets_BL)) seen.insert(token);
  }
  return seen;
}

}  // namespace

TEST_CASE("a block split holds out the end of the text, and training never reads it") {
  const ScratchFolder folder = scratch();
  // 950 bytes of a…j, then 50 bytes of k…t: validation = 0.05 cuts exactly between.
  write_text(folder.path() + "/text", cycling_text(950, 'a', 10) + cycling_text(50, 'k', 10));
  const auto data = make("bytes", 16, {{"path", folder.path() + "/text"}});
  CHECK(data->train_bytes().size() == 950);
  CHECK(data->validation_bytes().size() == 50);
  const std::set<int64_t> seen = bytes_seen_in_training(*data, 100);
  CHECK(*seen.begin() >= 'a');
  CHECK(*seen.rbegin() <= 'j');
}

TEST_CASE("training reaches the first and the last byte of its split") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/text", "A" + std::string(18, 'm') + "Z" + std::string(20, 'v'));
  const auto data = make("bytes", 8, {{"path", folder.path() + "/text"}, {"validation", 0.5}});
  CHECK((bytes_seen_in_training(*data, 50) == std::set<int64_t>{'A', 'Z', 'm'}));
}

TEST_CASE("a split by document keeps documents whole and does not depend on their order") {
  std::vector<Document> documents;
  for (int d = 0; d < 40; ++d) documents.push_back({"part/" + std::to_string(d), std::string(25, static_cast<char>('0' + d))});
  const ByteSplit split = split_documents(documents, 0.1, "auto");
  CHECK(split.validation.size() == 100);  // 0.1 of 1000 bytes = 4 documents of 25
  CHECK(split.train.size() == 900);
  const std::set<uint8_t> held(split.validation.begin(), split.validation.end());
  const std::set<uint8_t> kept(split.train.begin(), split.train.end());
  CHECK(held.size() == 4);
  CHECK(kept.size() == 36);
  for (const uint8_t byte : held) CHECK(kept.count(byte) == 0);

  std::reverse(documents.begin(), documents.end());
  const ByteSplit reversed = split_documents(documents, 0.1, "document");
  CHECK(std::set<uint8_t>(reversed.validation.begin(), reversed.validation.end()) == held);
}

TEST_CASE("fewer than 20 documents are split by block unless the config says otherwise") {
  std::vector<Document> documents;
  for (int d = 0; d < 19; ++d) documents.push_back({std::to_string(d), std::string(10, static_cast<char>('a' + d))});
  const std::vector<uint8_t> held = split_documents(documents, 0.1, "auto").validation;  // 19 of 190 bytes
  CHECK(std::string(held.begin(), held.end()) == "rrrrrrrrrssssssssss");
  CHECK(split_documents(documents, 0.1, "document").validation.size() == 10);
}

TEST_CASE("a folder is read in the order of relative paths, without its empty files") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/b/second", "2");
  write_text(folder.path() + "/a", "1");
  write_text(folder.path() + "/c", "3");
  write_text(folder.path() + "/b/empty", "");
  const std::vector<Document> documents = read_documents(folder.path());
  REQUIRE(documents.size() == 3);
  CHECK(documents[0].name == "a");
  CHECK(documents[1].name == "b/second");
  CHECK(documents[2].bytes == "3");
}

TEST_CASE("validation predicts every byte once, in order, each after the byte before it") {
  for (const size_t held : {16, 17, 31, 32, 50}) {
    const std::string text = cycling_text(200, 'a', 20);
    ByteSplit split;
    split.train.assign(text.begin(), text.end() - static_cast<int64_t>(held));
    split.validation.assign(text.end() - static_cast<int64_t>(held), text.end());
    const std::vector<uint8_t> expected = split.validation;
    const auto data = make_byte_dataset(std::move(split), 16);
    CHECK(data->eval_sequences() == static_cast<int64_t>((held + 15) / 16));
    const Batch batch = data->eval_batch(0, data->eval_sequences());
    const std::vector<int64_t> tokens = values(batch.tokens_BL), targets = values(batch.targets_BL);
    REQUIRE(targets.size() == tokens.size());
    for (size_t i = 0; i < targets.size(); ++i) {
      if (i >= held) {
        CHECK(targets[i] == -1);
        CHECK(tokens[i] == 0);
        continue;
      }
      CHECK(targets[i] == expected[i]);
      CHECK(tokens[i] == (i == 0 ? '\n' : expected[i - 1]));
    }
  }
}

TEST_CASE("slices of a training batch and of the validation split equal the whole") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/text", cycling_text(4000, 'a', 26));
  for (const auto& data : {make("bytes", 32, {{"path", folder.path() + "/text"}}), make("markov", 32)}) {
    const Batch whole = data->train_batch(1, 5, 0, 12, 12);
    const Batch slice = data->train_batch(1, 5, 3, 4, 12);
    CHECK(at::equal(slice.tokens_BL, whole.tokens_BL.narrow(0, 3, 4)));
    CHECK(at::equal(slice.targets_BL, whole.targets_BL.narrow(0, 3, 4)));
    CHECK((values(slice.sequence_B) == std::vector<int64_t>{3, 4, 5, 6}));
    CHECK(at::equal(whole.tokens_BL.narrow(1, 1, 31), whole.targets_BL.narrow(1, 0, 31)));
    CHECK_FALSE(at::equal(whole.tokens_BL, data->train_batch(1, 6, 0, 12, 12).tokens_BL));
    CHECK_FALSE(at::equal(whole.tokens_BL, data->train_batch(2, 5, 0, 12, 12).tokens_BL));

    const int64_t sequences = data->eval_sequences();
    const Batch eval = data->eval_batch(0, sequences);
    const Batch last = data->eval_batch(sequences - 1, 1);
    CHECK(at::equal(last.tokens_BL, eval.tokens_BL.narrow(0, sequences - 1, 1)));
    CHECK(at::equal(last.targets_BL, eval.targets_BL.narrow(0, sequences - 1, 1)));
    CHECK(data->train_batch(1, 5, 4, 0, 12).tokens_BL.sizes() == at::IntArrayRef({0, 32}));
  }
}

TEST_CASE("token counts are those of the training split alone") {
  ByteSplit split{.train = {'a', 'b', 'a', 255}, .validation = {'a', 'z', 'z'}};
  const Tensor counts_V = make_byte_dataset(std::move(split), 2)->token_counts_V();
  CHECK(counts_V.sum().item<int64_t>() == 4);
  CHECK(counts_V[97].item<int64_t>() == 2);
  CHECK(counts_V[255].item<int64_t>() == 1);
  CHECK(counts_V[122].item<int64_t>() == 0);
}

TEST_CASE("unusable text is refused in one line with the documented exit code") {
  const ScratchFolder folder = scratch();
  const std::string path = folder.path();
  write_text(path + "/empty", "");
  write_text(path + "/short", std::string(100, 'x'));
  std::filesystem::create_directories(path + "/hollow/inner");
  const auto failure = [&](const std::string& name, double validation = 0.05) {
    return failure_of([&] { make("bytes", 16, {{"path", name.empty() ? name : path + name}, {"validation", validation}}); });
  };
  const std::vector<std::tuple<Failure, ExitCode, std::string>> cases{
      {failure(""), ExitCode::kUsage, "`path`"},
      {failure("/absent"), ExitCode::kData, "no such file or folder"},
      {failure("/empty"), ExitCode::kData, "is empty"},
      {failure("/hollow"), ExitCode::kData, "no file"},
      {failure("/short"), ExitCode::kUsage, "the validation split has 5 bytes"},
      {failure("/short", 0.0), ExitCode::kUsage, "the validation split has 0 bytes"},
      {failure("/short", 0.9), ExitCode::kUsage, "the training split has 10 bytes"},
      {failure_of([] { read_documents("/dev/null"); }), ExitCode::kData, "neither a file nor a folder"},
      {failure_of([] { make("bytes", 0, {{"path", std::string("x")}}); }), ExitCode::kUsage, "context"},
  };
  for (const auto& [found, code, part] : cases) {
    INFO(found.message);
    CHECK(found.code == code);
    CHECK(found.says(part));
    CHECK(found.one_line());
  }
}
