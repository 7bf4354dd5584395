// What classifiers share: values in, blocks over all rows of a sample, one prediction per sample out.
#pragma once

#include "core/model/backbone.h"

namespace moelab {

class Classifier : public Backbone {
 public:
  // Logits are [B,1,classes]. A batch of another shape than the data's is Error(kUsage).
  ModelOutput forward(const Batch& batch, const StepContext& context) const override;
  int64_t rows(const Batch& batch) const override { return batch.samples() * context(); }

 protected:
  explicit Classifier(const ModelSpec& spec) : data_(spec.data) {}

  virtual Tensor embed(const Tensor& values) const = 0;  // [B, …DataShape::sample] in the model's dtype → [B, context, D]
  virtual Tensor readout_B1D(const Tensor& x_BLD) const = 0;

  void add_head(const BackboneSettings& settings);  // the last parameters: "norm.weight", "head.weight", "head.bias"
  double head_flops() const;                        // per sample

 private:
  DataShape data_;
  Tensor norm_D_, head_VD_, head_V_;
};

}  // namespace moelab
