#include "model_fixture.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <stdexcept>

namespace moelab::test {

std::shared_ptr<Model> model_for(const DataShape& data, const std::string& text, bool allow_noncausal_training) {
  return make_model({parse_config(text, "tiny.toml"), data, /*seed=*/5, allow_noncausal_training});
}

std::shared_ptr<Model> model_of(const std::string& text, int64_t vocabulary, bool allow_noncausal_training) {
  return model_for({DataKind::kTokens, vocabulary}, text, allow_noncausal_training);
}

void shake(const Model& model, int64_t seed) {
  const at::NoGradGuard no_grad;
  at::manual_seed(seed);
  for (const NamedTensor& entry : model.parameters()) entry.tensor.add_(at::randn_like(entry.tensor), 0.4);
}

Batch random_batch(int64_t sequences, int64_t length, int64_t vocabulary, int64_t seed) {
  at::manual_seed(seed);
  Batch batch;
  const Tensor text = at::randint(vocabulary, {sequences, length + 1}, at::kLong);
  batch.tokens_BL = text.narrow(1, 0, length).contiguous();
  batch.targets_BL = text.narrow(1, 1, length).contiguous();
  batch.sequence_B = at::arange(sequences, at::kLong);
  return batch;
}

StepContext context_of(Mode mode) {
  StepContext context;
  context.mode = mode;
  context.seed = 4;
  context.step = 9;
  context.total_steps = 20;
  return context;
}

Tensor logits_of(const Model& model, const Batch& batch, const StepContext& context) {
  const at::NoGradGuard no_grad;
  return model.forward(batch, context).logits_BLV;
}

double loss_and_gradients(const Model& model, const Batch& batch, const StepContext& context) {
  model.zero_grad();
  const ModelOutput out = model.forward(batch, context);
  Tensor loss = cross_entropy_sum(out.logits_BLV, batch.targets_BL).div(batch.target_tokens());
  const std::vector<Site*> sites = model.sites();
  for (size_t s = 0; s < sites.size(); ++s)
    for (const TermStatistics& term : out.sites[s].statistics) {
      const LossTerm& attached = sites[s]->losses[term.term];
      loss = loss + local_value(attached, term.per_scope, *sites[s]->router).mul(attached.coefficient);
    }
  loss.backward();
  return loss.item<double>();
}

std::string refusal_of(const std::string& text, bool allow_noncausal_training) {
  try {
    model_of(text, 11, allow_noncausal_training);
    return "";
  } catch (const Error& error) {
    if (error.code() != ExitCode::kUsage) throw;
    return error.what();
  }
}

Tensor parameter_of(const Model& model, const std::string& name) {
  for (const NamedTensor& entry : model.parameters())
    if (entry.name == name) return entry.tensor;
  throw std::runtime_error("no parameter " + name);
}

}  // namespace moelab::test
