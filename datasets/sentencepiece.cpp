#include "datasets/sentencepiece.h"

#include "core/error.h"
#include "core/io/files.h"
#include "datasets/cache.h"
#include "datasets/sentencepiece/library.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <optional>
#include <utility>

namespace moelab {
namespace {

namespace fs = std::filesystem;
constexpr size_t kLongestSentence = 4096;         // bytes; the library counts characters of a word in 16 bits
constexpr size_t kRememberedWords = size_t{1} << 20;
constexpr std::string_view kVisibleSpace = "\xe2\x96\x81";  // U+2581, which the library writes for a space
const char* const kPieceBytes = "<0x{:02X}>";               // and for a byte

class ReceivedBytes final : public PieceReceiver {
 public:
  void take(std::string_view bytes) noexcept override { bytes_ = bytes; }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// Loaded with the first tokenizer, for as long as the program runs.
const PieceLibrary& piece_library() {
  static const PieceLibrary* const library = [] {
    void* const loaded = ::dlmopen(LM_ID_NEWLM, MOELAB_PIECES_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    void* const symbol = loaded ? ::dlsym(loaded, kPieceLibrarySymbol) : nullptr;
    if (!symbol) usage_error(fmt::format("tokenizer = \"sentencepiece\" needs {} beside moelab's library: {}",
                                         MOELAB_PIECES_LIBRARY, ::dlerror()));
    return reinterpret_cast<const PieceLibrary* (*)()>(symbol)();
  }();
  return *library;
}

bool continues_character(char byte) { return (static_cast<uint8_t>(byte) & 0xc0) == 0x80; }

// The end of the first sentence: behind its line feed, or, where a line is too long, before a space or at least between two
// characters.
size_t sentence_end(std::string_view text) noexcept {
  const std::string_view start = text.substr(0, kLongestSentence);
  if (const size_t feed = start.find('\n'); feed != std::string_view::npos) return feed + 1;
  if (start.size() == text.size()) return text.size();
  if (const size_t space = start.rfind(' '); space != std::string_view::npos && space > 0) return space;
  size_t end = start.size();
  while (end > start.size() - 4 && continues_character(text[end])) --end;
  return end;
}

// The whole number that follows `words` in `text`.
std::optional<int64_t> number_after(std::string_view text, std::string_view words) {
  const size_t at = text.find(words);
  if (at == std::string_view::npos) return {};
  int64_t number = 0;
  const auto [end, failure] = std::from_chars(text.data() + at + words.size(), text.data() + text.size(), number);
  return failure == std::errc() ? std::optional(number) : std::nullopt;
}

// The library says by words alone what does not fit.
[[noreturn]] void refuse_vocabulary(int64_t wanted, const std::string& complaint) {
  const std::string given = fmt::format("`vocabulary_size` = {}", wanted);
  if (const auto needed = number_after(complaint, fmt::format("required_chars. {} vs ", wanted)))
    usage_error(fmt::format("{} is too small: the bytes and the characters of the training split take {}; take {} or more",
                            given, *needed, *needed));
  if (const auto most = number_after(complaint, "a value <= "))
    usage_error(fmt::format("{} is too large: the training split has no more than {} pieces; take {} or less, or more text",
                            given, *most, *most));
  usage_error(fmt::format("{}: SentencePiece cannot learn from this training split: {}", given, first_line(complaint)));
}

std::string learned_model(std::string_view train, int64_t vocabulary) {
  ReceivedBytes received;
  if (!piece_library().learn({train, vocabulary, kLongestSentence, sentence_end}, received))
    refuse_vocabulary(vocabulary, received.bytes());
  return received.bytes();
}

std::string cache_key(std::string_view train, int64_t vocabulary) {
  HashStream hash;
  for (const std::string& setting : {std::to_string(vocabulary), std::string(MOELAB_SENTENCEPIECE_VERSION),
                                     fmt::format("bpe, {} bytes a sentence", kLongestSentence)}) {
    hash.add(setting);
    hash.add(std::string_view("\0", 1));
  }
  hash.add(train);
  return hash.hex();
}

// Files are named "<key>-<hash of the content>.model": a damaged one does not fit its name, and is not used.
std::optional<std::string> remembered_model(const std::string& folder, const std::string& key) {
  std::error_code absent;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, absent)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(key + "-")) continue;
    std::string model = read_file(entry.path().string());
    if (name == fmt::format("{}-{}.model", key, xxh3_hex(model))) return model;
  }
  return {};
}

// Several processes may do this at once: each renames a whole file of its own to the one name.
void remember_model(const std::string& folder, const std::string& key, const std::string& model) {
  make_folders(folder);
  const ScratchFolder scratch(folder);
  write_file(scratch.path() + "/model", model);
  rename_path(scratch.path() + "/model", fmt::format("{}/{}-{}.model", folder, key, xxh3_hex(model)));
  sync_folder(folder);
}

std::string bytes_of_piece(const PieceModel& library, int token) {
  if (library.is_unknown(token)) return {};
  const std::string_view piece = library.piece(token);
  if (library.is_byte(token)) return {static_cast<char>(std::stoi(std::string(piece.substr(3, 2)), nullptr, 16))};
  std::string bytes;
  for (size_t i = 0; i < piece.size();) {
    const bool space = piece.substr(i).starts_with(kVisibleSpace);
    bytes += space ? ' ' : piece[i];
    i += space ? kVisibleSpace.size() : 1;
  }
  return bytes;
}

[[noreturn]] void refuse_model(const std::string& why) {
  data_error("the SentencePiece model of an earlier run is damaged: " + why +
             "; take the run's tokenizer.model from a copy of it");
}

}  // namespace

SentencePieces SentencePieces::learned_from(std::string_view train, int64_t vocabulary) {
  return SentencePieces(learned_model(train, vocabulary));
}

SentencePieces SentencePieces::cached(std::string_view train, int64_t vocabulary) {
  const std::string folder = cache_folder() + "/tokenizers", key = cache_key(train, vocabulary);
  if (const auto model = remembered_model(folder, key)) return SentencePieces(*model);
  SentencePieces learned = learned_from(train, vocabulary);
  try {
    remember_model(folder, key, learned.model());
  } catch (const Error& error) {
    spdlog::warn("{}; the pieces will be learned again next time", error.what());
  }
  return learned;
}

SentencePieces::SentencePieces(std::string model) : model_(std::move(model)) {
  ReceivedBytes complaint;
  library_ = {piece_library().load(model_, complaint), [](PieceModel* loaded) { if (loaded) loaded->release(); }};
  if (!library_) refuse_model(first_line(complaint.bytes()));
  const int pieces = library_->size();
  if (pieces < kLeastPieces || pieces > kMostPieces) refuse_model(fmt::format("it has {} pieces", pieces));
  for (int token = 0; token < pieces; ++token) bytes_V_.push_back(bytes_of_piece(*library_, token));
  for (int byte = 0; byte < 256; ++byte) {
    const int token = library_->token_of(fmt::format(fmt::runtime(kPieceBytes), byte));
    if (!library_->is_byte(token)) refuse_model(fmt::format("it has no piece for byte {}", byte));
    token_of_byte_.push_back(static_cast<uint16_t>(token));
  }
}

// What the library would not give back as it was (bytes that are no UTF-8, the sign that stands for a space) goes byte by byte.
void SentencePieces::append_word(std::string_view word, std::vector<uint16_t>& to) const {
  std::vector<int> tokens(word.size());  // no piece stands for less than a byte
  std::string back;
  tokens.resize(static_cast<size_t>(std::max<int64_t>(library_->encode(word, tokens.data(), tokens.size()), 0)));
  for (const int token : tokens) back += bytes_V_[static_cast<size_t>(token)];
  if (back == word) to.insert(to.end(), tokens.begin(), tokens.end());
  else for (const char byte : word) to.push_back(token_of_byte_[static_cast<uint8_t>(byte)]);
}

// No piece reaches over the space before a word, so words can be encoded one by one, and each different one once.
void SentencePieces::append_document(std::string_view document, Known& known, std::vector<uint16_t>& to) const {
  while (!document.empty()) {
    std::string_view sentence = document.substr(0, sentence_end(document));
    document.remove_prefix(sentence.size());
    while (!sentence.empty()) {
      const std::string_view word = sentence.substr(0, sentence.find(' ', 1));
      sentence.remove_prefix(word.size());
      const auto [entry, fresh] = known.try_emplace(word);
      if (fresh) append_word(word, entry->second);
      to.insert(to.end(), entry->second.begin(), entry->second.end());
      if (known.size() > kRememberedWords) known.clear();
    }
  }
}

std::vector<uint16_t> SentencePieces::encode(std::string_view text, std::vector<int64_t>& ends) const {
  Known known;
  std::vector<uint16_t> tokens;
  int64_t begin = 0;
  for (int64_t& end : ends) {
    append_document(text.substr(begin, end - begin), known, tokens);
    begin = std::exchange(end, std::ssize(tokens));
  }
  return tokens;
}

std::vector<uint16_t> SentencePieces::encode(std::string_view text) const {
  std::vector<int64_t> ends{std::ssize(text)};
  return encode(text, ends);
}

}  // namespace moelab
