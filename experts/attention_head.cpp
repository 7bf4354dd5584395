// Attention heads as experts. In all three a head is softmax(q·Kᵀ/√A)·V over the row's sequence, A the size of a head.
//
//   moa         Zhang et al. 2022 (Mixture of Attention Heads, arXiv 2210.05144): y = Σ_{e chosen} g_e·W_o^e·att(W_q^e·x, K, V),
//               K = W_k·x and V = W_v·x shared by all heads. One decision routes the query side and the output side.
//   moh         Jin et al. 2024 (Mixture-of-Head attention, 2410.11842): heads have their own K and V. S shared heads with gates
//               a_1·S·softmax(W_s·x), routed ones with a_2·K·g_e/Σg, K the row's number of them; (a_1, a_2) = 2·softmax(W_a·x).
//   switchhead  Csordás et al. 2023 (SwitchHead, 2312.07987): H heads with dense W_q and W_k. The value and the output projection
//               of each are mixtures, V = Σ_e s_e·W_v^e·x and y = Σ_h Σ_e d_e·W_o^{h,e}·att_h, with a decision each, both over x.
//               The paper's router is [attention.router] name = "sigmoid_topk" with renormalise = "none", its default.
//
// Causal or not, as the model asks; positions may turn queries and keys (rotary), as the model asks.
//
// Initial weights: N(0, 1/fan_in), output projections times `output_scale`; drawn per (parameter, expert). W_a and W_s start at
// 0, so that all gates of shared heads are 1.
//
// Differences from the paper: moh has the factors 2, S and K and the gates that sum to 1 from its code, which also computes every
// head and weights it: so does execution = "auto", while the others map the queries and outputs of chosen heads alone; its load
// balance loss is a [[loss]]. moa's positions are relative in the paper, rotary here. switchhead's router has to be named: the
// default is softmax_topk, whose gates compete.
#include "core/error.h"
#include "core/grouped.h"
#include "core/model/heads.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

constexpr double kNoGate = 1e-9;  // the sum of a row's gates is at least this: it may have no head

// After the model, or in `route` after the options alone.
HeadShape head_shape(const AttentionPlace& place) {
  const Options& options = place.layer.expert_spec.options;
  const AttentionSpec& model = place.attention;
  HeadShape shape;
  shape.width = model.width;
  shape.heads = options.integer("heads") > 0 ? options.integer("heads") : model.heads;
  shape.size = options.integer("head_size") > 0 ? options.integer("head_size") : shape.width / model.heads;
  shape.causal = options.text("mask") == "model" ? model.causal : options.text("mask") == "causal";
  shape.rotary = options.text("positions") == "model" ? model.rotary : options.text("positions") == "rotary";
  shape.rope_base = model.rope_base;
  shape.output_scale = model.output_scale;
  return shape;
}

std::string odd_size(const AttentionPlace& place) {
  const HeadShape shape = head_shape(place);
  if (!shape.rotary || shape.size % 2 == 0) return "";
  return "[moe.expert] head_size = " + std::to_string(shape.size) + " is odd, but rotary positions turn pairs";
}

std::unique_ptr<HeadBank> head_bank(const ExpertSpec& spec, std::vector<HeadMap> maps, std::vector<size_t> stages) {
  auto bank = std::make_unique<HeadBank>(spec, std::move(maps), std::move(stages));
  bank->set_name("attention_head");
  bank->set_kind("attention_head " + spec.options.text("style"));
  return bank;
}

ExpertSpec head_spec(const AttentionPlace& place) { return place.layer.expert_spec; }

std::unique_ptr<HeadBank> head_bank_of_moa(const ExpertSpec& spec, const HeadShape& shape) {
  return head_bank(spec, {shape.in("w_q"), shape.out("w_o")}, {0, 1});
}
std::unique_ptr<HeadBank> head_bank_of_moh(const ExpertSpec& spec, const HeadShape& shape) {
  return head_bank(spec, {shape.in("w_q"), shape.in("w_k"), shape.in("w_v"), shape.out("w_o")}, {0, 1, 2, 3});
}
std::unique_ptr<HeadBank> head_bank_of_side(const ExpertSpec& spec, const HeadMap& map) { return head_bank(spec, {map}, {0}); }

const SparsePlan& sparse_plan(const RouteOutput& routed) {
  const auto* plan = std::get_if<SparsePlan>(&routed.plan);
  if (!plan) usage_error("experts 'attention_head' are chosen per row: use a router with a sparse plan");
  return *plan;
}

double keys_seen(const HeadShape& shape, int64_t context) {
  return shape.causal ? static_cast<double>(context + 1) / 2 : static_cast<double>(context);
}

double chosen_heads(const MoELayer& site) {
  const int64_t k =
      site.settings().router_spec.options.declared("k") ? site.settings().router_spec.k() : site.site().bank->experts();
  return static_cast<double>(k);
}

// Where rows choose two fifths of the experts or more, one product with all of them costs less than moving rows to the chosen
// ones and back (`make bench-report`, attention).
bool maps_all(const MoELayer& site) {
  return site.settings().execution == Execution::kAuto &&
         2 * static_cast<double>(site.site().bank->experts()) <= 5 * chosen_heads(site);
}

// Where the pairs' heads lie in rows of `heads` heads each, laid side by side.
Tensor places_of(const SparsePlan& plan, int64_t heads, int64_t first) {
  return plan.token_N.mul(heads).add(plan.expert_N).add(first);
}

// The pairs' rows at their experts, 0 for experts that a row does not choose: [T,E,A].
Tensor at_experts(const SparsePlan& plan, const Tensor& rows_NA) {
  const Tensor none_PA = at::zeros({plan.rows * plan.experts, rows_NA.size(1)}, rows_NA.options());
  return none_PA.index_copy(0, places_of(plan, plan.experts, 0), rows_NA).view({plan.rows, plan.experts, rows_NA.size(1)});
}

// The pairs' gates at their experts, 0 elsewhere: [T,E].
Tensor gates_at_experts(const SparsePlan& plan) {
  const Tensor none_TE = at::zeros({plan.rows, plan.experts}, plan.gate_N.options().requires_grad(false));
  return none_TE.index_put({plan.token_N, plan.expert_N}, plan.gate_N);
}

// Σ_h gate · W_o^h · rows_h.
Tensor weighted_outputs(const Tensor& rows_THA, const Tensor& gate_TH, const Tensor& w_o_HDA) {
  const Tensor weighted_THA = rows_THA.mul(gate_TH.to(rows_THA.scalar_type()).unsqueeze(2));
  return at::linear(weighted_THA.flatten(1, 2), w_o_HDA.permute({1, 0, 2}).flatten(1, 2));
}

class MoaAttention : public RoutedAttention {
 public:
  explicit MoaAttention(const AttentionPlace& place) : shape_(head_shape(place)) {
    auto bank = head_bank_of_moa(head_spec(place), shape_);
    bank_ = bank.get();
    heads_ = std::make_shared<MoELayer>(place.path, place.layer, std::move(bank));
    shared_ = std::make_shared<SharedHeads>(head_spec(place), 1, std::vector<HeadMap>{shape_.in("w_k"), shape_.in("w_v")});
    add_child("", heads_);
    add_child("shared", shared_);
  }

  std::vector<MoELayer*> sites() const override { return {heads_.get()}; }

  Tensor forward(const Tensor& x_TD, SiteWalk& walk, DecodeCache* cache) const override {
    const RouteOutput routed = walk.decide(*heads_, x_TD);
    const SparsePlan& plan = sparse_plan(routed);
    const ExecuteInput input = walk.input(x_TD);
    const HeadPass pass(shape_, walk.in(), cache);
    const bool all = maps_all(*heads_);
    const GroupedProductGuard products(product_of(heads_->settings().execution));
    Tensor rows_NA = all ? project_heads(x_TD, bank_->weight(0)).flatten(0, 1).index_select(0, places_of(plan, plan.experts, 0))
                         : map_pairs(plan, *bank_, dispatch_rows(x_TD, plan), input, 0);
    const Tensor k_T1A = pass.turned(project_heads(x_TD, shared_->weight(0))), v_T1A = project_heads(x_TD, shared_->weight(1));
    if (plan.slot_TK.numel() > 0) {
      const Tensor q_N1A = pass.turned(rows_NA.unsqueeze(1), walk.in().position_T.index_select(0, plan.token_N));
      rows_NA = to_pairs(plan, pass.attended(to_choices(plan, q_N1A.squeeze(1)), k_T1A, v_T1A));
    }
    if (all) return weighted_outputs(at_experts(plan, rows_NA), gates_at_experts(plan), bank_->weight(1));
    return combine_rows(map_pairs(plan, *bank_, rows_NA, input, 1), plan);
  }

  double flops_per_row(int64_t context) const override {
    const double map = 2.0 * static_cast<double>(shape_.width * shape_.size), k = chosen_heads(*heads_);
    return (2 + 2 * k) * map + 4 * k * static_cast<double>(shape_.size) * keys_seen(shape_, context);
  }

 private:
  // The pairs' rows where the row's choices are, 0 for a choice that is none: [T,K,A].
  static Tensor to_choices(const SparsePlan& plan, const Tensor& rows_NA) {
    const int64_t pairs = rows_NA.size(0);
    const Tensor with_none = at::cat({rows_NA, at::zeros({1, rows_NA.size(1)}, rows_NA.options())});
    const Tensor slot = plan.slot_TK.masked_fill(plan.slot_TK.lt(0), pairs).flatten();
    return with_none.index_select(0, slot).view({plan.slot_TK.size(0), plan.slot_TK.size(1), rows_NA.size(1)});
  }
  static Tensor to_pairs(const SparsePlan& plan, const Tensor& rows_TKA) {
    const Tensor slot = plan.slot_TK.flatten(), place = slot.ge(0).nonzero().squeeze(1);
    const Tensor place_N = at::empty_like(place).index_copy_(0, slot.index_select(0, place), place);
    return rows_TKA.flatten(0, 1).index_select(0, place_N);
  }

  HeadShape shape_;
  std::shared_ptr<MoELayer> heads_;
  const HeadBank* bank_;
  std::shared_ptr<SharedHeads> shared_;
};

class MohAttention : public RoutedAttention {
 public:
  explicit MohAttention(const AttentionPlace& place)
      : shape_(head_shape(place)),
        shared_heads_(head_spec(place).options.integer("shared_heads")),
        normalise_(head_spec(place).options.flag("normalise")) {
    const ExpertSpec spec = head_spec(place);
    auto bank = head_bank_of_moh(spec, shape_);
    bank_ = bank.get();
    heads_ = std::make_shared<MoELayer>(place.path, place.layer, std::move(bank));
    add_child("", heads_);
    if (shared_heads_ == 0) return;
    shared_ = std::make_shared<SharedHeads>(
        spec, shared_heads_, std::vector<HeadMap>{shape_.in("w_q"), shape_.in("w_k"), shape_.in("w_v"), shape_.out("w_o")});
    add_child("shared", shared_);
    split_2D_ = add_parameter("split.weight", at::zeros({2, shape_.width}, spec.dtype));
    shared_SD_ = add_parameter("shared_gate.weight", at::zeros({shared_heads_, shape_.width}, spec.dtype));
  }

  std::vector<MoELayer*> sites() const override { return {heads_.get()}; }

  Tensor forward(const Tensor& x_TD, SiteWalk& walk, DecodeCache* cache) const override {
    const RouteOutput routed = walk.decide(*heads_, x_TD);
    const SparsePlan& plan = sparse_plan(routed);
    const Tensor gate_TH = gates(x_TD, plan);
    const HeadPass pass(shape_, walk.in(), cache);
    const bool all = heads_->settings().execution == Execution::kAuto;
    const GroupedProductGuard products(product_of(heads_->settings().execution));
    const ExecuteInput input = walk.input(x_TD);
    const Tensor q_THA = pass.turned(all ? project_heads(x_TD, all_heads(0)) : chosen_queries(x_TD, plan, input));
    const Tensor k_THA = pass.turned(project_heads(x_TD, all_heads(1)));
    Tensor mixed_THA = project_heads(x_TD, all_heads(2));
    if (x_TD.size(0) > 0) mixed_THA = pass.attended(q_THA, k_THA, mixed_THA);
    return all ? weighted_outputs(mixed_THA, gate_TH, all_heads(3)) : chosen_outputs(mixed_THA, gate_TH, plan, input);
  }

  double flops_per_row(int64_t context) const override {
    const auto all = static_cast<double>(heads()), size = static_cast<double>(shape_.size);
    return all * (8.0 * static_cast<double>(shape_.width) * size + 4 * size * keys_seen(shape_, context));
  }

 private:
  // Shared heads first: [H,…].
  Tensor all_heads(size_t map) const {
    return shared_ ? at::cat({shared_->weight(map), bank_->weight(map)}) : bank_->weight(map);
  }

  int64_t heads() const { return shared_heads_ + bank_->experts(); }

  // In the order of all_heads(): a query of 0 where a head is not chosen.
  Tensor chosen_queries(const Tensor& x_TD, const SparsePlan& plan, const ExecuteInput& input) const {
    const Tensor routed_TEA = at_experts(plan, map_pairs(plan, *bank_, dispatch_rows(x_TD, plan), input, 0));
    return shared_ ? at::cat({project_heads(x_TD, shared_->weight(0)), routed_TEA}, 1) : routed_TEA;
  }

  Tensor chosen_outputs(const Tensor& mixed_THA, const Tensor& gate_TH, SparsePlan plan, const ExecuteInput& input) const {
    const Tensor place_N = places_of(plan, heads(), shared_heads_);
    plan.gate_N = gate_TH.flatten().index_select(0, place_N);
    const Tensor rows_NA = mixed_THA.flatten(0, 1).index_select(0, place_N);
    const Tensor routed_TD = combine_rows(map_pairs(plan, *bank_, rows_NA, input, 3), plan);
    if (!shared_) return routed_TD;
    return routed_TD.add(
        weighted_outputs(mixed_THA.narrow(1, 0, shared_heads_), gate_TH.narrow(1, 0, shared_heads_), shared_->weight(3)));
  }

  // In the order of all_heads(), in float32 or better.
  Tensor gates(const Tensor& x_TD, const SparsePlan& plan) const {
    Tensor chosen_TE = gates_at_experts(plan);
    if (normalise_) chosen_TE = chosen_TE.div(chosen_TE.sum(1, /*keepdim=*/true).clamp_min(kNoGate));
    const Tensor count_T1 = plan.slot_TK.ge(0).sum(1, /*keepdim=*/true);
    const Tensor routed_TE = chosen_TE.mul(count_T1);
    if (!shared_) return routed_TE;
    const Tensor split_T2 = softmax_of(x_TD, split_2D_).mul(2);
    const Tensor shared_TS = softmax_of(x_TD, shared_SD_).mul(static_cast<double>(shared_heads_)).mul(split_T2.narrow(1, 0, 1));
    return at::cat({shared_TS, routed_TE.mul(split_T2.narrow(1, 1, 1))}, 1);
  }

  static Tensor softmax_of(const Tensor& x_TD, const Tensor& weight_ND) {
    const at::ScalarType precision = x_TD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return x_TD.to(precision).matmul(weight_ND.to(precision).t()).softmax(1);
  }

  HeadShape shape_;
  int64_t shared_heads_;
  bool normalise_;  // the gates of a row's heads, to sum to 1
  std::shared_ptr<MoELayer> heads_;
  const HeadBank* bank_;
  std::shared_ptr<SharedHeads> shared_;  // null where no head is shared
  Tensor split_2D_, shared_SD_;
};

class SwitchHeadAttention : public RoutedAttention {
 public:
  explicit SwitchHeadAttention(const AttentionPlace& place) : shape_(head_shape(place)) {
    for (int64_t h = 0; h < shape_.heads; ++h) add_side(place, values_, "value", h, 0, shape_.in("w_v"));
    for (int64_t h = 0; h < shape_.heads; ++h) add_side(place, outputs_, "output", h, 1, shape_.out("w_o"));
    shared_ =
        std::make_shared<SharedHeads>(head_spec(place), shape_.heads, std::vector<HeadMap>{shape_.in("w_q"), shape_.in("w_k")});
    add_child("shared", shared_);
  }

  std::vector<MoELayer*> sites() const override {
    std::vector<MoELayer*> all;
    for (const auto* side : {&values_, &outputs_})
      for (const auto& site : *side) all.push_back(site.get());
    return all;
  }

  Tensor forward(const Tensor& x_TD, SiteWalk& walk, DecodeCache* cache) const override {
    const HeadPass pass(shape_, walk.in(), cache);
    const GroupedProductGuard products(product_of(values_.front()->settings().execution));
    std::vector<Tensor> values;
    for (const auto& site : values_) values.push_back(mixture(*site, x_TD, x_TD, walk, /*of_values=*/true));
    Tensor mixed_THA = at::stack(values, 1);
    const Tensor q_THA = pass.turned(project_heads(x_TD, shared_->weight(0))),
                 k_THA = pass.turned(project_heads(x_TD, shared_->weight(1)));
    if (x_TD.size(0) > 0) mixed_THA = pass.attended(q_THA, k_THA, mixed_THA);
    Tensor y_TD;
    for (size_t h = 0; h < outputs_.size(); ++h) {
      const Tensor head_TD = mixture(*outputs_[h], x_TD, mixed_THA.select(1, static_cast<int64_t>(h)), walk, false);
      y_TD = y_TD.defined() ? y_TD.add(head_TD) : head_TD;
    }
    return y_TD;
  }

  double flops_per_row(int64_t context) const override {
    const double map = 2.0 * static_cast<double>(shape_.width * shape_.size), heads = static_cast<double>(shape_.heads);
    return heads *
           ((2 + 2 * chosen_heads(*values_.front())) * map + 4 * static_cast<double>(shape_.size) * keys_seen(shape_, context));
  }

 private:
  void add_side(const AttentionPlace& place, std::vector<std::shared_ptr<MoELayer>>& side, const std::string& name, int64_t head,
                int64_t use, const HeadMap& map) {
    const std::string full = name + std::to_string(head);
    LayerSettings layer = place.layer;
    layer.router_spec.init = layer.router_spec.init.with(name, head);
    layer.expert_spec.init = layer.expert_spec.init.with(name, head);
    auto bank = head_bank_of_side(layer.expert_spec, map);
    side.push_back(std::make_shared<MoELayer>(place.path + "." + full, std::move(layer), std::move(bank)));
    side.back()->site().use = use;
    add_child(full, side.back());
  }

  // `decider_TD` decides which experts map `rows`.
  static Tensor mixture(const MoELayer& site, const Tensor& decider_TD, const Tensor& rows, SiteWalk& walk, bool of_values) {
    const RouteOutput routed = walk.decide(site, decider_TD);
    const SparsePlan& plan = sparse_plan(routed);
    if (maps_all(site)) {
      const Tensor gate_TE = gates_at_experts(plan), &weight = static_cast<const HeadBank&>(*site.site().bank).weight(0);
      if (!of_values) return weighted_outputs(rows.unsqueeze(1).expand({-1, plan.experts, -1}), gate_TE, weight);
      const Tensor value_TEA = project_heads(rows, weight);
      return value_TEA.mul(gate_TE.to(value_TEA.scalar_type()).unsqueeze(2)).sum(1);
    }
    return combine_rows(map_pairs(plan, *site.site().bank, dispatch_rows(rows, plan), walk.input(decider_TD)), plan);
  }

  HeadShape shape_;
  std::vector<std::shared_ptr<MoELayer>> values_, outputs_;
  std::shared_ptr<SharedHeads> shared_;
};

std::shared_ptr<RoutedAttention> make_routed_attention(const AttentionPlace& place) {
  if (const std::string reason = odd_size(place); !reason.empty()) usage_error(reason);
  const std::string& style = place.layer.expert_spec.options.text("style");
  if (style == "moh") return std::make_shared<MohAttention>(place);
  if (style == "switchhead") return std::make_shared<SwitchHeadAttention>(place);
  return std::make_shared<MoaAttention>(place);
}

// The bank of a style, by itself.
std::unique_ptr<ExpertBank> make_head_bank(const ExpertSpec& spec) {
  AttentionPlace place;
  place.attention.width = spec.width;
  place.attention.output_scale = spec.output_scale;
  place.layer.expert_spec = spec;
  const HeadShape shape = head_shape(place);
  const std::string& style = spec.options.text("style");
  if (style == "moh") return head_bank_of_moh(spec, shape);
  if (style == "switchhead") return head_bank_of_side(spec, shape.in("w_v"));
  return head_bank_of_moa(spec, shape);
}

const Registration<ExpertEntry> registration_attention_head{{
    .name = "attention_head",
    .title = "Attention heads",
    .citation = "Zhang et al. 2022 (MoA), arXiv 2210.05144; Jin et al. 2024 (MoH), 2410.11842; Csordás et al. 2023 (SwitchHead), "
                "2312.07987",
    .equation =
        "moa: y = Σ_e g_e·W_o^e·att(W_q^e·x, K, V); moh: y = Σ_h w_h·W_o^h·att_h, w = a_1·S·softmax(W_s·x) of S shared heads, "
        "a_2·K·g_e/Σg of K routed ones; switchhead: V and W_o of each head are mixtures of experts, two decisions each",
    .differences =
        {"moh: the factors 2, S and K and gates that sum to 1 are those of its code, as is that every head is computed "
         "and weighted; with another execution than auto only chosen heads map their queries and outputs",
         "moh: its load balance loss is a [[loss]]", "moa: positions are relative in the paper, rotary here",
         "switchhead: its router is [attention.router] name = \"sigmoid_topk\"; the default softmax_topk makes a head's "
         "experts compete"},
    .options =
        {option("style", "moa",
                "moa: one K and V for all heads; moh: shared heads and routed heads; switchhead: routed value and "
                "output projections of each head, two routers")
             .one_of({"moa", "moh", "switchhead"}),
         option("heads", 0, "switchhead: heads; 0 = the model's, in `route` 1").at_least(0).read_when("style", {"switchhead"}),
         option("head_size", 0, "A; 0 = D / heads of the model, in `route` D").at_least(0),
         option("shared_heads", 1, "moh: heads that every row uses").at_least(0).read_when("style", {"moh"}),
         option("normalise", true, "moh: divide the gates of a row's heads by their sum").read_when("style", {"moh"}),
         option("mask", "model",
                "causal, or full: all rows of a sequence see each other, refused in a causal model; `route` knows no model "
                "and is causal")
             .one_of({"model", "causal", "full"}),
         option("positions", "model", "rotary, or none; `route` has none").one_of({"model", "none", "rotary"})},
    .make = [](ExpertSpec spec) -> std::unique_ptr<ExpertBank> { return make_head_bank(spec); },
    .place = ExpertPlace::kAttention,
    .make_attention = make_routed_attention,
    .refuses_attention = odd_size,
}};

}  // namespace
}  // namespace moelab
