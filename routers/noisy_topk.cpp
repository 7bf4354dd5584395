// Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer
// Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean, 2017, arXiv:1701.06538
//
//   H = W_g x + n ∘ (softplus(W_noise x) + ε), n ~ N(0,1) in training;  A = top-k of H;  gate = softmax over A of H
//   losses 0.1 · CV²(Σ_t gate) + 0.1 · CV²(Σ_t P(t,e)), P(t,e) = Φ((W_g x - k-th largest of H without e) / std)
//
// Both matrices start at zero: at first the noise alone chooses, so that the load is even. With k = 1 the gate is 1, and only
// the two losses move the router.
//
// groups = G > 1 is the paper's hierarchical form (its appendix on hierarchical mixtures): expert e belongs to group ⌊e·G/E⌋,
// and the gating above is used twice, by the primary gate over the groups and inside each group over its E/G experts.
//
//   H' of the groups from group_weight, group_noise_weight;  A' = top-k_groups of H';  for g in A': A_g = top-k of H in g
//   gate of e in A_g = softmax(H')_g over A' · softmax(H)_e over A_g;  k_groups · k experts per row, group by group, best first
//   probability of e = softmax of all H', times softmax of all H in its group, without noise
//   importance_ge = Σ_t gate;  load_ge = (Σ_t P(t,g)) · (Σ_{t on g} P_g(t,e)) / rows on g, so that the primary gate learns
//
// Differences from the paper: none known in the flat form; in the hierarchical one a loss of logits (z) reads those of the
// groups, and there is no room to grow.
#include "core/error.h"
#include "core/linear_router.h"
#include "core/losses/parts.h"

#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

namespace moelab {
namespace {

struct NoisyGroups {
  int64_t count;   // 1 = flat
  int64_t chosen;  // per row
  int64_t k;       // experts in each
  int64_t size;    // experts of each
};

NoisyGroups noisy_groups(const RouterSpec& spec) {
  const Options& options = spec.options;
  const int64_t count = options.integer("groups"), chosen = options.integer("k_groups"), size = spec.max_experts / count;
  if (count == 1) {
    if (options.was_set("k_groups")) usage_error("[moe.router] k_groups chooses among groups: give `groups` too");
    return {1, 1, spec.k(), size};
  }
  const int64_t k = options.was_set("k") ? spec.k() : 2;
  if (spec.max_experts > spec.experts)
    usage_error("[moe.router] groups: the hierarchical form has no room to grow (max_experts)");
  if (spec.experts % count != 0)
    usage_error(fmt::format("[moe.router] groups = {} does not divide experts = {}", count, spec.experts));
  if (chosen > count) usage_error(fmt::format("[moe.router] k_groups = {} is more than groups = {}", chosen, count));
  if (k > size) usage_error(fmt::format("[moe.router] k = {} is more than the {} experts of a group", k, size));
  return {count, chosen, k, size};
}

Tensor zero_matrix(const RouterSpec& spec, int64_t rows) { return at::zeros({rows, spec.width}, spec.dtype); }

Scores level_scores(const NoisyLogits& logits) { return {{}, {}, {}, logits.clean_TE, logits.noisy_TE, logits.std_TE}; }

class NoisyTopk : public LinearRouter {
 public:
  explicit NoisyTopk(const RouterSpec& spec)
      : LinearRouter(spec, zero_matrix(spec, spec.max_experts), spec.noise), groups_(noisy_groups(spec)) {
    noise_weight_ED_ = add_parameter("noise_weight", zero_matrix(spec, spec.max_experts));
    if (groups_.count == 1) return;
    group_weight_GD_ = add_parameter("group_weight", zero_matrix(spec, groups_.count));
    group_noise_weight_GD_ = add_parameter("group_noise_weight", zero_matrix(spec, groups_.count));
  }

  RouterFacts facts() const override {
    RouterFacts facts = LinearRouter::facts();
    facts.differentiable_gate = groups_.chosen * groups_.k > 1;  // one gate is 1
    if (groups_.count == 1) return facts;
    facts.permutation_equivariant = false;
    facts.groups = groups_.count;
    facts.k_groups = groups_.chosen;
    facts.fixed_k = groups_.chosen * groups_.k;
    return facts;
  }

  std::string noise_shape(Mode) const override {
    return groups_.count == 1 ? "normal [T,E]" : "normal [T,G+E], the groups' first";
  }

  // The primary gate's rows are groups.
  std::vector<Tensor> per_expert_tensors() const override {
    if (groups_.count == 1) return LinearRouter::per_expert_tensors();
    return {weight_ED_, noise_weight_ED_};
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    RouteOutput out = groups_.count == 1 ? route_flat(in) : route_in_two_levels(in);
    out.probes["importance"] = importance(out);
    std::vector<Tensor> load = load_rows(in, out, spec_.max_experts, /*include_self=*/false);
    for (Tensor& sum : load) sum = sum.detach().sum(0);
    out.probes["load"] = load_of(load);
    return out;
  }

 private:
  // One gate's logits, noisy in training.
  NoisyLogits gated(const RouteInput& in, const Tensor& weight, const Tensor& noise_weight) const {
    if (noise_.kind != NoiseSpec::Kind::kPaper || !in.training()) return checked(in, noisy_logits(in, weight, noise_));
    const Tensor clean = router_logits(in.routed(), weight);
    const double epsilon = noise_.epsilon_given ? noise_.epsilon : 0;
    const Tensor std = at::softplus(router_logits(in.routed(), noise_weight)).add(epsilon);
    return checked(in, {clean, clean.add(std.mul(raw_normal(in, weight.size(0)))), std});
  }

  RouteOutput route_flat(const RouteInput& in) const {
    return route_topk(in, gated(in, weight_ED_, noise_weight_ED_), groups_.k, SoftmaxOver::kChosen);
  }

  RouteOutput route_in_two_levels(const RouteInput& in) const {
    const RouteInput drawn = with_draws_of_both(in);
    const NoisyLogits group = gated(columns_of(drawn, 0, groups_.count), group_weight_GD_, group_noise_weight_GD_);
    const NoisyLogits expert = gated(columns_of(drawn, groups_.count, spec_.max_experts), weight_ED_, noise_weight_ED_);
    const Tensor choice_TK = in.forced ? in.forced->choice_TK : choices(group.noisy_TE, expert.noisy_TE);
    const NoisyLogits joint = joint_logits(group, expert);
    const Tensor probs_TE = joint.noisy_TE.softmax(1), prob_TK = gather_choices(probs_TE, choice_TK);
    const Tensor gate_TK = gates(group.noisy_TE, expert.noisy_TE, choice_TK);
    const Tensor gate_TE = spread_over_experts(gate_TK, choice_TK, spec_.max_experts);
    RouteOutput out = finish_sparse(in, spec_, {choice_TK, gate_TK, prob_TK, {}}, joint_scores(joint, probs_TE, gate_TE));
    out.levels = TwoLevels{level_scores(group), level_scores(expert), groups_.chosen, groups_.k};
    out.probes["logits"] = expert.clean_TE;
    out.probes["group_logits"] = group.clean_TE;
    return out;
  }

  // Jitter changes what both gates read; other noise is drawn for each logit.
  RouteInput with_draws_of_both(const RouteInput& in) const {
    RouteInput drawn = in;
    const bool additive = noise_.kind == NoiseSpec::Kind::kPaper || noise_.kind == NoiseSpec::Kind::kNormal;
    if (additive && in.training()) drawn.noise = raw_normal(in, groups_.count + spec_.max_experts);
    return drawn;
  }

  RouteInput columns_of(const RouteInput& drawn, int64_t from, int64_t count) const {
    RouteInput in = drawn;
    if (drawn.noise.defined() && noise_.kind != NoiseSpec::Kind::kJitter) in.noise = drawn.noise.slice(1, from, from + count);
    return in;
  }

  // The best groups and the best experts inside each. [T, k_groups·k]
  Tensor choices(const Tensor& group_TG, const Tensor& expert_TE) const {
    const int64_t rows = group_TG.size(0);
    const Tensor inside = stable_topk(expert_TE.reshape({rows * groups_.count, groups_.size}), groups_.k);
    const Tensor group = stable_topk(group_TG, groups_.chosen).unsqueeze(2).expand({rows, groups_.chosen, groups_.k});
    return inside.view({rows, groups_.count, groups_.k}).gather(1, group).add(group, groups_.size).flatten(1);
  }

  Tensor gates(const Tensor& group_TG, const Tensor& expert_TE, const Tensor& choice_TK) const {
    const Tensor group_TK = choice_TK.slice(1, 0, choice_TK.size(1), groups_.k).floor_divide(groups_.size);
    const Tensor inside = expert_TE.gather(1, choice_TK).view({choice_TK.size(0), groups_.chosen, groups_.k}).softmax(2);
    return inside.mul(softmax_of_choices(group_TG, group_TK).unsqueeze(2)).flatten(1);
  }

  // Logits over all experts whose softmax is the product of both levels' softmaxes.
  NoisyLogits joint_logits(const NoisyLogits& group, const NoisyLogits& expert) const {
    const auto joint = [this](const Tensor& group_TG, const Tensor& expert_TE) {
      const Tensor inside_TGS = expert_TE.view({group_TG.size(0), groups_.count, groups_.size}).log_softmax(2);
      return inside_TGS.add(group_TG.unsqueeze(2)).flatten(1);
    };
    const Tensor clean_TE = joint(group.clean_TE, expert.clean_TE);
    const bool quiet = group.noisy_TE.is_same(group.clean_TE);
    return {clean_TE, quiet ? clean_TE : joint(group.noisy_TE, expert.noisy_TE), {}};
  }

  static Scores joint_scores(const NoisyLogits& joint, const Tensor& probs_TE, const Tensor& gate_TE) {
    Scores scores = scores_of(joint, probs_TE);
    scores.gate_TE = gate_TE;
    return scores;
  }

  // Σ over rows of the gates, before any drop. [E]
  Tensor importance(const RouteOutput& out) const {
    const Tensor gate_N = out.gate_TK.detach().reshape({-1});
    const Tensor expert_N = out.assignment.choice_TK.clamp_min(0).reshape({-1});
    return at::zeros({spec_.max_experts}, gate_N.options()).index_add(0, expert_N, gate_N);
  }

  NoisyGroups groups_;
  Tensor noise_weight_ED_;
  Tensor group_weight_GD_, group_noise_weight_GD_;
};

const Registration<RouterEntry> registration_noisy_topk{{
    .name = "noisy_topk",
    .title = "Noisy top-k: learned noise on the logits",
    .citation = "Shazeer et al., 2017, arXiv:1701.06538",
    .equation = "H = W_g x + n ∘ (softplus(W_noise x) + ε), n ~ N(0,1);  A = top-k of H;  gate = softmax over A of H;  with "
                "groups the same for groups first, then inside each chosen one, and the gates are multiplied",
    .facts = {.noisy_in_training = true},
    .options = {option("k", 4, "experts per row; with groups, experts inside each chosen group (2 unless given)").at_least(1),
                renormalise_option("none"),
                option("groups", 1, "first-level branches, each of experts / groups consecutive experts; 1 = flat").at_least(1),
                option("k_groups", 2, "branches per row, where there are groups").at_least(1)},
    .paper_losses = {{"importance", 0.1, {{"of", std::string("gates")}}},
                     {"load", 0.1, {{"threshold", std::string("exclude_self")}}}},
    .noise_shape = "normal [T,E], with groups [T,G+E]",
    .probes = {{"logits", "[T,E]", "W_g x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them; with groups that of the groups times that inside the group"},
               {"importance", "[E]", "sum of the gates over the rows"},
               {"load", "[E]",
                "sum over the rows of P(e stays chosen); counts in evaluation and at k = E; with groups the load of "
                "the group times that inside it, over the rows that chose it"},
               {"group_logits", "[T,G]", "with groups: those of the groups, without noise"}},
    .differences = {"with groups a loss of logits (z) reads those of the groups, and there is no room to grow"},
    .verified_with = {{{"groups", int64_t{2}}, {"k_groups", int64_t{1}}, {"k", int64_t{1}}},
                      {{"groups", int64_t{2}}, {"k_groups", int64_t{2}}, {"k", int64_t{1}}},
                      {{"groups", int64_t{2}}, {"k_groups", int64_t{1}}, {"k", int64_t{2}}},
                      {{"groups", int64_t{4}}, {"k_groups", int64_t{2}}, {"k", int64_t{1}}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<NoisyTopk>(spec); },
}};

}  // namespace
}  // namespace moelab
