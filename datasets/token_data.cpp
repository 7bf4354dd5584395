#include "datasets/token_data.h"

#include "core/error.h"
#include "core/io/files.h"
#include "datasets/composer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <algorithm>
#include <mutex>
#include <utility>

namespace moelab {
namespace {

Batch empty_token_batch(int64_t first, int64_t count, int64_t context) {
  Batch batch;
  batch.tokens_BL = at::zeros({count, context}, at::kLong);
  batch.targets_BL = at::full({count, context}, -1, at::kLong);
  batch.sequence_B = at::arange(first, first + count, at::kLong);
  return batch;
}

int64_t* row_of(const Tensor& rows_BL, int64_t b) { return rows_BL.mutable_data_ptr<int64_t>() + b * rows_BL.size(1); }

// The targets [start, start + context) of a stream, as far as it goes, each beside the token before it.
void fill_window(const TokenStream& stream, int64_t before_all, int64_t start, const Batch& batch, int64_t b) {
  const int64_t length = std::min(batch.tokens_BL.size(1), stream.size() - start);
  int64_t* tokens = row_of(batch.tokens_BL, b);
  tokens[0] = start == 0 ? before_all : stream.at(start - 1);
  stream.copy(start, length - 1, tokens + 1);
  stream.copy(start, length, row_of(batch.targets_BL, b));
}

int64_t windows_in(const TokenStream& stream, int64_t context) { return (stream.size() + context - 1) / context; }

// What one epoch reads: its documents end to end, and the order of the sequences that these are cut into.
struct Epoch {
  int64_t seed, number;
  std::vector<int64_t> documents;  // in the order of the stream
  std::vector<int64_t> begins;     // place of each one's first token
  TokenStream stream;
  std::vector<int64_t> sequences;

  int64_t document_at(int64_t place) const {
    return documents[std::upper_bound(begins.begin(), begins.end(), place) - begins.begin() - 1];
  }
};

class Composer {
 public:
  Composer(const TokenData& data, int64_t context, bool similar) : context_(context) {
    int64_t begin = 0;
    for (const int64_t end : data.document_ends) {
      if (end > begin) documents_.push_back(data.train.part(begin, end - begin));
      begin = end;
    }
    if (similar) path_ = similar_documents();
  }

  std::shared_ptr<const Epoch> epoch(int64_t seed, int64_t number) const {
    const std::lock_guard<std::mutex> guard(lock_);
    if (!latest_ || latest_->seed != seed || latest_->number != number) latest_ = made(seed, number);
    return latest_;
  }

 private:
  std::vector<int64_t> similar_documents() const {
    if (documents_.size() < 2)
      usage_error("`composer` = \"similarity\" needs several documents, and the training split has one; "
                  "use \"windows\" or \"random\"");
    DocumentProfiles profiles(std::ssize(documents_));
    for (size_t d = 0; d < documents_.size(); ++d) {
      std::vector<int64_t> tokens(documents_[d].size());
      documents_[d].copy(0, documents_[d].size(), tokens.data());
      profiles.set(static_cast<int64_t>(d), tokens);
    }
    return profiles.similar_path();
  }

  std::shared_ptr<const Epoch> made(int64_t seed, int64_t number) const {
    const RandomKey key = random_key(seed, "epoch").with("number", number);
    const auto epoch = std::make_shared<Epoch>();
    epoch->seed = seed;
    epoch->number = number;
    epoch->documents = path_.empty() ? shuffled_order(key.with("documents"), std::ssize(documents_)) : path_;
    for (const int64_t d : epoch->documents) {
      epoch->begins.push_back(epoch->stream.size());
      epoch->stream.append(documents_[d]);
    }
    epoch->sequences = shuffled_order(key.with("sequences"), windows_in(epoch->stream, context_));
    return epoch;
  }

  int64_t context_;
  std::vector<TokenStream> documents_;
  std::vector<int64_t> path_;  // empty = an order is drawn
  mutable std::mutex lock_;
  mutable std::shared_ptr<const Epoch> latest_;
};

class TokenDataset : public Dataset {
 public:
  TokenDataset(TokenData data, int64_t context, const std::string& composer) : data_(std::move(data)), context_(context) {
    if (composer != "windows") composer_ = std::make_unique<Composer>(data_, context, composer == "similarity");
    counts_.resize(data_.vocabulary);
    HashStream hash;
    for (const TokenStream* stream : {&data_.train, &data_.validation}) {
      stream->each_block([&](std::span<const int64_t> block) {
        hash.add({reinterpret_cast<const char*>(block.data()), block.size_bytes()});
        if (stream == &data_.train) for (const int64_t token : block) ++counts_[token];
      });
    }
    fingerprint_ = fmt::format("{}+{}:{}", data_.train.size(), data_.validation.size(), hash.hex());
  }

  DataShape shape() const override { return {.kind = DataKind::kTokens, .classes = data_.vocabulary}; }
  bool is_text() const override { return !data_.bytes_V.empty() || data_.bytes_per_token == data_.bytes_per_token; }
  std::string tokenizer() const override { return data_.tokenizer; }
  std::string fingerprint() const override { return fingerprint_; }
  std::vector<uint16_t> train_tokens() const override { return tokens_in(data_.train); }
  std::vector<uint16_t> validation_tokens() const override { return tokens_in(data_.validation); }

  const std::vector<uint8_t>& train_bytes() const override {
    return data_.train_bytes ? *data_.train_bytes : Dataset::train_bytes();
  }
  const std::vector<uint8_t>& validation_bytes() const override {
    return data_.validation_bytes ? *data_.validation_bytes : Dataset::validation_bytes();
  }

  Batch train_batch(int64_t seed, int64_t step, int64_t first, int64_t count, int64_t batch) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= batch, "a slice of a training batch lies outside it");
    return composer_ ? composed_batch(seed, step * batch, first, count) : window_batch(seed, step, first, count);
  }

  int64_t eval_sequences() const override { return windows_in(data_.validation, context_); }

  Batch eval_batch(int64_t first, int64_t count) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= eval_sequences(), "a validation slice lies outside the split");
    const Batch out = empty_token_batch(first, count, context_);
    for (int64_t b = 0; b < count; ++b) fill_window(data_.validation, data_.start, (first + b) * context_, out, b);
    return out;
  }

  double bytes_of(const Tensor& targets_BL) const override {
    if (data_.bytes_V.empty()) return static_cast<double>(targets_BL.ge(0).sum().item<int64_t>()) * data_.bytes_per_token;
    const Tensor flat = targets_BL.contiguous();
    const auto* target = flat.const_data_ptr<int64_t>();
    size_t bytes = 0;
    for (int64_t i = 0; i < flat.numel(); ++i) bytes += target[i] < 0 ? 0 : data_.bytes_V[target[i]].size();
    return static_cast<double>(bytes);
  }

  std::string text_of(const std::vector<int64_t>& tokens) const override {
    std::string text;
    for (size_t i = 0; i < tokens.size() && !data_.bytes_V.empty(); ++i) text += data_.bytes_V.at(tokens[i]);
    return text;
  }

  Tensor token_counts_V() const override {
    const Tensor counts_V = at::zeros({data_.vocabulary}, at::kLong);
    std::copy(counts_.begin(), counts_.end(), counts_V.mutable_data_ptr<int64_t>());
    return counts_V;
  }

 private:
  Batch window_batch(int64_t seed, int64_t step, int64_t first, int64_t count) const {
    const RandomKey key = random_key(seed, "data").with("step", step);
    const Batch out = empty_token_batch(first, count, context_);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t start = uniform_integer(key, first + b, data_.train.size() - context_);
      data_.train.copy(start, context_, row_of(out.tokens_BL, b));
      data_.train.copy(start + 1, context_, row_of(out.targets_BL, b));
    }
    return out;
  }

  // The sequences of all epochs are counted through; `before` is how many earlier steps took.
  Batch composed_batch(int64_t seed, int64_t before, int64_t first, int64_t count) const {
    const int64_t per_epoch = windows_in(data_.train, context_);
    Batch out = empty_token_batch(first, count, context_);
    out.document_BL = at::full({count, context_}, -1, at::kLong);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t taken = before + first + b;
      const auto epoch = composer_->epoch(seed, taken / per_epoch);
      const int64_t start = epoch->sequences[taken % per_epoch] * context_;
      fill_window(epoch->stream, data_.start, start, out, b);
      for (int64_t i = 0; i < std::min(context_, epoch->stream.size() - start); ++i)
        row_of(out.document_BL, b)[i] = epoch->document_at(std::max<int64_t>(0, start + i - 1));
    }
    return out;
  }

  static std::vector<uint16_t> tokens_in(const TokenStream& stream) {
    std::vector<uint16_t> tokens;
    stream.each_block([&](std::span<const int64_t> block) { tokens.insert(tokens.end(), block.begin(), block.end()); });
    return tokens;
  }

  TokenData data_;
  int64_t context_;
  std::unique_ptr<Composer> composer_;  // null = windows
  std::vector<int64_t> counts_;         // of the training split
  std::string fingerprint_;
};

void require_window(const char* split, int64_t tokens, const char* token_name, int64_t needed) {
  if (tokens >= needed) return;
  usage_error(fmt::format("the {} split has {} {}, fewer than the {} of one window; change `validation` or `context`, "
                          "or take more text", split, tokens, token_name, needed));
}

}  // namespace

OptionSpec composer_option() {
  return option("composer", "windows",
                "training sequences start anywhere; or are whole documents end to end, in random order or beside similar ones")
      .one_of({"windows", "random", "similarity"});
}

std::shared_ptr<const Dataset> make_token_dataset(TokenData data, int64_t context, const std::string& composer) {
  require_window("training", data.train.size(), data.token_name, context + 1);
  require_window("validation", data.validation.size(), data.token_name, context);
  return std::make_shared<TokenDataset>(std::move(data), context, composer);
}

}  // namespace moelab
