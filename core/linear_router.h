// The base of routers whose logits are x·weightᵀ: it owns `weight`, the noise that `[moe.noise]` asks for, and the mask of
// experts that are not there yet.
#pragma once

#include "core/select.h"

namespace moelab {

enum class SoftmaxOver { kAll, kChosen };

class LinearRouter : public Router {
 public:
  // Draws in training exactly where the resolved noise does.
  RouterFacts facts() const override;

  Tensor active_experts_E() const override;

 protected:
  // `noise` is resolved: never kPaper, unless the router draws its paper's noise itself.
  LinearRouter(RouterSpec spec, Tensor weight_ED, NoiseSpec noise, bool trainable = true);

  // This pass's logits: checked, noisy in training, inactive experts out of reach.
  NoisyLogits score(const RouteInput& in) const;

  // The last two steps of score(), for routers that add noise of their own.
  NoisyLogits checked(const RouteInput& in, NoisyLogits logits) const;

  // chosen_topk() that never takes an inactive expert: -1 where fewer than k are active.
  Tensor choose(const RouteInput& in, const Tensor& score_TE, int64_t k) const;

  // The whole of a plain top-k router: the k largest noisy logits, gates from a softmax over all experts or over the chosen.
  RouteOutput route_topk(const RouteInput& in, const NoisyLogits& logits, int64_t k, SoftmaxOver gates) const;

  Tensor weight_ED_;
  Tensor mask_E_;  // 1 = active, 0 = room to grow; undefined where max_experts = experts
  NoiseSpec noise_;
};

// What losses and probes read: probabilities without noise, logits with and without.
Scores scores_of(const NoisyLogits& logits, const Tensor& gate_TE);

// What `[moe.noise]` says, with kind = paper replaced by the kind that the paper uses.
NoiseSpec resolved_noise(NoiseSpec noise, NoiseSpec::Kind paper);

// Refuses k > experts, naming both.
void require_k_fits(const RouterSpec& spec);

}  // namespace moelab
