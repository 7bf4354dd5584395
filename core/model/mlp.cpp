// The classifier of vectors: projection → residual blocks of experts → norm → classes. Rows meet in the experts alone.
#include "core/model/classifier.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <cmath>

namespace moelab {
namespace {

class MlpModel : public Classifier {
 public:
  MlpModel(const ModelSpec& spec, const Options& options) : Classifier(spec) {
    const BackboneSettings settings = read_backbone(spec, options, std::nullopt);
    const int64_t features = spec.data.sample.at(0);
    const double std = 1 / std::sqrt(static_cast<double>(features));
    input_DF_ = add_parameter("input.weight",
                              normal_tensor(settings.init.with("input"), {settings.width, features}, std, settings.dtype));
    input_D_ = add_parameter("input.bias", at::zeros({settings.width}, at::TensorOptions().dtype(settings.dtype)));
    add_blocks(settings.blocks);
    add_head(settings);
  }

  int64_t context() const override { return 1; }

  double flops_per_token() const override {
    return 2.0 * static_cast<double>(input_DF_.numel()) + block_flops_per_row(1) + head_flops();
  }

 protected:
  Tensor embed(const Tensor& values) const override {
    // Under autocast the product is rounded; what the blocks add to is not.
    return at::linear(values, input_DF_, input_D_).to(input_DF_.scalar_type()).unsqueeze(1);
  }

  Tensor readout_B1D(const Tensor& x_BLD) const override { return x_BLD; }

 private:
  Tensor input_DF_, input_D_;
};

const Registration<ModelEntry> registration_mlp{{
    .name = "mlp",
    .title = "A classifier of vectors: residual blocks of experts, without attention",
    .doc = "Each vector is a sequence of one row. Routers that decide over a group of rows take the micro-batch as their group "
           "where "
           "they are told so (expert_choice: group = \"micro\"). Nothing is causal, so no router is refused for looking ahead.",
    .reads = DataKind::kVectors,
    .options = backbone_options({}),
    .make = [](const ModelSpec& spec, const Options& options) -> std::shared_ptr<Model> {
      return std::make_shared<MlpModel>(spec, options);
    },
}};

}  // namespace
}  // namespace moelab
