// SentencePiece units: every text comes back, learning is repeatable and sees the training split alone, the cache holds.
#include "core/io/files.h"
#include "datasets/sentencepiece.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <thread>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

std::string joined(const SentencePieces& pieces, const std::vector<uint16_t>& tokens) {
  std::string text;
  for (const uint16_t token : tokens) text += pieces.bytes_V()[token];
  return text;
}

const SentencePieces& wordy_pieces() {
  static const SentencePieces pieces = SentencePieces::learned_from(wordy_text(20000), 320);
  return pieces;
}

// Byte-pair encoding as it is told: characters, then again and again the neighbours that make the piece learned first, the
// leftmost of several; what is no piece goes byte by byte. Text of ASCII alone.
std::vector<uint16_t> encoded_by_hand(const SentencePieces& pieces, const std::string& sentence) {
  std::map<std::string, size_t> token_of;
  for (size_t token = kLeastPieces; token < pieces.bytes_V().size(); ++token) token_of[pieces.bytes_V()[token]] = token;
  std::vector<std::string> parts;
  for (const char character : sentence) parts.emplace_back(1, character);
  while (true) {
    size_t best = pieces.bytes_V().size(), at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i)
      if (const auto found = token_of.find(parts[i] + parts[i + 1]); found != token_of.end() && found->second < best)
        best = found->second, at = i;
    if (best == pieces.bytes_V().size()) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<int64_t>(at) + 1);
  }
  std::vector<uint16_t> tokens;
  for (const std::string& part : parts)
    tokens.push_back(static_cast<uint16_t>(token_of.count(part) ? token_of.at(part) : 1 + static_cast<uint8_t>(part[0])));
  return tokens;
}

std::vector<std::string> files_in(const std::string& folder) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry.path().string());
  return files;
}

}  // namespace

TEST_CASE("any bytes come back as they were") {
  std::string every, noise;
  for (int byte = 0; byte < 256; ++byte) every += static_cast<char>(byte);
  for (uint32_t i = 0; i < 20000; ++i) noise += static_cast<char>(i * i * 2654435761u >> 24);
  const std::vector<std::string> texts{"",
                                       "\n",
                                       " ",
                                       "   two  spaces   ",
                                       "\n\n\n",
                                       wordy_text(5000, 9),
                                       every,
                                       noise,
                                       "a sign \xe2\x96\x81 for a space, and one \xe2\x96\x85 for the unknown",
                                       "tab\tNUL\0\0!",
                                       std::string("NUL\0NUL", 7),
                                       "caf\xc3\xa9 na\xc3\xafve \xe6\x97\xa5\xe6\x9c\xac",
                                       "cut \xe6\x97",
                                       std::string(20000, 'k'),
                                       std::string(5000, 'k') + " " + std::string(5000, '\xc3')};
  for (const std::string& text : texts) {
    INFO(text.substr(0, 40));
    CHECK(joined(wordy_pieces(), wordy_pieces().encode(text)) == text);
  }
}

TEST_CASE("encoding is byte-pair encoding by plain loops over whole lines") {
  for (const std::string& line : {std::string("kato miren, sol  du.\n"), std::string("  lin ka7ka, vex Zto"), wordy_text(400, 5)})
    for (size_t begin = 0; begin < line.size();) {
      const size_t end = std::min(line.find('\n', begin), line.size() - 1) + 1;
      const std::string sentence = line.substr(begin, end - begin);
      INFO(sentence);
      CHECK(wordy_pieces().encode(sentence) == encoded_by_hand(wordy_pieces(), sentence));
      begin = end;
    }
}

TEST_CASE("frequent text takes fewer tokens than bytes, and learning is repeatable") {
  CHECK(wordy_pieces().bytes_V().size() == 320);
  CHECK(wordy_pieces().encode(wordy_text(3000, 4)).size() < 1500);
  CHECK(SentencePieces::learned_from(wordy_text(20000), 320).model() == wordy_pieces().model());
  CHECK(SentencePieces(wordy_pieces().model()).encode("kato miren") == wordy_pieces().encode("kato miren"));
}

TEST_CASE("pieces are learned from the training split alone") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path() + "/cache");
  std::string zs;
  while (zs.size() < 5000) zs += "zzzz zz ";
  write_text(folder.path() + "/text", wordy_text(15000) + zs.substr(0, 5000));
  const auto data = make("bytes", 16, {{"path", folder.path() + "/text"}, {"tokenizer", std::string("sentencepiece")},
                                       {"vocabulary_size", int64_t{310}}, {"validation", 0.25}});
  CHECK(data->tokenizer() == SentencePieces::learned_from(wordy_text(15000), 310).model());
  const SentencePieces pieces(data->tokenizer());
  for (size_t token = kLeastPieces; token < 310; ++token) CHECK(pieces.bytes_V()[token].find('z') == std::string::npos);
  CHECK(std::string(data->validation_bytes().begin(), data->validation_bytes().end()) == zs.substr(0, 5000));
}

TEST_CASE("validation predicts every piece once, after a line feed, and its bytes are those of the split") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path() + "/cache");
  write_text(folder.path() + "/text", wordy_text(12000));
  const auto data = make("bytes", 16, {{"path", folder.path() + "/text"}, {"tokenizer", std::string("sentencepiece")},
                                       {"vocabulary_size", int64_t{300}}, {"validation", 0.1}});
  const Batch all = data->eval_batch(0, data->eval_sequences());
  std::vector<int64_t> targets = values(all.targets_BL);
  CHECK(data->text_of({values(all.tokens_BL).front()}) == "\n");
  CHECK(data->bytes_of(all.targets_BL) == 1200);
  targets.erase(std::find(targets.begin(), targets.end(), -1), targets.end());
  CHECK(std::count(targets.begin(), targets.end(), -1) == 0);
  CHECK(data->text_of(targets) == wordy_text(12000).substr(10800));
  CHECK(data->is_text());
  CHECK(data->vocabulary() == 300);
  CHECK(data->token_counts_V().sum().item<int64_t>() == std::ssize(data->train_tokens()));
}

TEST_CASE("the cache is filled once, and what is damaged in it is learned again") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path());
  const std::string text = wordy_text(20000), first = SentencePieces::cached(text, 320).model();
  REQUIRE(first == wordy_pieces().model());
  const std::vector<std::string> files = files_in(folder.path() + "/tokenizers");
  REQUIRE(files.size() == 1);
  const auto written = std::filesystem::last_write_time(files[0]);
  CHECK(SentencePieces::cached(text, 320).model() == first);
  CHECK(std::filesystem::last_write_time(files[0]) == written);
  SentencePieces::cached(text, 330);
  SentencePieces::cached(wordy_text(20001), 320);
  CHECK(files_in(folder.path() + "/tokenizers").size() == 3);

  std::string damaged = first;
  damaged[damaged.size() / 2] ^= 1;
  write_text(files[0], damaged);
  CHECK(SentencePieces::cached(text, 320).model() == first);
  CHECK(read_file(files[0]) == first);
}

TEST_CASE("several at once fill the cache with one whole file") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path());
  const std::string text = wordy_text(20000);
  std::vector<std::string> models(4);
  {
    std::vector<std::jthread> threads;
    for (std::string& model : models) threads.emplace_back([&] { model = SentencePieces::cached(text, 320).model(); });
  }
  for (const std::string& model : models) CHECK(model == wordy_pieces().model());
  CHECK(files_in(folder.path() + "/tokenizers").size() == 1);
}

TEST_CASE("where nothing can be remembered, pieces are learned all the same") {
  const ScratchFolder folder = scratch();
  write_text(folder.path() + "/file", "no folder");
  const Environment cache("MOELAB_CACHE", folder.path() + "/file");
  CHECK(SentencePieces::cached(wordy_text(20000), 320).model() == wordy_pieces().model());
}

TEST_CASE("a vocabulary that does not fit the text is refused with the number that does") {
  // 12 syllables of 16 letters, space, comma, full stop, line feed: 20 characters beside the 257.
  const Failure small = failure_of([] { SentencePieces::learned_from(wordy_text(20000), 270); });
  CHECK(small.code == ExitCode::kUsage);
  CHECK(small.says("`vocabulary_size` = 270 is too small"));
  CHECK(small.one_line());
  const Failure large = failure_of([] { SentencePieces::learned_from("ab ab ab\n", 400); });
  CHECK(large.code == ExitCode::kUsage);
  CHECK(large.says("`vocabulary_size` = 400 is too large"));
  const size_t number = large.message.find("take ") + 5;
  const int64_t most = std::stoll(large.message.substr(number));
  CHECK(SentencePieces::learned_from("ab ab ab\n", most).bytes_V().size() == static_cast<size_t>(most));
  CHECK(failure_of([&] { SentencePieces::learned_from("ab ab ab\n", most + 1); }).says("too large"));
}

TEST_CASE("a model that is none is refused") {
  std::string cut = wordy_pieces().model();
  cut.resize(cut.size() / 2);
  for (const std::string& model : {std::string("no model"), cut}) {
    const Failure failure = failure_of([&] { SentencePieces{model}; });
    CHECK(failure.code == ExitCode::kData);
    CHECK(failure.one_line());
  }
}
