// Sigmoid top-k, the router of today's large models:
// DeepSeek-V3 Technical Report. DeepSeek-AI, 2024, arXiv:2412.19437
// Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts. Wang, Gao, Zhao, Sun, Dai, 2024, arXiv:2408.15664
//
//   s = σ(W x);  A = top-k of s + b;  gate_a = scale · s_a (renormalised over A where asked for)
//   b_e ← b_e + rate · sign(mean load - load_e) after each step, load_e = rows of the step that chose e, before drops
//   groups: consecutive experts; a group scores the sum of its two largest s + b; A is taken inside the groups_kept best
//   loss 1e-4 · E · Σ_e f_e P_e, f of each choice with Σ f = 1, P = mean of s / Σ s
//
// The bias enters the choice only: gates and losses read s. Its counts add up over micro-batches and ranks, so that b does not
// depend on how the step is split.
//
// Differences from the paper: the defaults are the plain ones (no renormalisation, scale 1, no bias, one group; DeepSeek-V3:
// before_drop, 2.5, rate 0.001, 4 of 8 groups); the paper forms its loss per sequence (scope = "sequence"); W starts at
// N(0, 0.02²).
#include "core/error.h"
#include "core/linear_router.h"
#include "core/losses/parts.h"

#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <limits>

namespace moelab {
namespace {

constexpr double kNotInChoice = -std::numeric_limits<double>::infinity();

struct SigmoidGroups {
  int64_t count;
  int64_t kept;
  int64_t size;  // experts each
};

SigmoidGroups sigmoid_groups(const RouterSpec& spec) {
  const int64_t count = spec.options.integer("groups"), asked = spec.options.integer("groups_kept"), k = spec.k();
  const int64_t kept = asked == 0 ? count : asked, size = spec.max_experts / count;
  if (spec.max_experts % count != 0)
    usage_error(fmt::format("[moe.router] groups = {} does not divide experts = {}", count, spec.max_experts));
  if (kept > count) usage_error(fmt::format("[moe.router] groups_kept = {} is more than groups = {}", kept, count));
  if (k > kept * size)
    usage_error(fmt::format("[moe.router] k = {} is more than the {} experts of groups_kept = {}", k, kept * size, kept));
  return {count, kept, size};
}

class SigmoidTopk : public LinearRouter {
 public:
  explicit SigmoidTopk(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     resolved_noise(spec.noise, NoiseSpec::Kind::kNone)),
        groups_(sigmoid_groups(spec)),
        biased_(spec.options.flag("selection_bias")),
        bias_rate_(spec.options.real("bias_rate")),
        scale_(spec.options.real("scale")) {
    bias_E_ = add_buffer("bias", at::zeros({spec.max_experts}, spec.dtype));
  }

  RouterFacts facts() const override {
    RouterFacts facts = LinearRouter::facts();
    facts.stateful = bias_rate_ > 0;
    facts.permutation_equivariant = groups_.kept == groups_.count;
    return facts;
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    const Tensor score_TE = logits.noisy_TE.sigmoid();
    const Tensor select_TE = selection_scores(score_TE.detach());
    const Tensor choice_TK = choices(in, select_TE);
    const Tensor gate_TK = gather_choices(score_TE, choice_TK);
    RouteOutput out = finish_sparse(in, spec_, {choice_TK, gate_TK, gate_TK, {}}, loss_scores(logits, score_TE, select_TE));
    if (scale_ != 1) scale_gates(out);
    if (bias_rate_ > 0 && in.training()) out.deltas["load"] = chosen_experts(choice_TK, spec_.max_experts, at::kDouble).sum(0);
    out.probes["scores"] = logits.clean_TE.sigmoid();
    return out;
  }

  std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t) override {
    const auto load = deltas.find("load");
    if (load == deltas.end()) return {};
    const Tensor active_E = mask_E_.defined() ? mask_E_.to(at::kDouble) : at::zeros_like(load->second).add_(1);
    const Tensor mean = load->second.sum().div(active_E.sum());
    bias_E_.add_(mean.sub(load->second).sign().mul(active_E).mul(bias_rate_));
    return {};
  }

 private:
  // What the choice is made on: -infinity for experts that are not there yet and for those of groups that are not kept.
  Tensor selection_scores(const Tensor& score_TE) const {
    Tensor select_TE = biased_ ? score_TE.add(bias_E_) : score_TE;
    if (mask_E_.defined()) select_TE = select_TE.masked_fill(mask_E_.eq(0), kNotInChoice);
    return groups_.kept < groups_.count ? inside_kept_groups(select_TE) : select_TE;
  }

  Tensor inside_kept_groups(const Tensor& select_TE) const {
    const Tensor select_TGS = select_TE.unflatten(1, {groups_.count, groups_.size});
    const Tensor best_TG2 = std::get<0>(select_TGS.topk(std::min<int64_t>(2, groups_.size), 2));
    const Tensor none_TG = best_TG2.select(2, 0).eq(kNotInChoice);
    const Tensor score_TG = best_TG2.masked_fill(best_TG2.eq(kNotInChoice), 0).sum(2).masked_fill(none_TG, kNotInChoice);
    const Tensor kept_TG = chosen_experts(stable_topk(score_TG, groups_.kept), groups_.count, at::kByte).to(at::kBool);
    return select_TGS.masked_fill(kept_TG.logical_not().unsqueeze(2), kNotInChoice).flatten(1);
  }

  Tensor choices(const RouteInput& in, const Tensor& select_TE) const {
    if (in.forced) return in.forced->choice_TK;
    const Tensor choice_TK = stable_topk(select_TE, spec_.k());
    return choice_TK.masked_fill(select_TE.gather(1, choice_TK).eq(kNotInChoice), -1);
  }

  // Losses read s / Σ s, as the softmax of ln s, which holds where every s underflows. σ keeps the order of the logits, so the
  // noise tells the load loss who stays chosen, unless bias or groups have a say in it.
  Scores loss_scores(const NoisyLogits& logits, const Tensor& score_TE, const Tensor& select_TE) const {
    const bool plain = !biased_ && groups_.kept == groups_.count;
    const Tensor share_TE = at::log_sigmoid(logits.clean_TE).softmax(1);
    return {select_TE, score_TE, share_TE, logits.clean_TE, logits.noisy_TE, plain ? logits.std_TE : Tensor()};
  }

  // After any renormalisation, which would undo it.
  void scale_gates(RouteOutput& out) const {
    auto& plan = std::get<SparsePlan>(out.plan);
    plan.gate_N = plan.gate_N.mul(scale_);
    out.gate_TK = out.gate_TK.mul(scale_);
  }

  SigmoidGroups groups_;
  bool biased_;
  double bias_rate_, scale_;
  Tensor bias_E_;
};

const Registration<RouterEntry> registration_sigmoid_topk{{
    .name = "sigmoid_topk",
    .title = "Sigmoid top-k: selection bias, groups, loss-free balance",
    .citation = "DeepSeek-AI, 2024, arXiv:2412.19437; Wang et al., 2024, arXiv:2408.15664",
    .equation =
        "s = σ(W x);  A = top-k of s + b inside the kept groups;  gate_a = scale · s_a;  b += rate · sign(mean load - load)",
    .facts = {.probabilities = ProbabilityRule::kSigmoidShare},
    .options =
        {k_option(2), renormalise_option("none"), option("scale", 1.0, "multiplies the gates, after any renormalisation"),
         option("selection_bias", false, "add the buffer `bias` to the scores that the choice is made on"),
         option("bias_rate", 0.0, "after each step bias += rate · sign(mean load - load); it acts with selection_bias")
             .at_least(0),
         option("groups", 1, "groups of consecutive experts").at_least(1),
         option("groups_kept", 0, "groups that a row may choose from, by the sum of their two best scores; 0 = all").at_least(0)},
    .paper_losses = {{"balance", 1e-4, {{"counts", std::string("any_choice")}, {"divide_by_k", true}}}},
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "s / Σ s, which losses read"},
               {"scores", "[T,E]", "s = σ(logits)"}},
    .differences =
        {"the defaults are the plain ones (DeepSeek-V3: renormalise before_drop, scale 2.5, bias_rate 0.001, 4 of 8 groups)",
         "a [moe.capacity] with priority = \"batch\" or \"score\" serves by s, without bias and scale",
         "the paper forms its loss per sequence (scope = \"sequence\")", "W starts at N(0, 0.02²)"},
    .verified_with = {{{"groups", int64_t{2}}, {"groups_kept", int64_t{1}}, {"k", int64_t{2}}},
                      {{"selection_bias", true}, {"bias_rate", 0.01}},
                      {{"scale", 2.5}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<SigmoidTopk>(spec); },
}};

}  // namespace
}  // namespace moelab
