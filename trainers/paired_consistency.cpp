// Taming Sparsely Activated Transformer with Stochastic Experts
// Zuo, Liu, Jiao, Kim, Hassan, Zhang, Zhao, Gao, 2021, arXiv:2110.04260
//
//   Σ over target tokens of  Σ_i CE(ŷ_i) + α · ½ (KL(P_1‖P_2) + KL(P_2‖P_1)),  P_i = softmax of pass i's logits
//
// Every pass draws anew (experts, noise); gradients flow through both sides of the divergence. The reported task loss is the
// mean of the passes' cross entropies. Balance losses are averaged over the passes by the trainer.
//
// Differences from the paper: more than two passes are allowed, with the mean divergence of their pairs; logarithms come from
// log_softmax, where the authors' code takes the logarithm of a softmax.
#include "trainers/objective.h"

#include <ATen/ops/log_softmax.h>

namespace moelab {
namespace {

// log P of the positions that have a target, in float32 or better. [N,V]
Tensor target_log_probs(const Tensor& logits_BLV, const Tensor& targets_BL) {
  const at::ScalarType dtype = logits_BLV.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor row_N = targets_BL.reshape({-1}).ge(0).nonzero().squeeze(1).to(logits_BLV.device());
  return at::log_softmax(logits_BLV.reshape({-1, logits_BLV.size(-1)}).index_select(0, row_N), 1, dtype);
}

// ½ Σ (p - q)(ln p - ln q): both directions of the divergence in one product, never negative.
Tensor symmetric_divergence(const Tensor& log_p_NV, const Tensor& log_q_NV) {
  return log_p_NV.exp().sub(log_q_NV.exp()).mul(log_p_NV.sub(log_q_NV)).sum().mul(0.5);
}

Tensor mean_over_pairs(const std::vector<Tensor>& log_probs) {
  Tensor sum;
  int64_t pairs = 0;
  for (size_t i = 0; i < log_probs.size(); ++i)
    for (size_t j = i + 1; j < log_probs.size(); ++j, ++pairs) {
      const Tensor one = symmetric_divergence(log_probs[i], log_probs[j]);
      sum = pairs == 0 ? one : sum.add(one);
    }
  return sum.div(pairs);
}

class PairedConsistency : public Objective {
 public:
  PairedConsistency(int64_t passes, double alpha) : passes_(passes), alpha_(alpha) {}

  int64_t passes() const override { return passes_; }

  ObjectiveOutput compute(const Model& model, const Batch& batch, const StepContext& context) const override {
    ObjectiveOutput out;
    std::vector<Tensor> log_probs;
    for (int64_t i = 0; i < passes_; ++i) {
      StepContext own = context;
      own.pass = context.pass + i;
      out.passes.push_back(model.forward(batch, own));
      const Tensor& logits_BLV = out.passes.back().logits_BLV;
      const Tensor task = cross_entropy_sum(logits_BLV, batch.targets_BL);
      out.loss_sum = i == 0 ? task : out.loss_sum.add(task);
      log_probs.push_back(target_log_probs(logits_BLV, batch.targets_BL));
    }
    out.task_sum = out.loss_sum.item<double>() / static_cast<double>(passes_);
    const Tensor divergence = mean_over_pairs(log_probs);
    out.metrics["consistency"] = divergence.item<double>();
    out.loss_sum = out.loss_sum.add(divergence, alpha_);
    return out;
  }

 private:
  int64_t passes_;
  double alpha_;
};

const Registration<ObjectiveEntry> registration_paired_consistency{{
    .name = "paired_consistency",
    .title = "Stochastic passes that have to agree: THOR's objective",
    .citation = "Zuo et al., 2021, arXiv:2110.04260",
    .equation = "Σ_i CE(ŷ_i) + α · ½ (KL(P_1‖P_2) + KL(P_2‖P_1)) per target token; metric consistency = the divergence without α",
    .options = {option("alpha", 1.0, "weight of the divergence; the authors' translation script uses 5").at_least(0),
                option("passes", 2, "forward passes per step; more than 2 agree pair by pair, in the mean").at_least(2)},
    .make = [](const Options& options) -> std::unique_ptr<Objective> {
      return std::make_unique<PairedConsistency>(options.integer("passes"), options.real("alpha"));
    },
}};

}  // namespace
}  // namespace moelab
