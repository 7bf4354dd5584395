#include "experiments/check_report.h"

#include "core/memory.h"
#include "core/model/block.h"

#include <ATen/ops/sum.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <cmath>

namespace moelab {
namespace {

Json landmark_json(double value) { return std::isnan(value) ? Json(nullptr) : Json(value); }

int64_t bytes_of(const std::vector<NamedTensor>& tensors) {
  int64_t bytes = 0;
  for (const NamedTensor& entry : tensors) bytes += static_cast<int64_t>(entry.tensor.nbytes());
  return bytes;
}

int64_t micro_batch(const Experiment& e) { return e.train.batch / e.train.micro_batches; }

// Rows of width D that a block keeps for its backward pass, by counting: two norms, queries, keys, values, attention in and
// out, two residual sums, and what their backward kernels keep. Without attention a norm, a sum, and theirs.
constexpr double kRowsPerBlock = 12, kRowsPerBlockWithoutAttention = 4;

// Floats per token that an MoE site keeps: its k experts' inputs, outputs and hidden rows. An expert with P parameters has
// about P/D hidden values per row, since each of its matrices has one side D.
double site_floats(const Site& site, double width) {
  const auto k = static_cast<double>(std::max<int64_t>(1, choices_per_row(site.router->facts(), site.router->spec())));
  return k * (2 * width + static_cast<double>(site.bank->parameters_per_expert(0)) / width);
}

// Targets of a full sample: each of its tokens, or its class.
int64_t targets_of_sample(const Experiment& e) { return e.data->vocabulary() > 0 ? e.model->context() : 1; }

double activation_bytes(const Experiment& e) {
  const Options model = model_options(e.root);
  const auto width = static_cast<double>(model.integer("width")), layers = static_cast<double>(model.integer("layers"));
  double per_row = layers * (model.declared("heads") ? kRowsPerBlock : kRowsPerBlockWithoutAttention) * width;
  for (const Site* site : e.model->sites()) per_row += site_floats(*site, width);
  if (e.train.recompute) per_row = per_row / layers + layers * width;  // one block at a time, and every block's input
  const double element = model.text("dtype") == "float64" ? 8 : 4;
  const auto logits = static_cast<double>(2 * targets_of_sample(e) * e.data->shape().classes);  // and their softmax in the loss
  return element * (per_row * static_cast<double>(e.model->context()) + logits) * static_cast<double>(micro_batch(e));
}

Json memory_json(const Experiment& e) {
  const int64_t parameters = bytes_of(e.model->parameters()), trained = bytes_of(e.model->trainable());
  // Of frozen ones too where they may thaw.
  const int64_t optimizer = bytes_of(e.model->optimised()) * (e.train.optimizer.name == "adamw" ? 2 : 1);
  const auto activations = static_cast<int64_t>(activation_bytes(e));
  return {{"parameters", parameters},
          {"gradients", trained},
          {"optimizer", optimizer},
          {"activations_estimate", activations},
          {"total_estimate", parameters + trained + optimizer + activations},
          {"machine", physical_memory()}};
}

int64_t train_tokens(const Dataset& data) {
  const Tensor counts_V = data.token_counts_V();
  return counts_V.defined() ? counts_V.sum().item<int64_t>() : 0;
}

Json data_json(const Experiment& e) {
  const Dataset& data = *e.data;
  const DataShape shape = data.shape();
  return {{"name", dataset_entry(e.root).name},
          {"holds", to_string(shape.kind)},
          {"sample", shape.sample},
          {"classes", shape.classes},
          {"vocabulary", data.vocabulary()},
          {"train_samples", data.train_samples()},
          {"train_tokens", train_tokens(data)},
          {"train_bytes", data.train_bytes().size()},
          {"validation_sequences", data.eval_sequences()},
          {"validation_bytes", data.validation_bytes().size()},
          {"entropy_bits", landmark_json(data.known_entropy_bits())}};
}

Json training_json(const Experiment& e) {
  const TrainSettings& t = e.train;
  return {{"objective", t.objective},
          {"steps", t.steps},
          {"batch", t.batch},
          {"micro_batches", t.micro_batches},
          {"context", e.model->context()},
          {"tokens", t.steps * t.batch * targets_of_sample(e)},
          {"precision", t.bf16 ? "bf16" : "float32"},
          {"optimizer", t.optimizer.name},
          {"unused_experts", t.optimizer.skip_unused_experts ? "skip" : "zero_grad"}};
}

Json learning_rate_json(const TrainSettings& t) {
  const auto at = [&](int64_t step) { return learning_rate(t.optimizer.lr, t.schedule, step, t.steps); };
  return {{"first", at(0)}, {"peak", t.optimizer.lr}, {"last", at(std::max<int64_t>(0, t.steps - 1))}};
}

// Places per expert; null = no limit.
Json places_json(const CapacityPolicy& policy, int64_t rows, const RouterSpec& spec, int64_t k) {
  return policy.mode == CapacityPolicy::Mode::kNone ? Json(nullptr) : Json(policy.places(rows, spec.max_experts, k));
}

Json mode_json(const Experiment& e, const Site& site, Mode mode) {
  const RouterSpec& spec = site.router->spec();
  const RouterFacts facts = site.router->facts();
  const CapacityPolicy& policy = spec.capacity(mode);
  const int64_t k = choices_per_row(facts, spec, mode), context = e.model->context();
  const Causality verdict = causality(facts, policy, mode, k, e.train.eval_prompt);
  return {{"capacity_of_a_sequence", places_json(policy, context, spec, k)},
          {"capacity_of_a_micro_batch", places_json(policy, context * micro_batch(e), spec, k)},
          {"causal", verdict.causal},
          {"reason", verdict.reason}};
}

const char* scope_word(LossScope scope) {
  switch (scope) {
    case LossScope::kMicro: return "micro";
    case LossScope::kSequence: return "sequence";
    case LossScope::kStep: return "step";
    case LossScope::kStepStreaming: return "step_streaming";
  }
  return "?";
}

Json loss_json(const LossTerm& term, const Router& router, int64_t k) {
  const Landmarks marks = term.loss->landmarks_among(router.active_experts(), router.spec().max_experts, k);
  return {{"label", term.label},
          {"coefficient", term.coefficient},
          {"scope", scope_word(term.scope)},
          {"at_balance", landmark_json(marks.balance)},
          {"at_collapse", landmark_json(marks.collapse)}};
}

Json layer_json(const Experiment& e, const Site& site) {
  const RouterSpec& spec = site.router->spec();
  const int64_t k = choices_per_row(site.router->facts(), spec);
  Json losses = Json::array();
  for (const LossTerm& term : site.losses) losses.push_back(loss_json(term, *site.router, k));
  return {{"site", site.path},
          {"layer", site.layer},
          {"router", site.router->entry().name},
          {"expert", site.bank->name()},
          {"experts", spec.experts},
          {"max_experts", spec.max_experts},
          {"k", k == 0 ? Json(nullptr) : Json(k)},
          {"train", mode_json(e, site, Mode::kTrain)},
          {"eval", mode_json(e, site, Mode::kEval)},
          {"losses", losses}};
}

Json warnings_json(const Experiment& e) {
  Json warnings = Json::array();
  if (const std::string line = untrained_base(e); !line.empty()) warnings.push_back(line);
  return warnings;
}

}  // namespace

Json check_report(const Experiment& e) {
  Json layers = Json::array();
  for (const Site* site : e.model->sites()) layers.push_back(layer_json(e, *site));
  return {{"name", e.name},
          {"config_id", e.config_id},
          {"model", {{"name", model_entry(e.root).name}, {"causal", model_entry(e.root).causal}}},
          {"parameters", {{"total", e.model->parameter_count()}, {"active", e.model->active_parameters()}}},
          {"flops_per_token", e.model->flops_per_token()},
          {"memory_bytes", memory_json(e)},
          {"data", data_json(e)},
          {"training", training_json(e)},
          {"learning_rate", learning_rate_json(e.train)},
          {"layers", layers},
          {"sees_future", e.model->training_sees_future()},
          {"warnings", warnings_json(e)},
          {"refusals", Json::array()}};
}

}  // namespace moelab
