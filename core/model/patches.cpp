// The patch classifier of images, after the Vision Transformer (Dosovitskiy et al., 2020, arXiv:2010.11929): patches → projection
// + learned positions → blocks with attention over all patches → norm → mean over the patches, or a class token → classes.
//
// Differences from the paper: the blocks are those of the decoder (RMS norm, no biases in the attention).
#include "core/model/classifier.h"

#include "core/error.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <cmath>

namespace moelab {
namespace {

constexpr double kPositionStd = 0.02;

// Images [B,C,height,width] of C channels cut into squares of P·P pixels, row by row; each patch lists its channels one after the
// other. [B, patches, C·P·P]
Tensor cut_into_patches(const Tensor& images, int64_t patch) {
  const int64_t channels = images.size(1), rows = images.size(2) / patch, columns = images.size(3) / patch;
  return images.reshape({images.size(0), channels, rows, patch, columns, patch})
      .permute({0, 2, 4, 1, 3, 5})
      .reshape({images.size(0), rows * columns, channels * patch * patch});
}

int64_t checked_patch(const ModelSpec& spec, const Options& options) {
  const int64_t patch = options.integer("patch"), height = spec.data.sample.at(1), width = spec.data.sample.at(2);
  if (height % patch != 0 || width % patch != 0)
    spec.root.child("model").fail("patch",
                                  fmt::format("patch = {} does not divide images of {} × {} pixels", patch, height, width));
  return patch;
}

AttentionSpec patch_attention(const ModelSpec& spec, const Options& options) {
  AttentionSpec attention = read_attention(spec.root.child("model"), options);
  attention.causal = attention.rotary = false;
  return attention;
}

class PatchesModel : public Classifier {
 public:
  PatchesModel(const ModelSpec& spec, const Options& options) : Classifier(spec), patch_(checked_patch(spec, options)) {
    const BackboneSettings settings = read_backbone(spec, options, patch_attention(spec, options));
    const auto at_dtype = at::TensorOptions().dtype(settings.dtype);
    const std::vector<int64_t>& sample = spec.data.sample;
    const int64_t pixels = sample.at(0) * patch_ * patch_, patches = sample.at(1) * sample.at(2) / (patch_ * patch_);
    const double std = 1 / std::sqrt(static_cast<double>(pixels));
    const auto embedding = [&](const char* name, int64_t rows) {
      return normal_tensor(settings.init.with(name), {rows, settings.width}, kPositionStd, settings.dtype);
    };
    patch_DP_ = add_parameter("patch.weight",
                              normal_tensor(settings.init.with("patch"), {settings.width, pixels}, std, settings.dtype));
    patch_D_ = add_parameter("patch.bias", at::zeros({settings.width}, at_dtype));
    if (options.text("readout") == "class") class_1D_ = add_parameter("class_embedding.weight", embedding("class", 1));
    position_LD_ = add_parameter("position_embedding.weight", embedding("position", patches + (class_1D_.defined() ? 1 : 0)));
    add_blocks(settings.blocks);
    add_head(settings);
  }

  int64_t context() const override { return position_LD_.size(0); }

  double flops_per_token() const override {
    return 2.0 * static_cast<double>(patch_DP_.numel()) + block_flops_per_row(context()) +
           head_flops() / static_cast<double>(context());
  }

 protected:
  Tensor embed(const Tensor& values) const override {
    // Under autocast the product is rounded; what the blocks add to is not.
    Tensor x_BLD = at::linear(cut_into_patches(values, patch_), patch_DP_, patch_D_).to(patch_DP_.scalar_type());
    if (class_1D_.defined()) x_BLD = at::cat({class_1D_.expand({x_BLD.size(0), 1, -1}), x_BLD}, 1);
    return x_BLD.add(position_LD_);
  }

  Tensor readout_B1D(const Tensor& x_BLD) const override {
    return class_1D_.defined() ? x_BLD.narrow(1, 0, 1) : x_BLD.mean(1, /*keepdim=*/true);
  }

 private:
  int64_t patch_;
  Tensor patch_DP_, patch_D_, class_1D_, position_LD_;  // class_1D_ undefined where the mean is read
};

const Registration<ModelEntry> registration_patches{{
    .name = "patches",
    .title = "A patch classifier of images, with attention over all patches",
    .doc =
        "An image is a sequence, and its patches are the rows that are routed: a group of expert choice, and the slots of soft "
        "MoE, belong to one image. Nothing is causal, so no router is refused for looking ahead.",
    .reads = DataKind::kImages,
    .options = backbone_options({heads_option(),
                                 option("patch", 7, "side of a patch in pixels; must divide the image's sides").at_least(1),
                                 option("readout", "mean",
                                        "what the classes are read from: the mean over the patches, or a class "
                                        "token, which is one more row of each image")
                                     .one_of({"mean", "class"})}),
    .make = [](const ModelSpec& spec, const Options& options) -> std::shared_ptr<Model> {
      return std::make_shared<PatchesModel>(spec, options);
    },
}};

}  // namespace
}  // namespace moelab
