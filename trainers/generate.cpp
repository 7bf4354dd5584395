#include "trainers/generate.h"

#include "core/error.h"
#include "core/random.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>

namespace moelab {
namespace {

// The first token whose cumulated probability exceeds the draw.
int64_t sample_token(const Tensor& logits_V, const SampleSettings& settings, int64_t index) {
  if (settings.temperature == 0) return logits_V.argmax().item<int64_t>();
  const Tensor p_V = at::softmax(logits_V.to(at::kDouble).div(settings.temperature), 0);
  const auto* p = p_V.const_data_ptr<double>();
  double left = uniform_real(random_key(settings.seed, "generate"), index);
  for (int64_t v = 0; v + 1 < p_V.numel(); ++v) {
    left -= p[v];
    if (left < 0) return v;
  }
  return p_V.numel() - 1;
}

}  // namespace

std::vector<int64_t> generate(const Model& model, const std::vector<int64_t>& prompt, const SampleSettings& settings) {
  if (prompt.empty()) usage_error("generate needs at least one token to start from");
  const at::NoGradGuard no_grad;
  DecodeState state;
  Tensor logits_BV = model.decode(at::tensor(prompt, at::kLong).unsqueeze(0), state);
  std::vector<int64_t> written;
  const auto seen = static_cast<int64_t>(prompt.size());
  for (int64_t i = 0; i < settings.tokens && seen + i < model.context(); ++i) {
    written.push_back(sample_token(logits_BV[0], settings, i));
    if (seen + i + 1 < model.context()) logits_BV = model.decode(at::tensor({written.back()}, at::kLong).unsqueeze(0), state);
  }
  return written;
}

}  // namespace moelab
