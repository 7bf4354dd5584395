// From Sparse to Soft Mixtures of Experts
// Puigcerver, Riquelme, Mustafa, Houlsby, 2023, arXiv:2308.00951
//
//   ℓ = X̂ Φ̂ᵀ · scale, rows of X and Φ divided by √(Σ² + ε)          per sequence of M rows, S = E·P slots
//   D = softmax of ℓ over the rows, C = softmax of ℓ over the slots;  slots = Dᵀ X (X as it came);  Y = C · F(slots)
//   slot e·P + p belongs to expert e
//
// Ablations: `uniform` weights (1/M in D, 1/S in C) and `identity` (row m feeds and reads slot m, so M = S).
// Noise, where asked for, is added to ℓ in training, N(0, std²). Experts that are not there yet have no slots.
//
// Differences from the paper: ε stands inside the square root, as in the authors' code (the paper adds it to the norm); with
// normalise = false the logits are X Φᵀ · scale.
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/ones.h>

#include <fmt/format.h>

#include <cmath>

namespace moelab {
namespace {

SlotWeights slot_weights_of(const std::string& name) {
  if (name == "uniform") return SlotWeights::kUniform;
  return name == "identity" ? SlotWeights::kIdentity : SlotWeights::kSoft;
}

// Float32 or better, and of length 1 where asked for.
Tensor soft_moe_direction(const Tensor& rows_ND, bool normalise, double epsilon) {
  const Tensor rows = rows_ND.scalar_type() == at::kDouble ? rows_ND : rows_ND.to(at::kFloat);
  return normalise ? rows.mul(rows.square().sum(1, /*keepdim=*/true).add(epsilon).rsqrt()) : rows;
}

class SoftMoeRouter : public Router {
 public:
  explicit SoftMoeRouter(const RouterSpec& spec)
      : Router(spec), slots_(spec.options.integer("slots_per_expert")), normalise_(spec.options.flag("normalise")),
        epsilon_(spec.options.real("normalise_eps")), dispatch_(slot_weights_of(spec.options.text("dispatch"))),
        combine_(slot_weights_of(spec.options.text("combine"))), noise_(resolved_noise(spec.noise, NoiseSpec::Kind::kNone)) {
    if (noise_.kind == NoiseSpec::Kind::kJitter)
      usage_error("[moe.noise] kind: the router 'soft_moe' adds noise to its logits; use \"normal\" or \"none\"");
    const double std = 1 / std::sqrt(static_cast<double>(spec.width));
    phi_SD_ = add_parameter(
        "phi", normal_tensor(spec.init.with("phi"), {spec.max_experts * slots_, spec.width}, std, spec.dtype), learned());
    scale_ = add_parameter("scale", at::ones({1}, spec.dtype), learned());
  }

  RouterFacts facts() const override {
    RouterFacts facts = Router::facts();
    const bool row_by_row = dispatch_ == SlotWeights::kIdentity && combine_ == SlotWeights::kIdentity;
    facts.learned = learned();
    facts.noisy_in_training = noise_std(Mode::kTrain) > 0;
    facts.differentiable_gate = learned();
    facts.batch_independent = facts.batch_independent_eval = row_by_row;
    facts.permutation_equivariant = !pairs_rows_with_slots();
    return facts;
  }

  // Slots of one expert follow each other.
  std::vector<Tensor> per_expert_tensors() const override {
    return {phi_SD_.view({spec_.max_experts, slots_, spec_.width})};
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    SoftPlan plan = slots_of(in);
    if (pairs_rows_with_slots()) require_row_per_slot(in);
    RouteOutput out;
    add_probes(plan, out);
    out.plan = std::move(plan);
    return out;
  }

 private:
  bool learned() const { return dispatch_ == SlotWeights::kSoft || combine_ == SlotWeights::kSoft; }
  bool pairs_rows_with_slots() const { return dispatch_ == SlotWeights::kIdentity || combine_ == SlotWeights::kIdentity; }

  double noise_std(Mode mode) const {
    return mode == Mode::kTrain && learned() && noise_.kind == NoiseSpec::Kind::kNormal ? noise_.std : 0;
  }

  SoftPlan slots_of(const RouteInput& in) const {
    SoftPlan plan;
    plan.experts = spec_.max_experts;
    plan.slots_per_expert = slots_;
    plan.query_TD = soft_moe_direction(in.routed(), normalise_, epsilon_);
    plan.key_SD = soft_moe_direction(phi_SD_.narrow(0, 0, spec_.experts * slots_), normalise_, epsilon_);
    plan.scale = scale_;
    plan.sequence_T = in.sequence_T;
    plan.sequences = in.sequences;
    plan.noise_std = noise_std(in.mode);
    if (plan.noise_std > 0 && in.noise.defined()) plan.noise_TS = raw_normal(in, phi_SD_.size(0));
    plan.noise_key = in.random.with("noise");
    plan.position_T = in.position_T;
    plan.sequence_key_T = in.sequence_key_T;
    plan.dispatch = dispatch_;
    plan.combine = combine_;
    return plan;
  }

  void require_row_per_slot(const RouteInput& in) const {
    const int64_t slots = spec_.experts * slots_;
    const Tensor rows_B = at::bincount(in.sequence_T, {}, in.sequences);
    const auto* rows = rows_B.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < in.sequences; ++b)
      if (rows[b] != 0 && rows[b] != slots)
        usage_error(fmt::format("router 'soft_moe': \"identity\" pairs each row with a slot, but sequence {} has {} rows for "
                                "{} slots (experts × slots_per_expert)", b, rows[b], slots));
  }

  // Without noise; slots of experts that are not there have probability 0.
  void add_probes(const SoftPlan& plan, RouteOutput& out) const {
    const at::NoGradGuard no_grad;
    const int64_t missing = (spec_.max_experts - spec_.experts) * slots_;
    const Tensor logits_TS = at::constant_pad_nd(router_logits(plan.query_TD, plan.key_SD).mul(plan.scale), {0, missing}, -1e9);
    out.probes["logits"] = logits_TS;
    out.probes["probs"] = logits_TS.softmax(1);
  }

  int64_t slots_;
  bool normalise_;
  double epsilon_;
  SlotWeights dispatch_;
  SlotWeights combine_;
  NoiseSpec noise_;
  Tensor phi_SD_;
  Tensor scale_;
};

const std::vector<std::string> kSlotWeightNames{"soft", "uniform", "identity"};

const Registration<RouterEntry> registration_soft_moe{{
    .name = "soft_moe",
    .title = "Soft MoE: slots that read mixtures of rows",
    .citation = "Puigcerver, Riquelme, Mustafa, Houlsby, 2023, arXiv:2308.00951",
    .equation = "ℓ = X̂ Φ̂ᵀ · scale;  D = softmax over rows, C = softmax over slots;  Y = C · F(Dᵀ X)",
    .facts = {.plan = PlanForm::kSoft, .batch_independent = false, .batch_independent_eval = false, .decodes = false,
              .has_scores = false},
    .options = {option("slots_per_expert", 1, "slots that each expert serves per sequence").at_least(1),
                option("normalise", true, "divide the rows of X and phi by their lengths before the product"),
                option("normalise_eps", 1e-6, "added to the squared length, inside the square root").at_least(0),
                option("dispatch", "soft", "what a slot reads: a softmax over the rows, their mean, or the row of its number")
                    .one_of(kSlotWeightNames),
                option("combine", "soft", "what a row gets: a softmax over the slots, their mean, or the slot of its number")
                    .one_of(kSlotWeightNames)},
    .noise_shape = "normal [T,E·P]",
    .probes = {{"logits", "[T,E·P]", "X̂ Φ̂ᵀ · scale, without noise"}, {"probs", "[T,E·P]", "softmax of them over the slots"}},
    .differences = {"the constant that guards the norms stands inside the square root, as in the authors' code",
                    "normalise = false leaves rows and phi as they are"},
    .verified_with = {{{"slots_per_expert", int64_t{2}}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<SoftMoeRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
