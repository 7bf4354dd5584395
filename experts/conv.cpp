// Patch experts: small convolutional networks that see a row as a vector of patches.
// Chen et al. 2022, Towards Understanding Mixture of Experts in Deep Learning, arXiv 2208.02813
//
//   x = (x¹, …, x^P), each patch of d = D/P numbers;   h = Σ_p act(w_in · x^p + b_in)          w_in [f, d]
//   classes = 0:  y = w_out · h                                                                 w_out [D, f]
//   classes = C:  y_c = Σ of the f/C entries of h that belong to class c, y_c = 0 for c ≥ C     (no w_out)
//   act: cubic z³ (the paper's nonlinear experts), linear z, relu, gelu
//
// Kernel and stride of the convolution are d, so that every patch is read once. Initial weights: N(0, init_scale²/fan_in), output
// weights times `output_scale`, biases 0; drawn per (parameter, expert).
//
// Differences from the paper: its experts have no w_out and no bias (classes = 2, bias = false); its code scales the usual
// initial values by 0.001 (init_scale). Here the output has the layer's width, so that the expert fits any model.
#include "core/expert.h"
#include "core/grouped.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <cmath>

namespace moelab {
namespace {

enum class ConvActivation { kCubic, kLinear, kRelu, kGelu };

ConvActivation conv_activation(const std::string& name) {
  if (name == "linear") return ConvActivation::kLinear;
  if (name == "relu") return ConvActivation::kRelu;
  return name == "gelu" ? ConvActivation::kGelu : ConvActivation::kCubic;
}

Tensor conv_activated(ConvActivation activation, const Tensor& z) {
  switch (activation) {
    case ConvActivation::kLinear: return z;
    case ConvActivation::kRelu: return at::relu(z);
    case ConvActivation::kGelu: return at::gelu(z);
    default: return z.mul(z).mul(z);
  }
}

class ConvBank : public ExpertBank {
 public:
  explicit ConvBank(const ExpertSpec& spec)
      : activation_(conv_activation(spec.options.text("activation"))), width_(spec.width),
        patches_(spec.options.integer("patches")), filters_(spec.options.integer("width")),
        classes_(spec.options.integer("classes")), first_(spec.first), init_scale_(spec.options.real("init_scale")),
        output_scale_(spec.output_scale) {
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
    w_in_EFd_ = add_stacked("w_in", at::empty({spec.experts, filters_, patch_width()}, spec.dtype));
    if (spec.options.flag("bias")) b_in_EF_ = add_stacked("b_in", at::zeros({spec.experts, filters_}, spec.dtype));
    if (classes_ == 0) w_out_EDF_ = add_stacked("w_out", at::empty({spec.experts, width_, filters_}, spec.dtype));
    for (int64_t e = 0; e < spec.experts; ++e) reset_expert(e, spec.init);
  }

  // Every patch is a row of its expert.
  Tensor forward(const ExpertContext& context, int) const override {
    const Tensor patches_Md = context.rows_ND.reshape({-1, patch_width()});
    const Tensor hidden_NF = pooled(grouped_linear(patches_Md, w_in_EFd_, b_in_EF_, context.offsets_E1.mul(patches_)));
    return classes_ > 0 ? class_sums(hidden_NF) : grouped_linear(hidden_NF, w_out_EDF_, {}, context.offsets_E1);
  }

  Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows_ND) const override {
    const Tensor patches_Md = rows_ND.reshape({-1, patch_width()});
    const Tensor z_MF = b_in_EF_.defined() ? at::linear(patches_Md, parameters.at(0), parameters.at(1))
                                           : at::linear(patches_Md, parameters.at(0));
    return classes_ > 0 ? class_sums(pooled(z_MF)) : at::linear(pooled(z_MF), parameters.back());
  }
  bool has_forward_with() const override { return true; }

  int64_t output_width(int) const override { return width_; }

  double flops_per_row(int64_t) const override {  // P patches of d numbers each are D numbers
    return 2.0 * static_cast<double>(width_ * filters_) * (classes_ > 0 ? 1 : 2);
  }

  void reset_expert(int64_t expert, RandomKey key) override {
    const at::NoGradGuard no_grad;
    const auto draw = [&](const char* name, const Tensor& stacked, double scale) {
      Tensor own = stacked.select(0, expert);
      const double std = scale * init_scale_ / std::sqrt(static_cast<double>(own.size(1)));
      own.copy_(normal_tensor(key.with(name, first_ + expert), own.sizes(), std, own.scalar_type()));
    };
    draw("w_in", w_in_EFd_, 1);
    if (w_out_EDF_.defined()) draw("w_out", w_out_EDF_, output_scale_);
    if (b_in_EF_.defined()) b_in_EF_.select(0, expert).zero_();
  }

 private:
  int64_t patch_width() const { return width_ / patches_; }

  Tensor pooled(const Tensor& z_MF) const {
    return conv_activated(activation_, z_MF).view({z_MF.size(0) / patches_, patches_, filters_}).sum(1);
  }

  Tensor class_sums(const Tensor& hidden_NF) const {
    const Tensor sums_NC = hidden_NF.view({-1, classes_, filters_ / classes_}).sum(2);
    return at::constant_pad_nd(sums_NC, {0, width_ - classes_});
  }

  Tensor add_stacked(const std::string& name, const Tensor& value) {
    groups_.front().stacked.push_back({name, add_parameter(name, value)});
    return groups_.front().stacked.back().tensor;
  }

  ConvActivation activation_;
  int64_t width_, patches_, filters_, classes_, first_;
  double init_scale_, output_scale_;
  Tensor w_in_EFd_, b_in_EF_, w_out_EDF_;
};

std::string conv_refusal(const ExpertSpec& spec) {
  const int64_t patches = spec.options.integer("patches"), classes = spec.options.integer("classes");
  const int64_t filters = spec.options.integer("width");
  if (spec.width % patches != 0)
    return fmt::format("a row of width {} cannot be cut into {} patches; patches must divide the width", spec.width, patches);
  if (classes == 0) return "";
  if (classes > spec.width) return fmt::format("{} classes do not fit a row of width {}", classes, spec.width);
  return filters % classes == 0
             ? ""
             : fmt::format("{} filters cannot be shared by {} classes; width must be a multiple of it", filters, classes);
}

const Registration<ExpertEntry> registration_conv{{
    .name = "conv",
    .title = "Patch experts: a small convolution over the patches of a row",
    .citation = "Chen et al. 2022, arXiv 2208.02813",
    .equation = "h = Σ_p act(w_in·x^p + b_in);  y = w_out·h, or sums of h by class",
    .differences = {"the output has the layer's width; the paper's experts are classes = 2, bias = false, init_scale = 0.001"},
    .options = {option("activation", "cubic", "of a patch's filters").one_of({"cubic", "linear", "relu", "gelu"}),
                option("patches", 4, "patches of a row; must divide the width").at_least(1),
                option("width", 16, "filters of one expert").at_least(1),
                option("classes", 0, "0: a learned output; else filters are summed by class into the first entries of the output")
                    .at_least(0),
                option("bias", false, "add a bias before the activation"),
                option("init_scale", 1.0, "of the initial weights").at_least(0)},
    .verified_with = {{{"classes", int64_t{2}}}, {{"patches", int64_t{1}}, {"width", int64_t{3}}}},
    .refuses = conv_refusal,
    .make = [](ExpertSpec spec) { return std::make_unique<ConvBank>(spec); },
}};

}  // namespace
}  // namespace moelab
