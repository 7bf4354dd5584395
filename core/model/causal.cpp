#include "core/model/causal.h"

#include "core/model/block.h"

#include <fmt/format.h>

namespace moelab {
namespace {

const char* const kLabelled = "allow_noncausal_training = true (the training loss is then labelled \"sees the future\")";

// What lets the future in, and where it is written.
struct LookAhead {
  bool by_router = false;
  std::string reason;
};

LookAhead look_ahead(const LayerSettings& layer, const RouterFacts& facts, Mode mode) {
  const int64_t k = choices_per_row(facts, layer.router_spec, mode);
  const Causality verdict = causality(facts, layer.router_spec.capacity(mode), mode, k);
  if (verdict.causal) return {};
  return {!causality(facts, CapacityPolicy{}, mode, k).causal, verdict.reason};
}

std::string remedy(const LookAhead& ahead, Mode mode) {
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

std::string require_causal(const Table& moe, const LayerSettings& layer, bool allow_noncausal_training) {
  // Only an instance knows its facts; it is small beside the experts.
  const RouterFacts facts = make_router(layer.router, layer.router_spec)->facts();
  const LookAhead eval = look_ahead(layer, facts, Mode::kEval);
  if (!eval.reason.empty()) refuse_look_ahead(moe, layer, eval, Mode::kEval);
  const LookAhead train = look_ahead(layer, facts, Mode::kTrain);
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
