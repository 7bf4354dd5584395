#include "core/model/model.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nll_loss.h>

namespace moelab {

Model::~Model() = default;

int64_t Batch::target_tokens() const { return targets_BL.ge(0).sum().item<int64_t>(); }

int64_t Batch::rows() const { return length_B.defined() ? length_B.sum().item<int64_t>() : tokens_BL.numel(); }

Tensor cross_entropy_sum(const Tensor& logits_BLV, const Tensor& targets_BL) {
  const at::ScalarType dtype = logits_BLV.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor logits_TV = logits_BLV.reshape({-1, logits_BLV.size(-1)});
  const Tensor log_probs_TV = at::log_softmax(logits_TV, 1, dtype);
  return at::nll_loss(log_probs_TV, targets_BL.reshape({-1}).to(logits_TV.device()), {}, at::Reduction::Sum, /*ignore_index=*/-1);
}

}  // namespace moelab
