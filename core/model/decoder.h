// The decoder language model: embedding → blocks → norm → logits.
#pragma once

#include "core/model/settings.h"

namespace moelab {

class DecoderModel : public Model {
 public:
  DecoderModel(DecoderSettings settings, int64_t seed);

  ModelOutput forward(const Batch& batch, const StepContext& context) const override;
  Tensor decode(const Tensor& tokens_BL, DecodeState& state) const override;

  std::vector<Site*> sites() const override;
  int64_t context() const override { return attention_.context; }
  std::vector<std::string> training_sees_future() const override;
  int64_t active_parameters() const override;
  double flops_per_token() const override;

 private:
  Tensor embed(const Tensor& tokens_BL) const;
  Tensor logits(const Tensor& x_BLD) const;
  const Tensor& output_weight_VD() const { return output_VD_.defined() ? output_VD_ : embedding_VD_; }
  void start(DecodeState& state, int64_t sequences) const;

  AttentionSpec attention_;
  int64_t vocabulary_;
  int64_t seed_;  // keys the draws while decoding
  std::vector<std::shared_ptr<Block>> blocks_;
  Tensor embedding_VD_, norm_D_, output_VD_;  // output_VD_ undefined where tied
};

}  // namespace moelab
