#include "datasets/token_stream.h"

#include "core/error.h"

#include <utility>

namespace moelab {
namespace {

std::shared_ptr<const std::vector<uint16_t>> shared_tokens(std::vector<uint16_t> tokens) {
  return std::make_shared<const std::vector<uint16_t>>(std::move(tokens));
}

}  // namespace

TokenStream::TokenStream(std::span<const uint8_t> tokens, std::shared_ptr<const void> owner) {
  add({std::move(owner), tokens.data(), /*wide=*/false, 0, std::ssize(tokens)});
}

TokenStream::TokenStream(std::span<const uint16_t> tokens, std::shared_ptr<const void> owner) {
  add({std::move(owner), tokens.data(), /*wide=*/true, 0, std::ssize(tokens)});
}

TokenStream::TokenStream(std::vector<uint16_t> tokens) {
  const auto shared = shared_tokens(std::move(tokens));
  *this = TokenStream(std::span(*shared), shared);
}

void TokenStream::Piece::copy(int64_t first, int64_t end, int64_t* to) const {
  if (wide) std::copy(static_cast<const uint16_t*>(tokens) + first, static_cast<const uint16_t*>(tokens) + end, to);
  else std::copy(static_cast<const uint8_t*>(tokens) + first, static_cast<const uint8_t*>(tokens) + end, to);
}

void TokenStream::add(Piece piece) {
  piece.begin = size_;
  size_ += piece.count;
  pieces_.push_back(std::move(piece));
}

size_t TokenStream::piece_of(int64_t place) const {
  const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), place,
                                      [](int64_t wanted, const Piece& piece) { return wanted < piece.begin; });
  return static_cast<size_t>(after - pieces_.begin()) - 1;
}

void TokenStream::copy(int64_t first, int64_t count, int64_t* to) const {
  check_invariant(first >= 0 && count >= 0 && first + count <= size_, "tokens outside their stream");
  const int64_t end = first + count;
  for (size_t p = count == 0 ? pieces_.size() : piece_of(first); p < pieces_.size() && first < end; ++p) {
    const Piece& piece = pieces_[p];
    const int64_t stop = std::min(end, piece.begin + piece.count);
    piece.copy(first - piece.begin, stop - piece.begin, to);
    to += stop - first;
    first = stop;
  }
}

int64_t TokenStream::at(int64_t place) const {
  int64_t token = 0;
  copy(place, 1, &token);
  return token;
}

TokenStream TokenStream::part(int64_t first, int64_t count) const {
  check_invariant(first >= 0 && count >= 0 && first + count <= size_, "tokens outside their stream");
  TokenStream out;
  for (const Piece& piece : pieces_) {
    const int64_t begin = std::max(first, piece.begin), end = std::min(first + count, piece.begin + piece.count);
    if (begin >= end) continue;
    const auto skipped = (begin - piece.begin) * (piece.wide ? 2 : 1);
    out.add({piece.owner, static_cast<const uint8_t*>(piece.tokens) + skipped, piece.wide, 0, end - begin});
  }
  return out;
}

void TokenStream::append(const TokenStream& more) {
  for (const Piece& piece : more.pieces_) add(piece);
}

}  // namespace moelab
