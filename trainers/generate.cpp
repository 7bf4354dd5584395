#include "trainers/generate.h"

#include "core/error.h"
#include "core/random.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

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

DecodeState fresh_state(const SampleSettings& settings) {
  DecodeState state;
  state.step = settings.step;
  state.total_steps = settings.total_steps;
  return state;
}

}  // namespace

std::vector<int64_t> generate(const Model& model, const std::vector<int64_t>& prompt, const SampleSettings& settings) {
  if (prompt.empty()) usage_error("generate needs at least one token to start from");
  const at::NoGradGuard no_grad;
  std::vector<int64_t> text = prompt;
  std::vector<int64_t> unread = prompt;  // what the model has not seen yet
  DecodeState state = fresh_state(settings);
  for (int64_t i = 0; i < settings.tokens; ++i) {
    if (state.position + static_cast<int64_t>(unread.size()) > model.context()) {
      state = fresh_state(settings);
      unread.assign(text.end() - std::min<int64_t>(static_cast<int64_t>(text.size()), (model.context() + 1) / 2), text.end());
    }
    const Tensor logits_BV = model.decode(at::tensor(unread, at::kLong).unsqueeze(0), state);
    text.push_back(sample_token(logits_BV[0], settings, i));
    unread = {text.back()};
  }
  return {text.begin() + static_cast<int64_t>(prompt.size()), text.end()};
}

}  // namespace moelab
