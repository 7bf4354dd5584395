// SentencePiece units (Kudo and Richardson, 2018, arXiv:1808.06226): byte-pair encoding with a token for every byte, so that
// any bytes come back as they were. Space belongs to the word after it; no token reaches over a space, a line feed, or the end
// of a document.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace moelab {

class PieceModel;

class SentencePieces {
 public:
  // Learns `vocabulary` pieces from `train`: one for what is unknown, which never occurs, one for each byte, then characters and
  // their pairs. The same text gives the same model. Error(kUsage) where the text calls for more pieces or has not so many.
  static SentencePieces learned_from(std::string_view train, int64_t vocabulary);

  // The same, remembered in the cache under a hash of the text, the settings and the library's version.
  static SentencePieces cached(std::string_view train, int64_t vocabulary);

  // From model() of another one. Error(kData) where it is none.
  explicit SentencePieces(std::string model);

  const std::string& model() const { return model_; }  // as the library serialises it
  const std::vector<std::string>& bytes_V() const { return bytes_V_; }  // what each token stands for
  std::vector<uint16_t> encode(std::string_view text) const;

  // Document after document: `ends` says where each ends in `text`, and then in the tokens.
  std::vector<uint16_t> encode(std::string_view text, std::vector<int64_t>& ends) const;

 private:
  // Tokens of the words met so far.
  using Known = std::unordered_map<std::string_view, std::vector<uint16_t>>;
  void append_document(std::string_view document, Known& known, std::vector<uint16_t>& to) const;
  void append_word(std::string_view word, std::vector<uint16_t>& to) const;

  std::string model_;
  std::shared_ptr<const PieceModel> library_;
  std::vector<std::string> bytes_V_;
  std::vector<uint16_t> token_of_byte_;  // [256]
};

inline constexpr int64_t kLeastPieces = 257;  // what is unknown, and every byte
inline constexpr int64_t kMostPieces = 65536;

}  // namespace moelab
