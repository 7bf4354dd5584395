#include "core/model/causal.h"

#include "core/model/block.h"

#include <fmt/format.h>

namespace moelab {
namespace {

const char* const kLabelled = "allow_noncausal_training = true (the training loss is then labelled \"sees the future\")";

// What lets the future in, and where it is written.
struct LookAhead {
  bool by_router = false;
  bool by_prompt = false;  // it would not, were the prompt not judged
  std::string reason;
};

LookAhead look_ahead(const LayerSettings& layer, const RouterFacts& facts, Mode mode, int64_t prompt) {
  const int64_t k = choices_per_row(facts, layer.router_spec, mode);
  const auto verdict_with = [&](const CapacityPolicy& policy, int64_t given) { return causality(facts, policy, mode, k, given); };
  const Causality verdict = verdict_with(layer.router_spec.capacity(mode), prompt);
  if (verdict.causal) return {};
  const bool by_router = !verdict_with({}, prompt).causal;
  return {by_router, by_router && verdict_with({}, 1).causal, verdict.reason};
}

std::string remedy(const LookAhead& ahead, Mode mode) {
  if (ahead.by_prompt)
    return "set [eval] prompt = N: the first N tokens of each sequence are then its prompt, and only those after it are scored";
  const std::string cure = ahead.by_router ? fmt::format("use a router that decides row by row in {}", to_string(mode))
                                           : "set priority = \"position\" with order = \"token_major\", or mode = \"none\"";
  return mode == Mode::kTrain ? fmt::format("{}, or {}", cure, kLabelled) : cure;
}

[[noreturn]] void refuse_look_ahead(const Table& moe, const LayerSettings& layer, const LookAhead& ahead, Mode mode) {
  const std::string message = fmt::format("layer {}: router '{}' looks ahead in {} of a causal model: {}; {}",
                                          layer.router_spec.layer, layer.router, to_string(mode), ahead.reason,
                                          remedy(ahead, mode));
  if (ahead.by_router) moe.child("router").fail("name", message);
  const Table eval = moe.child("capacity").child("eval");
  const bool written_in_eval = mode != Mode::kTrain && eval.present();
  const bool by_priority = layer.router_spec.capacity(mode).priority != CapacityPolicy::Priority::kPosition;
  (written_in_eval ? eval : moe.child("capacity")).fail(by_priority ? "priority" : "order", message);
}

}  // namespace

std::string require_causal(const Table& moe, const LayerSettings& layer, bool allow_noncausal_training, int64_t prompt) {
  // Only an instance knows its facts; it is small beside the experts.
  const RouterFacts facts = make_router(layer.router, layer.router_spec)->facts();
  const LookAhead eval = look_ahead(layer, facts, Mode::kEval, prompt);
  if (!eval.reason.empty()) refuse_look_ahead(moe, layer, eval, Mode::kEval);
  const LookAhead train = look_ahead(layer, facts, Mode::kTrain, prompt);
  if (!train.reason.empty() && !allow_noncausal_training) refuse_look_ahead(moe, layer, train, Mode::kTrain);
  return train.reason;
}

void require_causal_mask(const Table& expert, const LayerSettings& layer) {
  const Options& options = layer.expert_spec.options;
  if (!options.declared("mask") || options.text("mask") != "full") return;
  expert.fail("mask",
              fmt::format("layer {}: mask = \"full\" shows every token the later ones, in evaluation too, and this model is "
                          "causal; leave mask out, or use it with a classifier",
                          layer.router_spec.layer));
}

}  // namespace moelab
