// Routed low-rank adapters on a frozen base.
//
//   Hu et al. 2021 (LoRA, arXiv 2106.09685):              W·x + (α/r)·B·A·x, B = 0 at the start
//   Kalajdzievski 2023 (rank-stabilised, 2312.03732):     α/√r in the place of α/r
//   Li et al. 2024 (MixLoRA, 2404.15159), targets "ffn":  y = Σ_e g_e·FFN_e(x); expert e is the base's feed-forward layer with
//                                                         an adapter on each of its linear maps, all under one decision
//   Dou et al. 2023 (LoRAMoE, 2312.09979), Zadouri et al. 2023 (MoLoRA, 2309.05444), Gao et al. 2024 (MoLA, 2402.08562), other
//   targets:                                              y = W·x + (α/r)·Σ_e g_e·B_e·A_e·x at every linear map
//
// The base runs once per row: FFN_e is computed as what it adds to FFN, y = FFN(x) + Σ_e g_e·(FFN_e(x) - FFN(x)), so that B = 0
// gives the base bit for bit, whatever the gates and drops. With h_e the hidden rows and D the last map
//
//   y = D·(h + Σ_e g_e·(h_e - h)) + s·Σ_e g_e·B_e·A_e·h_e
//
// Plans that merge parameters mix A and B apart (`merge = "factors"`: Σ α_e·A_e and Σ α_e·B_e) or their products
// (`"products"`: Σ α_e·B_e·A_e, kept as factors of rank E·r). No matrix of the base's size is made by either.
//
// Initial weights: A is U(±1/√in), the kaiming-uniform draw with a = √5; drawn per (map, expert).
//
// Differences from the paper: where gates do not sum to 1, MixLoRA's sum scales the base's part too; here the rest of the weight
// is the base's, and what is laid on attention beside the experts is routed like them. The inputs that dropout takes are drawn
// per row and map, the same for all experts.
#include "core/adapters.h"
#include "core/error.h"
#include "core/execute_merge.h"
#include "core/feed_forward.h"
#include "core/grouped.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

namespace moelab {
namespace {

// Factors of one map: of all experts, stacked, or of one.
struct LoraFactors {
  Tensor a, b;  // [E,r,in], [E,out,r], or without E
};

// The frozen linear map of a layer on its own.
class LoraLinearBase : public Module {
 public:
  LoraLinearBase(const ExpertSpec& spec, int64_t out) {
    const double std = 1 / std::sqrt(static_cast<double>(spec.width));
    weight_OD_ = add_parameter("weight", normal_tensor(spec.init.with("base"), {out, spec.width}, std, spec.dtype), false);
  }
  Tensor weight_OD_;
};

double lora_scale(const Options& options) {
  const auto rank = static_cast<double>(options.integer("rank"));
  return options.real("alpha") / (options.text("scaling") == "rank_stabilised" ? std::sqrt(rank) : rank);
}

// The feed-forward layer that experts stand on where no model brings one.
std::shared_ptr<ExpertBank> lora_feed_forward_base(const ExpertSpec& spec) {
  ExpertSpec dense{spec.width, 1, spec.dtype, spec.init.with("base"), spec.output_scale, {}};
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find("ffn");
  dense.options = Options(entry.options);
  for (const OptionSpec& option : entry.options)
    if (spec.options.declared(option.name)) dense.options.set(option, spec.options.all().at(option.name));
  std::shared_ptr<ExpertBank> base = make_experts("ffn", std::move(dense));
  for (const NamedTensor& parameter : base->parameters()) parameter.tensor.requires_grad_(false);
  return base;
}

class LoraBank : public AdapterBank, public OwnMerge {
 public:
  explicit LoraBank(const ExpertSpec& spec)
      : scale_(lora_scale(spec.options)),
        dropout_(spec.options.real("dropout")),
        products_(spec.options.text("merge") == "products"),
        width_(spec.width),
        first_(spec.first),
        form_(spec.base) {
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
    add_maps(spec);
    for (int64_t e = 0; e < spec.experts; ++e) reset_expert(e, spec.init);
  }

  int stages() const override { return form_ ? 1 : static_cast<int>(maps_.size()); }
  std::string refuses(PlanForm form) const override {
    if (stages() > 1 && form != PlanForm::kSparse)
      return "one decision for several linear maps takes a router with a sparse plan; use decision = \"linear\"";
    return ExpertBank::refuses(form);
  }
  int64_t output_width(int stage) const override { return form_ ? width_ : maps_.at(static_cast<size_t>(stage)).b.size(1); }
  double flops_per_row(int64_t) const override {
    int64_t elements = 0;
    for (const LoraFactors& map : maps_) elements += map.a[0].numel() + map.b[0].numel();
    return 2.0 * static_cast<double>(elements);
  }

  Tensor forward(const ExpertContext& context, int stage) const override {
    refuse_dropout(context.training);
    const auto low = [&](size_t map, const Tensor& rows_NI) { return low_rank(map, rows_NI, context.offsets_E1); };
    return form_ ? added(context.rows_ND, low) : low(static_cast<size_t>(stage), context.rows_ND);
  }

  bool has_forward_with() const override { return stages() == 1; }
  Tensor forward_with(const std::vector<Tensor>& factors, const Tensor& rows_ND) const override {
    refuse_dropout(at::GradMode::is_enabled());  // nobody says whether it is training
    const auto low = [&](size_t map, const Tensor& rows_NI) {
      return at::linear(at::linear(rows_NI, factors.at(2 * map)).mul(scale_), factors.at(2 * map + 1));
    };
    return form_ ? added(rows_ND, low) : low(0, rows_ND);
  }

  bool merges_its_own_way() const override { return products_; }
  std::vector<Tensor> merge(const Tensor& alpha_E) const override {
    if (!products_) return ExpertBank::merge(alpha_E);
    std::vector<Tensor> factors;
    for (const LoraFactors& map : maps_) {
      const Tensor weighted_EOR = map.b.mul(alpha_E.to(map.b.scalar_type()).view({-1, 1, 1}));
      factors.push_back(map.a.flatten(0, 1));
      factors.push_back(weighted_EOR.permute({1, 0, 2}).flatten(1, 2));
    }
    return factors;
  }

  std::shared_ptr<Module> base() const override { return base_; }
  Tensor base_output(const Tensor& x_TD) const override {
    if (form_) return (*form_)(x_TD);
    return linear_base_OD_.defined() ? at::linear(x_TD, linear_base_OD_) : Tensor();
  }

  Tensor run(const Plan& plan, const ExecuteInput& input) const override {
    const auto* sparse = std::get_if<SparsePlan>(&plan);
    if (!sparse || stages() != 1) return {};
    if (form_) return run_feed_forward(*sparse, input);
    const Tensor delta_TO = sparse_delta(*sparse, 0, input), base_TO = base_output(input.x_TD);
    return base_TO.defined() ? base_TO.add(delta_TO) : delta_TO;
  }

  Tensor delta(const Plan& plan, size_t map, const ExecuteInput& input) const override {
    const auto* sparse = std::get_if<SparsePlan>(&plan);
    return sparse ? sparse_delta(*sparse, map, input) : execute(plan, *this, input);
  }

  std::vector<Tensor> dense_deltas(int64_t expert) const override {
    std::vector<Tensor> deltas;
    for (const LoraFactors& map : maps_) deltas.push_back(map.b[expert].matmul(map.a[expert]).mul(scale_));
    return deltas;
  }

  void reset_expert(int64_t expert, RandomKey key) override {
    const at::NoGradGuard no_grad;
    for (size_t m = 0; m < maps_.size(); ++m) {
      const Tensor a_RI = maps_[m].a.select(0, expert), row_R = at::arange(a_RI.size(0), at::kLong);
      const double bound = 1 / std::sqrt(static_cast<double>(a_RI.size(1)));
      a_RI.copy_(
          uniform_rows(key.with(names_[m], first_ + expert), at::zeros_like(row_R), row_R, a_RI.size(1), a_RI.scalar_type()));
      a_RI.mul_(2 * bound).sub_(bound);
      maps_[m].b.select(0, expert).zero_();
    }
  }

 private:
  void add_maps(const ExpertSpec& spec) {
    if (!spec.linears.empty()) {
      for (const LinearShape& linear : spec.linears) add_map(spec.linears.size() > 1 ? linear.name + "_" : "", linear, spec);
    } else if (spec.options.text("targets") == "linear") {
      const int64_t out = spec.options.integer("width") > 0 ? spec.options.integer("width") : width_;
      const auto base = std::make_shared<LoraLinearBase>(spec, out);
      base_ = base;
      linear_base_OD_ = base->weight_OD_;
      add_map("", {"", width_, out}, spec);
    } else {
      add_feed_forward(spec);
    }
  }

  void add_feed_forward(const ExpertSpec& spec) {
    if (!form_) {
      if (const std::string& targets = spec.options.text("targets"); targets != "ffn")
        usage_error("[moe.expert] targets = \"" + targets +
                    "\" names maps of a model; a layer on its own has \"ffn\" or \"linear\"");
      const std::shared_ptr<ExpertBank> own = lora_feed_forward_base(spec);
      base_ = own;
      form_ = std::make_shared<DenseMaps>(*own, activation_named(spec.options.text("activation")));
    }
    const std::vector<std::string> names = form_->form().maps();
    for (size_t m = 0; m < names.size(); ++m) {
      const Tensor weight_OI = form_->weight_OI(m);
      add_map(names[m] + "_", {names[m], weight_OI.size(1), weight_OI.size(0)}, spec);
    }
  }

  void add_map(const std::string& prefix, const LinearShape& shape, const ExpertSpec& spec) {
    const int64_t rank = spec.options.integer("rank");
    const auto stacked = [&](const char* factor, std::vector<int64_t> sizes) {
      groups_.front().stacked.push_back({prefix + factor, add_parameter(prefix + factor, at::zeros(sizes, spec.dtype))});
      return groups_.front().stacked.back().tensor;
    };
    const Tensor a_ERI = stacked("a", {spec.experts, rank, shape.in});
    maps_.push_back({a_ERI, stacked("b", {spec.experts, shape.out, rank})});
    names_.push_back(prefix + "a");
  }

  Tensor low_rank(size_t map, const Tensor& rows_NI, const Tensor& offsets_E1) const {
    const Tensor inner_NR = grouped_linear(rows_NI, maps_[map].a, {}, offsets_E1).mul(scale_);
    return grouped_linear(inner_NR, maps_[map].b, {}, offsets_E1);
  }

  // FFN_e(x) - FFN(x) of rows that are not those of the layer: slots, or one merged expert.
  template <class Low>
  Tensor added(const Tensor& rows_ND, Low low) const {
    const auto base = [&](size_t map, const Tensor& in) { return form_->linear(map, in); };
    const auto both = [&](size_t map, const Tensor& in) { return base(map, in).add(low(map, in)); };
    const Tensor hidden_NF = form_->form().hidden(rows_ND, both);
    const size_t last = form_->form().last();
    return form_->without_bias(last, hidden_NF.sub(form_->form().hidden(rows_ND, base))).add(low(last, hidden_NF));
  }

  // The base's maps run on rows, and their products are gathered like the rows are.
  Tensor run_feed_forward(const SparsePlan& plan, const ExecuteInput& input) const {
    const FeedForwardForm& form = form_->form();
    const size_t last = form.last();
    std::vector<Tensor> base_TF(last);
    const auto base = [&](size_t map, const Tensor& x_TD) { return base_TF[map] = form_->linear(map, x_TD); };
    const Tensor hidden_TF = form.hidden(input.x_TD, base);
    const auto low = [&](size_t map, const Tensor& rows_NI) {
      return low_rank(map, dropped(rows_NI, map, plan, input), plan.offsets_E1);
    };
    const Tensor hidden_NF = form.hidden(dispatch_rows(input.x_TD, plan), [&](size_t map, const Tensor& rows_ND) {
      return dispatch_rows(base_TF[map], plan).add(low(map, rows_ND));
    });
    const Tensor more_TF = combine_rows(hidden_NF.sub(dispatch_rows(hidden_TF, plan)), plan);
    return form_->linear(last, hidden_TF.add(more_TF)).add(combine_rows(low(last, hidden_NF), plan));
  }

  Tensor sparse_delta(const SparsePlan& plan, size_t map, const ExecuteInput& input) const {
    const Tensor rows_NI = dropped(dispatch_rows(input.x_TD, plan), map, plan, input);
    return combine_rows(low_rank(map, rows_NI, plan.offsets_E1), plan);
  }

  // Inverted dropout of what a map's adapters read.
  Tensor dropped(const Tensor& rows_NI, size_t map, const SparsePlan& plan, const ExecuteInput& input) const {
    if (dropout_ == 0 || !input.training) return rows_NI;
    const RowDraws& draws = input.draws;
    check_invariant(draws.position_T.defined(), "dropout needs the rows' sequences and positions");
    const RandomKey key = draws.key.with("dropout", static_cast<int64_t>(map));
    const Tensor draw_TI = uniform_rows(key, draws.sequence_T, draws.position_T, rows_NI.size(1), at::kFloat);
    const Tensor kept_TI = draw_TI.ge(dropout_).to(rows_NI.options().requires_grad(false)).div(1 - dropout_);
    return rows_NI.mul(dispatch_rows(kept_TI, plan));
  }

  void refuse_dropout(bool training) const {
    if (dropout_ > 0 && training)
      usage_error(
          "experts 'lora': dropout is drawn per row of the layer, which takes a router with a sparse plan and execution = "
          "\"auto\"; set dropout = 0");
  }

  double scale_, dropout_;
  bool products_;
  int64_t width_;
  int64_t first_;                          // global id of expert 0
  std::shared_ptr<const DenseMaps> form_;  // of the feed-forward layer that the experts stand on; null: they stand on linear maps
  std::shared_ptr<Module> base_;           // where it is our own
  Tensor linear_base_OD_;
  std::vector<LoraFactors> maps_;
  std::vector<std::string> names_;  // of the maps' A: key their initial draws
};

const Registration<ExpertEntry> registration_lora{{
    .name = "lora",
    .title = "Low-rank adapters on a frozen base",
    .citation =
        "Hu et al. 2021, arXiv 2106.09685; Li et al. 2024 (MixLoRA), 2404.15159; Dou et al. 2023 (LoRAMoE), 2312.09979; Gao et "
        "al. 2024 (MoLA), 2402.08562",
    .equation = "y = W·x + s·Σ_e g_e·B_e·A_e·x at linear maps, or y = FFN(x) + Σ_e g_e·(FFN_e(x) - FFN(x)); s = alpha/rank or "
                "alpha/√rank",
    .differences =
        {"MixLoRA: where gates do not sum to 1, its sum scales the base's part too; here the rest of the weight is the "
         "base's",
         "MixLoRA: plain LoRA on attention beside its experts is routed here like them, with as many experts",
         "the inputs that dropout takes are drawn per row and map, the same for all experts"},
    .options =
        {option("targets", "ffn",
                "what of a block carries adapters: ffn (each expert a whole feed-forward layer), linear maps by name "
                "(\"attention.q, dense.w_in\"), attention, dense, all, or ffn beside maps of attention (\"ffn, attention.q\"); "
                "not the model's output matrix, and no block with [moe] or [attention]; in `route`: ffn or linear"),
         option("decision", "linear",
                "of linear maps: each its own router, or one for all maps of the layer; ffn beside others has its own")
             .one_of({"linear", "layer"}),
         option("rank", 8, "r, rows of A").at_least(1), option("alpha", 16.0, "numerator of the scale").at_least(0),
         option("scaling", "plain", "alpha/rank, or alpha/√rank").one_of({"plain", "rank_stabilised"}),
         option("dropout", 0.0, "share of the adapters' inputs set to 0 in training").between(0, 0.99),
         option("merge", "factors", "what a merge plan mixes: A and B apart, or their products").one_of({"factors", "products"}),
         option("activation", "relu", "of the base in `route`; a model brings its own")
             .one_of({"relu", "gelu", "gelu_tanh", "swiglu"}),
         option("width", 0, "of the base in `route`: hidden width, 0 = 4·D; of a linear base its outputs, 0 = D").at_least(0),
         option("bias", false, "of the base in `route`: a bias after every linear map")},
    .verified_with = {{{"targets", std::string("linear")}}},
    .make = [](ExpertSpec spec) { return std::make_unique<LoraBank>(spec); },
    .place = ExpertPlace::kLinears,
}};

}  // namespace
}  // namespace moelab
