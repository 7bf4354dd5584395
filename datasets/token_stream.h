// A row of tokens of one or two bytes each, wherever they lie: in memory, in mapped files, or pieces of either in any order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace moelab {

// Copies share the memory, which lives as long as the last of them.
class TokenStream {
 public:
  TokenStream() = default;
  TokenStream(std::span<const uint8_t> tokens, std::shared_ptr<const void> owner);
  TokenStream(std::span<const uint16_t> tokens, std::shared_ptr<const void> owner);
  explicit TokenStream(std::vector<uint16_t> tokens);

  int64_t size() const { return size_; }
  int64_t at(int64_t place) const;
  void copy(int64_t first, int64_t count, int64_t* to) const;  // tokens [first, first + count)
  TokenStream part(int64_t first, int64_t count) const;
  void append(const TokenStream& more);

  // Calls `use` with the tokens in order, some at a time.
  template <class Use>
  void each_block(const Use& use) const;

 private:
  struct Piece {
    std::shared_ptr<const void> owner;
    const void* tokens;
    bool wide;      // two bytes each
    int64_t begin;  // place of its first token
    int64_t count;

    void copy(int64_t first, int64_t end, int64_t* to) const;
  };
  void add(Piece piece);
  size_t piece_of(int64_t place) const;

  std::vector<Piece> pieces_;
  int64_t size_ = 0;
};

template <class Use>
void TokenStream::each_block(const Use& use) const {
  constexpr int64_t kBlock = 1 << 16;
  std::vector<int64_t> block;
  for (int64_t first = 0; first < size_; first += kBlock) {
    block.resize(static_cast<size_t>(std::min(kBlock, size_ - first)));
    copy(first, static_cast<int64_t>(block.size()), block.data());
    use(std::span<const int64_t>(block));
  }
}

}  // namespace moelab
