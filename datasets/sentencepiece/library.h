// What moelab asks of the SentencePiece library, which lives behind this border in a link namespace of its own: the flags that it
// keeps under global names (FLAGS_minloglevel) would lie over those of LibTorch, and writing one overwrites the other. Each side
// has its own heap, so memory is lent over the border and never given; nothing is thrown over it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace moelab {

// Receives what it has to copy before it returns.
class PieceReceiver {
 public:
  virtual void take(std::string_view bytes) noexcept = 0;

 protected:
  ~PieceReceiver() = default;
};

struct PieceTraining {
  std::string_view text;
  int64_t vocabulary;
  size_t longest_sentence;                            // bytes
  size_t (*sentence_end)(std::string_view) noexcept;  // the end of the first sentence of a text that is not empty
};

// A loaded model. Tokens are below size().
class PieceModel {
 public:
  virtual int size() const noexcept = 0;
  virtual bool is_unknown(int token) const noexcept = 0;
  virtual bool is_byte(int token) const noexcept = 0;
  virtual std::string_view piece(int token) const noexcept = 0;  // as long as the model lives
  virtual int token_of(std::string_view piece) const noexcept = 0;

  // Writes the tokens of a word to `tokens`, which has room for `room`; returns how many, or -1 where they cannot be had.
  virtual int64_t encode(std::string_view word, int* tokens, size_t room) const noexcept = 0;
  virtual void release() noexcept = 0;

 protected:
  ~PieceModel() = default;
};

class PieceLibrary {
 public:
  // True, and `receiver` has the model as the library serialises it; or false, and it has the library's complaint.
  virtual bool learn(const PieceTraining& training, PieceReceiver& receiver) const noexcept = 0;

  // To be released; or null, and `complaint` says why.
  virtual PieceModel* load(std::string_view model, PieceReceiver& complaint) const noexcept = 0;

 protected:
  ~PieceLibrary() = default;
};

// The one symbol that the isolated library exports: `const PieceLibrary* moelab_piece_library()`.
inline constexpr const char* kPieceLibrarySymbol = "moelab_piece_library";

}  // namespace moelab
