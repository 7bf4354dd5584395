// The far side of the border that library.h describes: linked with SentencePiece, loaded by dlmopen, and never linked with
// LibTorch.
#include "datasets/sentencepiece/library.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace moelab {
namespace {

namespace spm = ::sentencepiece;

// Text goes through as it is: nothing is normalised, and every byte has a piece.
std::unordered_map<std::string, std::string> training_settings(const PieceTraining& training) {
  return {{"model_type", "bpe"},
          {"vocab_size", std::to_string(training.vocabulary)},
          {"byte_fallback", "true"},
          {"normalization_rule_name", "identity"},
          {"add_dummy_prefix", "false"},
          {"remove_extra_whitespaces", "false"},
          {"max_sentence_length", std::to_string(training.longest_sentence)},
          {"bos_id", "-1"},
          {"eos_id", "-1"},
          {"num_threads", "1"},
          {"minloglevel", "2"}};
}

class Sentences : public spm::SentenceIterator {
 public:
  explicit Sentences(const PieceTraining& training) : rest_(training.text), sentence_end_(training.sentence_end) { Next(); }
  bool done() const override { return sentence_.empty(); }
  void Next() override {
    sentence_ = rest_.substr(0, rest_.empty() ? 0 : sentence_end_(rest_));
    rest_.remove_prefix(sentence_.size());
  }
  const std::string& value() const override { return sentence_; }
  spm::util::Status status() const override { return {}; }

 private:
  std::string_view rest_;
  size_t (*sentence_end_)(std::string_view) noexcept;
  std::string sentence_;
};

class Model final : public PieceModel {
 public:
  spm::util::Status load(std::string_view model) { return library_.LoadFromSerializedProto({model.data(), model.size()}); }
  int size() const noexcept override { return library_.GetPieceSize(); }
  bool is_unknown(int token) const noexcept override { return library_.IsUnknown(token); }
  bool is_byte(int token) const noexcept override { return library_.IsByte(token); }
  std::string_view piece(int token) const noexcept override { return library_.IdToPiece(token); }
  int token_of(std::string_view piece) const noexcept override { return library_.PieceToId({piece.data(), piece.size()}); }

  int64_t encode(std::string_view word, int* tokens, size_t room) const noexcept override {
    std::vector<int> encoded;
    if (!library_.Encode({word.data(), word.size()}, &encoded).ok() || encoded.size() > room) return -1;
    std::copy(encoded.begin(), encoded.end(), tokens);
    return static_cast<int64_t>(encoded.size());
  }

  void release() noexcept override { delete this; }

 private:
  spm::SentencePieceProcessor library_;
};

class Library final : public PieceLibrary {
 public:
  bool learn(const PieceTraining& training, PieceReceiver& receiver) const noexcept override {
    Sentences sentences(training);
    std::string model;
    const spm::util::Status status = spm::SentencePieceTrainer::Train(training_settings(training), &sentences, &model);
    receiver.take(status.ok() ? model : std::string(status.error_message()));
    return status.ok();
  }

  PieceModel* load(std::string_view serialised, PieceReceiver& complaint) const noexcept override {
    auto model = std::make_unique<Model>();
    const spm::util::Status status = model->load(serialised);
    if (status.ok()) return model.release();
    complaint.take(status.error_message());
    return nullptr;
  }
};

}  // namespace
}  // namespace moelab

extern "C" __attribute__((visibility("default"))) const moelab::PieceLibrary* moelab_piece_library() {
  static const moelab::Library library;
  return &library;
}
