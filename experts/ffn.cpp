// Feed-forward experts.
//
//   relu, gelu, gelu_tanh:  y = w_out · act(w_in · x + b_in) + b_out
//   swiglu:                 y = w_down · (silu(w_gate · x + b_gate) ∘ (w_up · x + b_up)) + b_down
//
// The ReLU form is that of Shazeer et al. 2017 (arXiv 1701.06538) and Lepikhin et al. 2020 (GShard, 2006.16668), SwiGLU that
// of Shazeer 2020 (2002.05202). Biases are off unless asked for, and start at 0.
//
// Experts may differ in width (Wang et al. 2024, HMoE, 2408.10681): `widths` says one for each.
//
// Initial weights: N(0, 1/fan_in), output weights times `output_scale`; drawn per (parameter, expert), so that an expert's
// start does not depend on how many others there are.
//
// Differences from the paper: GShard and Shazeer et al. know ReLU alone; GELU is that of Hendrycks and Gimpel 2016 (1606.08415).
#include "core/expert.h"
#include "core/ffn_layer.h"
#include "core/grouped.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

FfnActivation ffn_activation_named(const std::string& name) {
  if (name == "gelu") return FfnActivation::kGelu;
  if (name == "gelu_tanh") return FfnActivation::kGeluTanh;
  if (name == "swiglu") return FfnActivation::kSwiglu;
  return FfnActivation::kRelu;
}

Tensor ffn_activated(FfnActivation activation, const Tensor& hidden_NF) {
  switch (activation) {
    case FfnActivation::kGelu: return at::gelu(hidden_NF);
    case FfnActivation::kGeluTanh: return at::gelu(hidden_NF, "tanh");
    case FfnActivation::kSwiglu: return at::silu(hidden_NF);
    default: return at::relu(hidden_NF);
  }
}

// One linear map of every expert.
struct FfnMap {
  std::string name;  // of the weight: keys its initial draw
  Tensor weight_EOI;
  Tensor bias_EO;  // undefined without biases
  double scale = 1;
};

class FfnBank : public ExpertBank, public FfnPart {
 public:
  explicit FfnBank(const ExpertSpec& spec)
      : activation_(ffn_activation_named(spec.options.text("activation"))), bias_(spec.options.flag("bias")), width_(spec.width),
        hidden_(hidden_width(spec.options.integer("width"), spec.width)), first_(spec.first) {
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
    if (gated()) {
      add_map("gate", spec, hidden_, width_, 1);
      add_map("up", spec, hidden_, width_, 1);
      add_map("down", spec, width_, hidden_, spec.output_scale);
    } else {
      add_map("in", spec, hidden_, width_, 1);
      add_map("out", spec, width_, hidden_, spec.output_scale);
    }
    for (int64_t e = 0; e < spec.experts; ++e) reset_expert(e, spec.init);
  }

  Tensor forward(const ExpertContext& context, int) const override {
    if (fused(context.rows_ND))
      return ffn_layer(activation_, {ffn_group()}, {.x_TD = context.rows_ND, .offsets_E1 = context.offsets_E1},
                       context.recompute);
    return chain(context.rows_ND, [&](size_t map, const Tensor& rows) {
      return grouped_linear(rows, maps_[map].weight_EOI, maps_[map].bias_EO, context.offsets_E1);
    });
  }

  Tensor forward_layer(const ExpertContext& context) const override {
    if (!fused(context.input_TD)) return {};
    return ffn_layer(activation_, {ffn_group()},
                     {.x_TD = context.input_TD, .token_N = context.plan->token_N, .gate_N = context.plan->gate_N,
                      .offsets_E1 = context.offsets_E1}, context.recompute);
  }

  Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows_ND) const override {
    const size_t stride = bias_ ? 2 : 1;
    return chain(rows_ND, [&](size_t map, const Tensor& rows) {
      const Tensor& weight_OI = parameters.at(map * stride);
      return bias_ ? at::linear(rows, weight_OI, parameters.at(map * stride + 1)) : at::linear(rows, weight_OI);
    });
  }
  bool has_forward_with() const override { return true; }

  FfnActivation ffn_activation() const override { return activation_; }
  FfnGroup ffn_group() const override {
    const FfnMap &in = maps_.front(), &out = maps_.back();
    FfnGroup group{.in_EFD = in.weight_EOI, .out_EDF = out.weight_EOI, .in_bias_EF = in.bias_EO, .out_bias_ED = out.bias_EO};
    if (gated()) group.up_EFD = maps_[1].weight_EOI, group.up_bias_EF = maps_[1].bias_EO;
    return group;
  }

  int64_t output_width(int) const override { return width_; }

  double flops_per_row(int64_t) const override {
    return 2.0 * static_cast<double>(maps_.size()) * static_cast<double>(width_ * hidden_);
  }

  void reset_expert(int64_t expert, RandomKey key) override {
    const at::NoGradGuard no_grad;
    for (const FfnMap& map : maps_) {
      const Tensor weight_OI = map.weight_EOI.select(0, expert);
      const double std = map.scale / std::sqrt(static_cast<double>(weight_OI.size(1)));
      weight_OI.copy_(normal_tensor(key.with(map.name, first_ + expert), weight_OI.sizes(), std, weight_OI.scalar_type()));
      if (bias_) map.bias_EO.select(0, expert).zero_();
    }
  }

 private:
  static bool fused(const Tensor& rows) { return rows.is_cpu() && grouped_product() == GroupedProduct::kAuto; }

  bool gated() const { return activation_ == FfnActivation::kSwiglu; }

  template <class Linear>
  Tensor chain(const Tensor& rows_ND, Linear linear) const {
    const Tensor hidden_NF = ffn_activated(activation_, linear(0, rows_ND));
    return gated() ? linear(2, hidden_NF.mul(linear(1, rows_ND))) : linear(1, hidden_NF);
  }

  void add_map(const std::string& name, const ExpertSpec& spec, int64_t out, int64_t in, double scale) {
    const Tensor weight_EOI = add_stacked("w_" + name, at::empty({spec.experts, out, in}, spec.dtype));
    const Tensor bias_EO = bias_ ? add_stacked("b_" + name, at::zeros({spec.experts, out}, spec.dtype)) : Tensor();
    maps_.push_back({.name = "w_" + name, .weight_EOI = weight_EOI, .bias_EO = bias_EO, .scale = scale});
  }

  Tensor add_stacked(const std::string& name, const Tensor& value) {
    groups_.front().stacked.push_back({name, add_parameter(name, value)});
    return groups_.front().stacked.back().tensor;
  }

  FfnActivation activation_;
  bool bias_;
  int64_t width_, hidden_;
  int64_t first_;  // global id of expert 0
  std::vector<FfnMap> maps_;
};

const OptionSpecs& ffn_options() {
  static const OptionSpecs specs{
      {.name = "activation",
       .default_value = std::string("relu"),
       .doc = "gelu is the exact form (erf)",
       .choices = {"relu", "gelu", "gelu_tanh", "swiglu"}},
      {.name = "width", .default_value = int64_t{0}, .doc = "hidden width of one expert; 0 = 4·D", .min = 0},
      {.name = "widths",
       .default_value = std::vector<int64_t>{},
       .doc = "hidden width of each expert, where they differ; goes before width"},
      {.name = "bias", .default_value = false, .doc = "add a bias after every linear map"}};
  return specs;
}

std::string ffn_refusal(const ExpertSpec& spec) {
  const std::vector<int64_t>& widths = spec.options.integers("widths");
  if (widths.empty()) return "";
  if (static_cast<int64_t>(widths.size()) != spec.experts)
    return fmt::format("widths lists {} widths for {} experts; give one for each, room to grow included", widths.size(),
                       spec.experts);
  return std::all_of(widths.begin(), widths.end(), [](int64_t width) { return width > 0; }) ? "" : "widths must be at least 1";
}

std::vector<Options> ffn_widths(const ExpertSpec& spec) {
  std::vector<Options> each(static_cast<size_t>(spec.experts), Options(ffn_options()));
  const std::vector<int64_t>& widths = spec.options.integers("widths");
  for (size_t e = 0; e < each.size(); ++e)
    for (const OptionSpec& own : ffn_options())
      if (own.name == "width" && !widths.empty()) each[e].set(own, widths[e]);
      else if (own.name != "widths") each[e].set(own, spec.options.all().at(own.name));
  return each;
}

const Registration<ExpertEntry> registration{{
    .name = "ffn",
    .title = "Feed-forward experts",
    .citation = "Shazeer et al. 2017, arXiv 1701.06538; SwiGLU: Shazeer 2020, arXiv 2002.05202",
    .equation = "y = w_out·act(w_in·x + b_in) + b_out; swiglu: y = w_down·(silu(w_gate·x) ∘ (w_up·x))",
    .differences = {"Shazeer et al. and GShard know ReLU alone"},
    .options = ffn_options(),
    .verified_with = {{{"widths", std::vector<int64_t>{5, 3, 3, 8}}}, {{"activation", std::string("swiglu")}, {"bias", true}}},
    .refuses = ffn_refusal,
    .per_expert = ffn_widths,
    .make = [](ExpertSpec spec) { return std::make_unique<FfnBank>(spec); },
    .recomputes = true,
}};

}  // namespace
}  // namespace moelab
