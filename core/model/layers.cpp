#include "core/model/layers.h"

#include "core/error.h"
#include "core/random.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <cmath>

namespace moelab {
namespace {

at::ScalarType layer_precision(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Appends to what the cache keeps under `name`, and returns all of it.
Tensor appended(DecodeCache& cache, const char* name, const Tensor& more_BHLA) {
  Tensor& kept = cache.kept[name];
  kept = kept.defined() ? at::cat({kept, more_BHLA}, 2) : more_BHLA;
  return kept;
}

// Query l of a call that continues `past` keys sees keys 0 … past + l.
Tensor attend_causally(const Tensor& q_BHLA, const Tensor& k_BHKA, const Tensor& v_BHKA) {
  const int64_t queries = q_BHLA.size(2), past = k_BHKA.size(2) - queries;
  if (past == 0) return at::scaled_dot_product_attention(q_BHLA, k_BHKA, v_BHKA, {}, 0.0, /*is_causal=*/true);
  if (queries == 1) return at::scaled_dot_product_attention(q_BHLA, k_BHKA, v_BHKA);
  const Tensor seen_LK = at::ones({queries, past + queries}, q_BHLA.options().dtype(at::kBool)).tril(past);
  return at::scaled_dot_product_attention(q_BHLA, k_BHKA, v_BHKA, seen_LK);
}

// Turns pairs (i, i + A/2) of the last dimension.
Tensor turned_pairs(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t half = x.size(-1) / 2;
  const Tensor low = x.narrow(-1, 0, half), high = x.narrow(-1, half, half);
  return at::cat({low * cos - high * sin, high * cos + low * sin}, -1).to(x.scalar_type());
}

Tensor rotary_angles(const Tensor& position_T, int64_t head_size, double base) {
  const Tensor exponent_A2 = at::arange(0, head_size, 2, at::kDouble).div(-static_cast<double>(head_size));
  return position_T.to(at::kDouble).unsqueeze(1).mul(at::pow(base, exponent_A2));
}

}  // namespace

Tensor attend(const Tensor& q_BHLA, const Tensor& k_BHKA, const Tensor& v_BHKA, bool causal, const Tensor& real_BK) {
  if (causal) return attend_causally(q_BHLA, k_BHKA, v_BHKA);
  if (!real_BK.defined()) return at::scaled_dot_product_attention(q_BHLA, k_BHKA, v_BHKA);
  return at::scaled_dot_product_attention(q_BHLA, k_BHKA, v_BHKA, real_BK.view({real_BK.size(0), 1, 1, real_BK.size(1)}));
}

Tensor rotate_rows(const Tensor& x_THA, const Tensor& position_T, double base) {
  const auto options = x_THA.options().dtype(layer_precision(x_THA));
  const Tensor angle_T1A = rotary_angles(position_T, x_THA.size(2), base).unsqueeze(1);
  return turned_pairs(x_THA, angle_T1A.cos().to(options), angle_T1A.sin().to(options));
}

Tensor rms_norm(const Tensor& x, const Tensor& weight_D) {
  const at::ScalarType dtype = layer_precision(x);
  return at::rms_norm(x.to(dtype), {x.size(-1)}, weight_D.to(dtype), 1e-5).to(x.scalar_type());
}

RotaryEmbedding::RotaryEmbedding(int64_t head_size, int64_t context, double base) {
  const Tensor angle_LA2 = rotary_angles(at::arange(context, at::kLong), head_size, base);
  cos_LA2_ = angle_LA2.cos();
  sin_LA2_ = angle_LA2.sin();
}

Tensor RotaryEmbedding::operator()(const Tensor& x_BHLA, int64_t first) const {
  const auto options = x_BHLA.options().dtype(layer_precision(x_BHLA));
  const int64_t rows = x_BHLA.size(2);
  return turned_pairs(x_BHLA, cos_LA2_.narrow(0, first, rows).to(options), sin_LA2_.narrow(0, first, rows).to(options));
}

SelfAttention::SelfAttention(const AttentionSpec& spec) : heads_(spec.heads), causal_(spec.causal) {
  if (spec.rotary) rotary_.emplace(spec.width / spec.heads, spec.context, spec.rope_base);
  const double std = 1 / std::sqrt(static_cast<double>(spec.width));
  const auto weight = [&](const char* name, double scale) {
    return add_parameter(name, normal_tensor(spec.init.with(name), {spec.width, spec.width}, scale * std, spec.dtype));
  };
  q_DD_ = weight("q", 1);
  k_DD_ = weight("k", 1);
  v_DD_ = weight("v", 1);
  o_DD_ = weight("o", spec.output_scale);
}

Tensor SelfAttention::heads_of(const Tensor& x_BLD) const {
  return x_BLD.view({x_BLD.size(0), x_BLD.size(1), heads_, x_BLD.size(2) / heads_}).transpose(1, 2);
}

Tensor SelfAttention::turned(const Tensor& x_BHLA, int64_t first) const { return rotary_ ? (*rotary_)(x_BHLA, first) : x_BHLA; }

Tensor SelfAttention::forward(const Tensor& x_BLD, int64_t first, DecodeCache* cache, const LinearDelta& delta) const {
  const auto linear = [&](const char* map, const Tensor& rows_BLD, const Tensor& weight_DD) {
    const Tensor y_BLD = at::linear(rows_BLD, weight_DD), more_BLD = delta ? delta(map, rows_BLD) : Tensor();
    return more_BLD.defined() ? y_BLD.add(more_BLD) : y_BLD;
  };
  const Tensor q_BHLA = turned(heads_of(linear("q", x_BLD, q_DD_)), first);
  Tensor k_BHKA = turned(heads_of(linear("k", x_BLD, k_DD_)), first);
  Tensor v_BHKA = heads_of(linear("v", x_BLD, v_DD_));
  if (cache) {
    check_invariant(causal_, "attention over all positions cannot go on from earlier ones");
    k_BHKA = appended(*cache, "k", k_BHKA);
    v_BHKA = appended(*cache, "v", v_BHKA);
  }
  const Tensor mixed_BLHA = attend(q_BHLA, k_BHKA, v_BHKA, causal_).transpose(1, 2);
  return linear("o", mixed_BLHA.reshape(x_BLD.sizes()), o_DD_);
}

double SelfAttention::flops_per_row(int64_t context) const {
  const auto width = static_cast<double>(q_DD_.size(0));
  const double keys = causal_ ? static_cast<double>(context + 1) / 2 : static_cast<double>(context);
  return 8 * width * width + 4 * width * keys;
}

}  // namespace moelab
