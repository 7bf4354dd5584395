#include "datasets/byte_text.h"

#include "core/error.h"
#include "core/io/files.h"
#include "core/random.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

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

class ByteDataset : public Dataset {
 public:
  ByteDataset(ByteSplit split, int64_t context) : split_(std::move(split)), context_(context) {}

  DataShape shape() const override { return {.kind = DataKind::kTokens, .classes = kByteVocabulary}; }
  const std::vector<uint8_t>& train_bytes() const override { return split_.train; }
  const std::vector<uint8_t>& validation_bytes() const override { return split_.validation; }

  Batch train_batch(int64_t seed, int64_t step, int64_t first, int64_t count, int64_t batch) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= batch, "a slice of a training batch lies outside it");
    const RandomKey key = random_key(seed, "data").with("step", step);
    Batch out = empty_batch(first, count);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t starts = static_cast<int64_t>(split_.train.size()) - context_;
      const uint8_t* window = split_.train.data() + uniform_integer(key, first + b, starts);
      std::copy_n(window, context_, row(out.tokens_BL, b));
      std::copy_n(window + 1, context_, row(out.targets_BL, b));
    }
    return out;
  }

  int64_t eval_sequences() const override {
    return (static_cast<int64_t>(split_.validation.size()) + context_ - 1) / context_;
  }

  Batch eval_batch(int64_t first, int64_t count) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= eval_sequences(), "a validation slice lies outside the split");
    Batch out = empty_batch(first, count);
    for (int64_t b = 0; b < count; ++b) {
      fill_eval_window((first + b) * context_, row(out.tokens_BL, b), row(out.targets_BL, b));
    }
    return out;
  }

  Tensor token_counts_V() const override {
    Tensor counts_V = at::zeros({kByteVocabulary}, at::kLong);
    int64_t* counts = counts_V.mutable_data_ptr<int64_t>();
    for (const uint8_t byte : split_.train) ++counts[byte];
    return counts_V;
  }

 private:
  Batch empty_batch(int64_t first, int64_t count) const {
    return {.tokens_BL = at::zeros({count, context_}, at::kLong),
            .targets_BL = at::full({count, context_}, -1, at::kLong),
            .sequence_B = at::arange(first, first + count, at::kLong),
            .domain_B = {}};
  }

  int64_t* row(const Tensor& rows_BL, int64_t b) const { return rows_BL.mutable_data_ptr<int64_t>() + b * context_; }

  void fill_eval_window(int64_t start, int64_t* tokens, int64_t* targets) const {
    const int64_t length = std::min(context_, static_cast<int64_t>(split_.validation.size()) - start);
    const uint8_t* window = split_.validation.data() + start;
    tokens[0] = start == 0 ? kStartByte : window[-1];
    std::copy_n(window, length - 1, tokens + 1);
    std::copy_n(window, length, targets);
  }

  ByteSplit split_;
  int64_t context_;
};

void require_window(const char* split, size_t bytes, int64_t needed) {
  if (static_cast<int64_t>(bytes) >= needed) return;
  usage_error(std::string("the ") + split + " split has " + std::to_string(bytes) + " bytes, fewer than the " +
              std::to_string(needed) + " of one window; change `validation` or `context`, or take more text");
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
    for (size_t d = 0; d < documents.size(); ++d) append_bytes(held[d] ? split.validation : split.train, documents[d].bytes);
    return split;
  }
  for (const Document& document : documents) append_bytes(split.train, document.bytes);
  const auto boundary = split.train.end() - static_cast<int64_t>(room);
  split.validation.assign(boundary, split.train.end());
  split.train.erase(boundary, split.train.end());
  return split;
}

std::shared_ptr<const Dataset> make_byte_dataset(ByteSplit split, int64_t context) {
  require_window("training", split.train.size(), context + 1);
  require_window("validation", split.validation.size(), context);
  return std::make_shared<ByteDataset>(std::move(split), context);
}

OptionSpec validation_option() {
  return {.name = "validation", .default_value = 0.05, .doc = "share of the bytes held out for validation", .min = 0, .max = 1};
}

}  // namespace moelab
