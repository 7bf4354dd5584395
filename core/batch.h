// What a data set hands to a model: tokens, images or vectors, and what is to be predicted of them.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <vector>

namespace moelab {

enum class DataKind { kTokens, kImages, kVectors };
const char* to_string(DataKind kind);    // "tokens", "images", "vectors"
const char* sample_word(DataKind kind);  // one of a batch: "sequence", "image", "vector"
const char* target_word(DataKind kind);  // what is predicted once: "token", "image", "vector"
const char* row_word(DataKind kind);     // what is routed: "token", "patch", "vector"

struct DataShape {
  DataKind kind = DataKind::kTokens;
  int64_t classes = 0;                // that a prediction chooses among: the vocabulary, or the labels
  std::vector<int64_t> sample = {};   // [channels, height, width] of an image, [features] of a vector

  int64_t vocabulary() const { return kind == DataKind::kTokens ? classes : 0; }
};

// B samples: sequences of L tokens with a target each, or images or vectors with one target each (then L is 1). All on the CPU.
struct Batch {
  Tensor tokens_BL = {};   // int64; undefined where samples are not tokens
  Tensor values = {};      // float32 [B, …DataShape::sample]; undefined where samples are tokens
  Tensor targets_BL = {};  // int64: the token or the class to predict; -1 = nothing
  // Where defined, positions at or past a sequence's length are padding: they are routed nowhere, counted nowhere, and change no
  // other position's result.
  Tensor length_B = {};
  Tensor sequence_B = {};  // int64, unique within a training step or within the validation split: keys the random draws
  Tensor domain_B = {};    // int64 label of each sample; undefined where the data have none
  Tensor domain_BL = {};   // int64 label of each token instead, where a sequence holds several documents
  Tensor document_BL = {};  // int64, which document each token is of, where whole documents are put end to end; rising or not

  int64_t samples() const;
  int64_t target_tokens() const;  // positions with something to predict
  int64_t rows() const;           // tokens without padding; samples where there are no tokens
};

// Trailing positions without a target become padding.
Batch with_lengths(Batch batch);

}  // namespace moelab
