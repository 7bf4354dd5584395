#include "datasets/byte_text.h"

#include "core/error.h"
#include "core/io/files.h"
#include "core/random.h"
#include "datasets/sentencepiece.h"
#include "datasets/token_data.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

namespace moelab {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kByteVocabulary = 256;
constexpr uint8_t kStartByte = '\n';

std::vector<std::string> files_below(const fs::path& folder) {
  std::vector<std::string> names;
  try {
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder)) {
      if (entry.is_regular_file() && entry.file_size() > 0) {
        names.push_back(entry.path().lexically_relative(folder).generic_string());
      }
    }
  } catch (const fs::filesystem_error& problem) {
    data_error(folder.string() + ": cannot list the folder: " + problem.code().message());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<Document> read_folder(const fs::path& folder) {
  std::vector<Document> documents;
  for (const std::string& name : files_below(folder)) documents.push_back({name, read_file((folder / name).string())});
  if (documents.empty()) data_error(folder.string() + ": no file with anything in it below this folder; check `path`");
  return documents;
}

std::vector<size_t> hash_order(const std::vector<Document>& documents) {
  std::vector<std::pair<uint64_t, size_t>> hashed;
  for (size_t d = 0; d < documents.size(); ++d) {
    hashed.emplace_back(random_key(0, "split").with(documents[d].name).value, d);
  }
  std::sort(hashed.begin(), hashed.end());
  std::vector<size_t> order;
  for (const auto& [hash, d] : hashed) order.push_back(d);
  return order;
}

std::vector<bool> held_out(const std::vector<Document>& documents, size_t room) {
  std::vector<bool> held(documents.size());
  for (const size_t d : hash_order(documents)) {
    if (documents[d].bytes.size() > room) continue;
    held[d] = true;
    room -= documents[d].bytes.size();
  }
  return held;
}

void append_bytes(std::vector<uint8_t>& to, std::string_view bytes) { to.insert(to.end(), bytes.begin(), bytes.end()); }

std::shared_ptr<const std::vector<uint8_t>> shared_bytes(std::vector<uint8_t> bytes) {
  return std::make_shared<const std::vector<uint8_t>>(std::move(bytes));
}

std::string_view text_in(const std::vector<uint8_t>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::vector<std::string> every_byte() {
  std::vector<std::string> bytes;
  for (int byte = 0; byte < kByteVocabulary; ++byte) bytes.emplace_back(1, static_cast<char>(byte));
  return bytes;
}

SentencePieces pieces_of(const DatasetSpec& spec, std::string_view train) {
  if (!spec.tokenizer.empty()) return SentencePieces(spec.tokenizer);
  return SentencePieces::cached(train, spec.options.integer("vocabulary_size"));
}

TokenData piece_data(ByteSplit split, const DatasetSpec& spec) {
  const SentencePieces pieces = pieces_of(spec, text_in(split.train));
  TokenData data;
  data.document_ends = std::move(split.document_ends);
  data.vocabulary = std::ssize(pieces.bytes_V());
  data.start = pieces.encode(std::string(1, kStartByte)).back();
  data.bytes_V = pieces.bytes_V();
  data.train_bytes = shared_bytes(std::move(split.train));
  data.validation_bytes = shared_bytes(std::move(split.validation));
  data.tokenizer = pieces.model();
  data.train = TokenStream(pieces.encode(text_in(*data.train_bytes), data.document_ends));  // no token is of two documents
  data.validation = TokenStream(pieces.encode(text_in(*data.validation_bytes)));
  return data;
}

}  // namespace

std::vector<Document> read_documents(const std::string& path) {
  std::error_code failure;
  const fs::file_status status = fs::status(path, failure);
  if (fs::is_directory(status)) return read_folder(path);
  if (!fs::exists(status)) data_error(path + ": no such file or folder; check `path`");
  if (!fs::is_regular_file(status)) data_error(path + ": neither a file nor a folder; check `path`");
  std::vector<Document> documents{{fs::path(path).filename().string(), read_file(path)}};
  if (documents[0].bytes.empty()) data_error(path + ": the file is empty; name a file with text");
  return documents;
}

ByteSplit split_documents(const std::vector<Document>& documents, double fraction, const std::string& how) {
  size_t total = 0;
  for (const Document& document : documents) total += document.bytes.size();
  const size_t room = static_cast<size_t>(std::llround(fraction * static_cast<double>(total)));
  const bool by_document = how == "document" || (how == "auto" && documents.size() >= kDocumentsForAuto);
  ByteSplit split;
  if (by_document) {
    const std::vector<bool> held = held_out(documents, room);
    for (size_t d = 0; d < documents.size(); ++d) {
      append_bytes(held[d] ? split.validation : split.train, documents[d].bytes);
      if (!held[d]) split.document_ends.push_back(std::ssize(split.train));
    }
    return split;
  }
  for (const Document& document : documents) {
    append_bytes(split.train, document.bytes);
    split.document_ends.push_back(std::min<int64_t>(std::ssize(split.train), static_cast<int64_t>(total - room)));
  }
  const auto boundary = split.train.end() - static_cast<int64_t>(room);
  split.validation.assign(boundary, split.train.end());
  split.train.erase(boundary, split.train.end());
  return split;
}

std::shared_ptr<const Dataset> make_byte_dataset(ByteSplit split, int64_t context, const std::string& composer) {
  TokenData data;
  data.document_ends = std::move(split.document_ends);
  data.vocabulary = kByteVocabulary;
  data.token_name = "bytes";
  data.start = kStartByte;
  data.bytes_V = every_byte();
  data.train_bytes = shared_bytes(std::move(split.train));
  data.validation_bytes = shared_bytes(std::move(split.validation));
  data.train = TokenStream(std::span(*data.train_bytes), data.train_bytes);
  data.validation = TokenStream(std::span(*data.validation_bytes), data.validation_bytes);
  return make_token_dataset(std::move(data), context, composer);
}

std::shared_ptr<const Dataset> make_text_dataset(ByteSplit split, const DatasetSpec& spec) {
  const std::string& composer = spec.options.text("composer");
  if (spec.options.text("tokenizer") == "bytes") return make_byte_dataset(std::move(split), spec.context, composer);
  return make_token_dataset(piece_data(std::move(split), spec), spec.context, composer);
}

OptionSpec validation_option() {
  return {.name = "validation", .default_value = 0.05, .doc = "share of the bytes held out for validation", .min = 0, .max = 1};
}

OptionSpecs text_options() {
  return {validation_option(),
          option("tokenizer", "bytes", "what a token is: a byte, or a piece that SentencePiece learns from the training split")
              .one_of({"bytes", "sentencepiece"}),
          option("vocabulary_size", 1024, "sentencepiece: number of pieces, those of the 256 bytes and of the unknown included")
              .between(kLeastPieces, kMostPieces)
              .read_when("tokenizer", {"sentencepiece"}),
          composer_option()};
}

}  // namespace moelab
