// Dynamic Mixture of Experts: An Auto-Tuning Approach for Efficient Transformer Models
// Guo, Cheng, Tang, Tu, Lin, 2024, arXiv:2405.14297
//
//   s_te = σ(τ · cos(x_t, w_e)) · mask_e;   u_te = s_te - σ(τ · G_e);   row t uses every expert with u_te > 0, K_t of them
//   y_t = Σ_e m_te f_e(x_t) / max(K_t, 1),   m = sign(relu(u)), backward straight through the sign, K_t a constant there
//   K_t = 0: y_t = 0 in training; in evaluation the active expert of largest s (or u) with weight 1
//   losses 0.01 · ‖Ŵ Ŵᵀ - I‖_F + 0.01 · mean_e ‖w_e‖
//
// So ∂L/∂u_te = ⟨∂L/∂y_t, f_e(x_t)⟩ / K_t where u_te > 0, else 0. The thresholds G start at 0: a row then uses the experts
// within 90° of it. In a window of steps the router counts the rows of every expert and sums the rows that no expert took; at
// its end experts without a row are removed (mask_e = 0), and if the sum R is not 0, the first inactive one is added, with
// w = R/‖R‖ and G = 0. Its own weights stay what its slot held: initial ones, or those it had when it was removed.
//
// Differences from the paper: windows count optimiser steps and cover all ranks and micro-batches, where the code counts
// forward passes of a rank (300, 600, 900; here a third); an added expert's moments start at zero; a window in which nothing
// was recorded changes nothing; inactive experts' vectors count in the simplicity loss but do not move; τ is not trained.
#include "core/error.h"
#include "core/linear_router.h"
#include "core/losses/parts.h"

#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <limits>

namespace moelab {
namespace {

// Orthonormal rows where there are no more experts than dimensions, else orthonormal columns.
Tensor dynmoe_directions(const RouterSpec& spec) {
  const bool wide = spec.max_experts <= spec.width;
  const Tensor normal_ED = normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 1, at::kDouble);
  const Tensor tall = std::get<0>(at::linalg_qr(wide ? normal_ED.t() : normal_ED));
  return (wide ? tall.t() : tall).to(spec.dtype).contiguous();
}

Tensor dynmoe_mask(const RouterSpec& spec) {
  Tensor mask_E = at::zeros({spec.max_experts}, spec.dtype);
  mask_E.slice(0, 0, spec.experts).fill_(1);
  return mask_E;
}

// Rows of length 1; a row of zeros has no direction and stays zero. Lengths are taken in float64: squares may overflow.
Tensor dynmoe_unit_rows(const Tensor& rows_ND) {
  const Tensor wide_ND = rows_ND.scalar_type() == at::kDouble ? rows_ND : rows_ND.to(at::kFloat);
  const Tensor norm_N1 = at::linalg_vector_norm(wide_ND, 2, {1}, /*keepdim=*/true, at::kDouble).to(wide_ND.scalar_type());
  return wide_ND.div(norm_N1.masked_fill(norm_N1.eq(0), 1));
}

// When experts are recorded and changed, in optimiser steps of each period.
struct DynmoeWindow {
  int64_t start, update, period;

  explicit DynmoeWindow(const Options& options)
      : start(options.integer("window_start")),
        update(options.integer("window_update")),
        period(options.integer("window_period")) {
    if (period > 0 && !(start < update && update <= period))
      usage_error(fmt::format("[moe.router] needs window_start < window_update <= window_period, not {}, {}, {}", start, update,
                              period));
  }
  bool records(int64_t step) const { return period > 0 && step % period >= start && step % period < update; }
  bool ends_at(int64_t step) const { return period > 0 && step % period == update - 1; }
  std::string text(int64_t last) const { return fmt::format("steps {} to {}", last + 2 - (update - start), last + 1); }
};

class DynmoeRouter : public Router {
 public:
  explicit DynmoeRouter(const RouterSpec& spec)
      : Router(spec), window_(spec.options), temperature_(spec.options.real("temperature")),
        by_margin_(spec.options.text("eval_fallback") == "margin"), noise_(resolved_noise(spec.noise, NoiseSpec::Kind::kNone)) {
    weight_ED_ = add_parameter("weight", dynmoe_directions(spec_));
    thresholds_E_ = add_parameter("thresholds", at::zeros({spec_.max_experts}, spec_.dtype));
    mask_E_ = add_buffer("mask", dynmoe_mask(spec_));
    activations_E_ = add_buffer("activations", at::zeros({spec_.max_experts}, at::kLong));
    unrouted_D_ = add_buffer("unrouted", at::zeros({spec_.width}, at::kDouble));
  }

  RouterFacts facts() const override {
    RouterFacts facts = Router::facts();
    facts.noisy_in_training = noise_.kind != NoiseSpec::Kind::kNone;
    facts.stateful = facts.changes_experts = window_.period > 0;
    return facts;
  }

  Tensor active_experts_E() const override { return mask_E_.ne(0); }
  std::vector<Tensor> per_expert_tensors() const override { return {weight_ED_, thresholds_E_, mask_E_, activations_E_}; }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = cosines(in);
    const Tensor score_TE = masked_scores(logits.noisy_TE);
    const Tensor margin_TE = score_TE.sub(thresholds_E_.to(score_TE.scalar_type()).mul(temperature_).sigmoid());
    const Tensor choice_TK = choices(in, score_TE.detach(), margin_TE.detach());
    // 0 with the gradient of relu: what straight-through adds to an indicator.
    const Tensor slope_TE = at::relu(margin_TE).sub(stop_gradient(in, "relu(u)", at::relu(margin_TE)));
    const Tensor used_TE = chosen_experts(choice_TK, margin_TE.size(1), margin_TE.scalar_type());
    RouteOutput out = finish_sparse(in, spec_, {choice_TK, gates(slope_TE, choice_TK), gather_choices(score_TE, choice_TK), {}},
                                    scores(logits, margin_TE, used_TE));
    out.k = 0;
    out.statistics["indicator"] = indicator(slope_TE, margin_TE.detach(), used_TE);
    out.probes["logits"] = logits.clean_TE;
    out.probes["probs"] = masked_scores(logits.clean_TE);
    out.probes["margin"] = margin_TE;
    if (in.training()) record(in, choice_TK, out.deltas);
    return out;
  }

  std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t step) override {
    if (!window_.records(step)) return {};
    if (!deltas.empty()) {
      activations_E_.add_(deltas.at("activations"));
      unrouted_D_.add_(deltas.at("unrouted"));
    }
    if (!window_.ends_at(step)) return {};
    const std::vector<Event> events = adapt(window_.text(step));
    activations_E_.zero_();
    unrouted_D_.zero_();
    return events;
  }

 private:
  // τ·cos(x, w), with the noise that the config may ask for; inactive experts too.
  NoisyLogits cosines(const RouteInput& in) const {
    require_finite(in.routed(), "x", in);
    RouteInput unit_in = in;
    unit_in.router_x = dynmoe_unit_rows(in.routed());
    const NoisyLogits logits = noisy_logits(unit_in, dynmoe_unit_rows(weight_ED_).mul(temperature_), noise_);
    require_finite(logits.noisy_TE, "logits", in);
    return logits;
  }

  Tensor masked_scores(const Tensor& logits_TE) const { return logits_TE.sigmoid().mul(mask_E_.to(logits_TE.scalar_type())); }

  // Active experts by falling margin, ties to the lowest index, then -1. [T,E]
  Tensor choices(const RouteInput& in, const Tensor& score_TE, const Tensor& margin_TE) const {
    if (in.forced) return in.forced->choice_TK;
    const Tensor order_TK = stable_topk(margin_TE, margin_TE.size(1));
    Tensor choice_TK = order_TK.masked_fill(margin_TE.gather(1, order_TK).le(0), -1);
    if (in.training()) return choice_TK;
    Tensor first_T1 = choice_TK.slice(1, 0, 1);
    first_T1.copy_(at::where(first_T1.lt(0), fallback(by_margin_ ? margin_TE : score_TE), first_T1));
    return choice_TK;
  }

  // The best active expert, -1 where there is none. [T,1]
  Tensor fallback(const Tensor& by_TE) const {
    const Tensor best_T1 = stable_topk(by_TE.masked_fill(mask_E_.eq(0), -std::numeric_limits<double>::infinity()), 1);
    return best_T1.masked_fill(mask_E_.eq(0).index_select(0, best_T1.squeeze(1)).unsqueeze(1), -1);
  }

  // 1/K of each choice. An expert that a row falls back to is not active: its gate of 1 has no gradient.
  static Tensor gates(const Tensor& slope_TE, const Tensor& choice_TK) {
    const Tensor chosen_TK = choice_TK.ge(0).to(slope_TE.scalar_type());
    return gather_choices(slope_TE, choice_TK).add(chosen_TK).div(chosen_TK.sum(1, /*keepdim=*/true).clamp_min(1));
  }

  // m, on the straight-through graph; a replayed choice is obeyed. [T,E]
  static Tensor indicator(const Tensor& slope_TE, const Tensor& margin_TE, const Tensor& used_TE) {
    const Tensor active_TE = used_TE.mul(margin_TE.gt(0));
    return active_TE.add(slope_TE.mul(active_TE));
  }

  // For losses and metrics that read a distribution: each row's scores divided by their sum, inactive experts out of reach.
  Scores scores(const NoisyLogits& logits, const Tensor& margin_TE, const Tensor& used_TE) const {
    const Tensor score_TE = masked_scores(logits.clean_TE), inactive_E = mask_E_.eq(0);
    const Tensor share_TE = score_TE.div(score_TE.sum(1, /*keepdim=*/true).clamp_min(1e-30));
    return {margin_TE, used_TE, share_TE, logits.clean_TE.masked_fill(inactive_E, kFarBelow),
            logits.noisy_TE.masked_fill(inactive_E, kFarBelow), logits.std_TE};
  }

  // Sums over rows; float64 keeps the decision of several ranks that of one.
  void record(const RouteInput& in, const Tensor& choice_TK, std::map<std::string, Tensor>& deltas) const {
    const Tensor chosen_TE = chosen_experts(choice_TK, spec_.max_experts, at::kDouble);
    const Tensor unrouted_N = chosen_TE.sum(1).eq(0).nonzero().squeeze(1);
    deltas["activations"] = chosen_TE.sum(0).to(at::kLong);
    deltas["unrouted"] = in.routed().detach().index_select(0, unrouted_N).to(at::kDouble).sum(0);
  }

  std::vector<Event> adapt(const std::string& when) {
    std::vector<Event> events;
    const double length = unrouted_D_.norm().item<double>();
    if (length == 0 && !activations_E_.any().item<bool>()) return events;  // nothing was recorded: no reason to remove all
    for (int64_t e = 0; e < spec_.max_experts; ++e)
      if (is_active(e) && activations_E_[e].item<int64_t>() == 0) events.push_back(remove(e, when));
    for (int64_t e = 0; e < spec_.max_experts && length > 0; ++e) {
      if (is_active(e)) continue;
      events.push_back(add(e, unrouted_D_.div(length), when));
      break;
    }
    return events;
  }

  bool is_active(int64_t expert) const { return mask_E_[expert].item<double>() != 0; }

  Event remove(int64_t expert, const std::string& when) {
    mask_E_[expert].fill_(0);
    return {Event::Kind::kExpertRemoved, expert, -1, {}, fmt::format("expert {} removed: no row of {} used it", expert, when)};
  }

  // It starts from itself: the slot's weights are kept.
  Event add(int64_t expert, const Tensor& direction_D, const std::string& when) {
    mask_E_[expert].fill_(1);
    weight_ED_.detach()[expert].copy_(direction_D);
    thresholds_E_.detach()[expert].fill_(0);
    return {Event::Kind::kExpertAdded, expert, expert, {},
            fmt::format("expert {} added for the rows of {} that no expert took", expert, when)};
  }

  static constexpr double kFarBelow = -1e9;  // a logit of probability 0 that stays finite

  DynmoeWindow window_;
  double temperature_;
  bool by_margin_;
  NoiseSpec noise_;
  Tensor weight_ED_, thresholds_E_, mask_E_, activations_E_, unrouted_D_;
};

const Registration<RouterEntry> registration_dynmoe{{
    .name = "dynmoe",
    .title = "DynMoE: every expert above its threshold, experts come and go",
    .citation = "Guo et al., 2024, arXiv:2405.14297",
    .equation = "u = σ(τ·cos(x, w))·mask - σ(τ·G);  row t uses the K experts with u > 0, gate 1/K;  K = 0: y = 0, in "
                "evaluation the best active expert",
    .facts = {.stateful = true,
              .changes_experts = true,
              .variable_k = true,
              .straight_through = true,
              .probabilities = ProbabilityRule::kSigmoidShare},
    .options = {option("temperature", 1.0, "τ, multiplies cosines and thresholds before the sigmoid").at_least(1e-6),
                option("eval_fallback", "score", "a row above no threshold takes, in evaluation, the largest s or u")
                    .one_of({"score", "margin"}),
                option("window_start", 100, "optimiser step of each period at which counting rows begins").at_least(0).in_steps(),
                option("window_update", 200, "step of each period before which experts are removed and added")
                    .at_least(1).in_steps(),
                option("window_period", 300, "steps of a period; 0 = experts never change").at_least(0).in_steps()},
    .paper_losses = {{"diversity", 0.01}, {"simplicity", 0.01}},
    .probes = {{"logits", "[T,E]", "τ·cos(x, w), without noise, inactive experts too"},
               {"probs", "[T,E]", "s = σ of them, 0 for inactive experts; rows do not sum to 1"},
               {"margin", "[T,E]", "u: above 0 the expert is used"}},
    .differences = {"windows count optimiser steps over all ranks and micro-batches; the code counts forward passes of a rank "
                    "(300, 600, 900; here a third)",
                    "an added expert's moments start at zero", "a window in which nothing was recorded changes nothing",
                    "inactive experts' vectors count in the simplicity loss but do not move", "τ is not trained",
                    "gates are 1/K as they stand: there is no `renormalise`",
                    "a [moe.capacity] with priority = \"batch\" or \"score\" serves by s"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<DynmoeRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
