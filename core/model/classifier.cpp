#include "core/model/classifier.h"

#include "core/error.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace moelab {
namespace {

constexpr double kHeadStd = 0.02;

void check_values(const Batch& batch, const DataShape& data) {
  check_invariant(!batch.length_B.defined(), "images and vectors have no padding");
  const std::vector<int64_t> found = batch.values.sizes().slice(1).vec();
  if (found != data.sample)
    usage_error(
        fmt::format("samples of shape [{}] came to a model of [{}]", fmt::join(found, ", "), fmt::join(data.sample, ", ")));
}

}  // namespace

ModelOutput Classifier::forward(const Batch& batch, const StepContext& context) const {
  check_values(batch, data_);
  const auto rows = std::make_shared<const BatchRows>(BatchRows::of_samples(batch, this->context()));
  ModelOutput out;
  const Tensor x_BLD = through_blocks(embed(batch.values.to(head_VD_.options())), rows, context, out.sites);
  out.logits_BLV = at::linear(readout_B1D(rms_norm(x_BLD, norm_D_)), head_VD_, head_V_);
  return out;
}

void Classifier::add_head(const BackboneSettings& settings) {
  const auto options = at::TensorOptions().dtype(settings.dtype);
  norm_D_ = add_parameter("norm.weight", at::ones({settings.width}, options));
  head_VD_ = add_parameter("head.weight",
                           normal_tensor(settings.init.with("head"), {data_.classes, settings.width}, kHeadStd, settings.dtype));
  head_V_ = add_parameter("head.bias", at::zeros({data_.classes}, options));
  freeze_base();
}

double Classifier::head_flops() const { return 2.0 * static_cast<double>(head_VD_.numel()); }

}  // namespace moelab
