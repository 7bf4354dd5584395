// The parts of a block that do not route: normalisation, rotary positions, attention. In shapes, H is the number of heads and
// A the size of one.
#pragma once

#include "core/expert.h"
#include "core/module.h"

#include <functional>
#include <optional>

namespace moelab {

// x / √(mean x² + 1e-5) · weight over the last dimension, in float32 or better; the result has x's dtype.
Tensor rms_norm(const Tensor& x, const Tensor& weight_D);

// Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pairs (i, i + A/2) turn by position · base^(-2i/A).
class RotaryEmbedding {
 public:
  RotaryEmbedding(int64_t head_size, int64_t context, double base);

  // Rows of x_BHLA stand at positions first, first + 1, …
  Tensor operator()(const Tensor& x_BHLA, int64_t first) const;

 private:
  Tensor cos_LA2_, sin_LA2_;  // float64, one row per position, one column per pair
};

// The same of rows [T,H,A] that each stand at a position of their own.
Tensor rotate_rows(const Tensor& x_THA, const Tensor& position_T, double base);

// softmax(q·kᵀ/√A)·v for queries that are the last of the keys' positions. Causal: each sees itself and those before it.
// real_BK (bool, undefined = all) says which keys are there; causal attention has those that are not at the end.
Tensor attend(const Tensor& q_BHLA, const Tensor& k_BHKA, const Tensor& v_BHKA, bool causal, const Tensor& real_BK = {});

struct AttentionSpec {
  int64_t width = 0;
  int64_t heads = 1;
  int64_t context = 0;
  bool causal = true;     // each position sees itself and those before it; else all see all
  bool rotary = true;     // positions turn queries and keys; else attention knows no positions
  double rope_base = 10000;
  double output_scale = 1;  // scales the initial output weights
  at::ScalarType dtype = at::kFloat;
  RandomKey init;
};

// What is added to linear map "q", "k", "v" or "o" of x; undefined = nothing.
using LinearDelta = std::function<Tensor(const char* map, const Tensor& x_BLD)>;

// Multi-head self-attention without biases.
class SelfAttention : public Module {
 public:
  explicit SelfAttention(const AttentionSpec& spec);

  // `cache` holds the keys and values of earlier calls; x_BLD continues them at position `first`. Causal attention alone.
  Tensor forward(const Tensor& x_BLD, int64_t first = 0, DecodeCache* cache = nullptr, const LinearDelta& delta = {}) const;

  double flops_per_row(int64_t context) const;  // the mean over the positions of a full sequence

 private:
  Tensor heads_of(const Tensor& x_BLD) const;  // [B,H,L,A]
  Tensor turned(const Tensor& x_BHLA, int64_t first) const;

  int64_t heads_;
  bool causal_;
  std::optional<RotaryEmbedding> rotary_;
  Tensor q_DD_, k_DD_, v_DD_, o_DD_;
};

}  // namespace moelab
