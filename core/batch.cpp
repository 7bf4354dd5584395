#include "core/batch.h"

#include <ATen/ops/arange.h>

namespace moelab {

const char* to_string(DataKind kind) {
  switch (kind) {
    case DataKind::kTokens: return "tokens";
    case DataKind::kImages: return "images";
    case DataKind::kVectors: return "vectors";
  }
  return "?";
}

const char* sample_word(DataKind kind) { return kind == DataKind::kTokens ? "sequence" : target_word(kind); }

const char* target_word(DataKind kind) {
  switch (kind) {
    case DataKind::kTokens: return "token";
    case DataKind::kImages: return "image";
    case DataKind::kVectors: return "vector";
  }
  return "?";
}

const char* row_word(DataKind kind) { return kind == DataKind::kImages ? "patch" : target_word(kind); }

int64_t Batch::samples() const { return (tokens_BL.defined() ? tokens_BL : values).size(0); }

int64_t Batch::target_tokens() const { return targets_BL.ge(0).sum().item<int64_t>(); }

int64_t Batch::rows() const {
  if (length_B.defined()) return length_B.sum().item<int64_t>();
  return tokens_BL.defined() ? tokens_BL.numel() : samples();
}

Batch with_lengths(Batch batch) {
  const Tensor counted_BL = batch.targets_BL.ge(0);
  if (counted_BL.all().item<bool>()) return batch;
  const Tensor place_L = at::arange(1, batch.targets_BL.size(1) + 1, at::kLong);
  batch.length_B = std::get<0>(counted_BL.to(at::kLong).mul(place_L).max(1));
  return batch;
}

}  // namespace moelab
