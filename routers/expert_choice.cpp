// Expert choice: experts choose rows
// Zhou, Lei, Liu, Du, Huang, Zhao, Dai, Chen, Le, Laudon, 2022, arXiv:2202.09368
//
//   S = softmax_E(W x + noise);  among the n rows of a group each expert takes the C = n·factor/E of largest S, ties to the
//   lowest row;  gate S_te;  a row gets 0 … E experts.  C is read from [moe.capacity], clamped to 1 … n; nothing is dropped.
//   score_norm = tokens (Mesh TensorFlow): S = softmax over the group's rows, gate S_te / (experts that took the row); its loss
//   is
//     `coverage`
//   cap_per_token = b: the C of largest A instead, where A maximises Σ S·A + λ H(A) subject to
//     Σ_t A_te = C, Σ_e A_te ≤ b, 0 ≤ A ≤ 1, by Dykstra's projections in the logarithm; what they leave over the cap is settled
//     by rows that refuse their least experts, who then ask their next best rows
//   eval = thresholds: a row takes the experts with S_te ≥ threshold_e, a running mean of the smallest S that e chose in
//     training: threshold += rate · (mean over groups - threshold) after each step.  Causal; a capacity then drops as usual.
//   group = sequence, micro (the whole micro-batch), or time_step (rows of equal position: no later row is looked at)
//
// Where n·b < E·C no A exists, and the least cap that works stands in for b.
//
// Differences from the paper: a group is a sequence, unless [moe.capacity] scope or `group` says otherwise; C is rounded as
// [moe.capacity] says; λ falls to its value from 0.1, and full rows refuse, so that few projections do; thresholds are ours.
#include "core/capped_choice.h"
#include "core/error.h"
#include "core/linear_router.h"
#include "core/losses/parts.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

namespace moelab {
namespace {

// The noise of V-MoE's expert choice, where [moe.noise] asks for some without a size.
NoiseSpec expert_choice_noise(const RouterSpec& spec) {
  NoiseSpec noise = resolved_noise(spec.noise, NoiseSpec::Kind::kNone);
  if (!noise.std_given) noise.std = 1.0 / static_cast<double>(spec.max_experts);
  return noise;
}

// Training and evaluation choose alike: evaluation without a table of its own takes training's. Without a mode the factor
// counts.
CapacityPolicy choice_policy(const RouterSpec& spec, Mode mode) {
  CapacityPolicy policy = spec.capacity(mode);
  if (policy.mode == CapacityPolicy::Mode::kNone && mode != Mode::kTrain) policy = spec.train_capacity;
  if (policy.mode == CapacityPolicy::Mode::kNone) policy.mode = CapacityPolicy::Mode::kFactor;
  return policy;
}

std::string group_of(const RouterSpec& spec) {
  const std::string& word = spec.options.text("group");
  if (word != "scope") return word;
  return spec.train_capacity.scope == CapacityPolicy::Scope::kSequence ? "sequence" : "micro";
}

// Each expert's `places` best rows, ties to the lowest; bool [n,E].
Tensor best_rows(const Tensor& score_NE, int64_t places) {
  const Tensor best_EC = std::get<1>(score_NE.t().sort(/*stable=*/true, /*dim=*/1, /*descending=*/true)).slice(1, 0, places);
  const Tensor none_EN = at::zeros({score_NE.size(1), score_NE.size(0)}, at::kBool);
  return none_EN.scatter(1, best_EC, true).t();
}

class ExpertChoiceRouter : public LinearRouter {
 public:
  explicit ExpertChoiceRouter(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     expert_choice_noise(spec)),
        over_tokens_(spec.options.text("score_norm") == "tokens"),
        by_threshold_(spec.options.text("eval") == "thresholds"),
        cap_(spec.options.integer("cap_per_token")),
        group_(group_of(spec)) {
    const Tensor even_E = at::full({spec.max_experts}, 1.0 / static_cast<double>(spec.experts), spec.dtype);
    thresholds_E_ = add_buffer("thresholds", even_E);
    spec_.train_capacity = {};  // the choice itself is the capacity
    if (!by_threshold_) spec_.eval_capacity = {};
    train_choice_ = choice_policy(spec, Mode::kTrain);
    eval_choice_ = choice_policy(spec, Mode::kEval);
    if (by_threshold_ && over_tokens_)
      usage_error("[moe.router] eval = \"thresholds\" needs score_norm = \"experts\": a row alone has no share of the tokens");
  }

  RouterFacts facts() const override {
    RouterFacts facts = LinearRouter::facts();
    facts.batch_independent_eval = facts.decodes = by_threshold_;
    facts.time_ordered = group_ == "time_step";
    return facts;
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    refuse_scope_over_ranks(in);
    const std::vector<Tensor> groups = groups_of(in);
    const NoisyLogits logits = score(in);
    const Tensor score_TE = over_tokens_ ? softmax_over_rows(logits.noisy_TE, groups) : logits.noisy_TE.softmax(1);
    const bool alone = by_threshold_ && !in.training();
    const Tensor choice_TK =
        in.forced ? in.forced->choice_TK : in_columns(chosen(in, score_TE.detach(), groups, alone), score_TE);
    Tensor gate_TK = gather_choices(score_TE, choice_TK);
    if (over_tokens_) gate_TK = gate_TK.div(choice_TK.ge(0).sum(1, /*keepdim=*/true).clamp_min(1));
    const Tensor probs_TE = over_tokens_ ? logits.noisy_TE.softmax(1) : score_TE;
    Scores scores = scores_of(logits, probs_TE);
    scores.gate_TE = score_TE;
    RouteOutput out = finish_sparse(in, spec_, {choice_TK, gate_TK, gate_TK, {}}, std::move(scores));
    out.k = 0;
    if (!alone) out.places = places_of(in, groups);
    if (in.training()) out.deltas = last_scores(score_TE.detach(), choice_TK, groups);
    return out;
  }

  std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t) override {
    const at::NoGradGuard no_grad;
    if (!deltas.contains("groups")) return {};  // nothing was trained on
    const Tensor &sum_E = deltas.at("last_scores"), &groups_E = deltas.at("groups");
    const Tensor step_E = sum_E.div(groups_E.clamp_min(1)).sub(thresholds_E_).mul(spec_.options.real("threshold_rate"));
    thresholds_E_.add_(step_E.masked_fill(groups_E.eq(0), 0));
    return {};
  }

 private:
  void refuse_scope_over_ranks(const RouteInput& in) const {
    const bool global = (in.training() ? train_choice_ : eval_choice_).scope == CapacityPolicy::Scope::kGlobal;
    if (global && spec_.options.text("group") == "scope" && in.comm->size() > 1)
      usage_error("[moe.capacity] scope = \"global\": experts cannot choose over several ranks; use \"micro\" or \"sequence\"");
  }

  // Rows that compete with each other, ascending.
  std::vector<Tensor> groups_of(const RouteInput& in) const {
    Tensor key_T = at::zeros_like(in.sequence_T);
    if (group_ == "time_step") key_T = in.position_T;
    if (group_ == "sequence") key_T = in.sequence_T;
    return rows_by_key(key_T);
  }

  int64_t places(const RouteInput& in, int64_t rows) const {
    const CapacityPolicy& policy = in.training() ? train_choice_ : eval_choice_;
    return std::clamp<int64_t>(policy.places(rows, spec_.max_experts, 1), 1, rows);
  }

  int64_t places_of(const RouteInput& in, const std::vector<Tensor>& groups) const {
    int64_t sum = 0;
    for (const Tensor& row_N : groups) sum += places(in, row_N.numel());
    return sum * active_E().numel();
  }

  // Indices of the experts that may choose.
  Tensor active_E() const {
    return mask_E_.defined() ? mask_E_.ne(0).nonzero().squeeze(1) : at::arange(spec_.max_experts, at::kLong);
  }

  Tensor chosen(const RouteInput& in, const Tensor& score_TE, const std::vector<Tensor>& groups, bool alone) const {
    if (alone) return mask_E_.defined() ? score_TE.ge(thresholds_E_).logical_and(mask_E_.ne(0)) : score_TE.ge(thresholds_E_);
    const Tensor expert_A = active_E();
    Tensor chosen_TE = at::zeros_like(score_TE, at::kBool);
    for (const Tensor& row_N : groups) {
      const Tensor taken_NA = taken(score_TE.index_select(0, row_N).index_select(1, expert_A), places(in, row_N.numel()));
      chosen_TE.index_put_({row_N.unsqueeze(1), expert_A}, taken_NA);
    }
    return chosen_TE;
  }

  Tensor taken(const Tensor& score_NE, int64_t places) const {
    if (cap_ == 0) return best_rows(score_NE, places);
    const int64_t rows = score_NE.size(0), needed = (places * score_NE.size(1) + rows - 1) / rows;
    const int64_t cap = std::max(cap_, needed);
    return capped_choice(score_NE, places, cap, spec_.options.real("cap_lambda"), spec_.options.integer("cap_iterations"));
  }

  // As many columns as the row with the most experts has; each row's experts by falling score, then -1.
  static Tensor in_columns(const Tensor& chosen_TE, const Tensor& score_TE) {
    const int64_t most = chosen_TE.size(0) == 0 ? 1 : std::max<int64_t>(1, chosen_TE.sum(1).max().item<int64_t>());
    constexpr double never = -std::numeric_limits<double>::infinity();
    const Tensor expert_TK = stable_topk(score_TE.masked_fill(chosen_TE.logical_not(), never), most);
    return expert_TK.masked_fill(chosen_TE.gather(1, expert_TK).logical_not(), -1);
  }

  // Per expert the sum over groups of the smallest score that it chose, and the number of groups.
  std::map<std::string, Tensor> last_scores(const Tensor& score_TE, const Tensor& choice_TK,
                                            const std::vector<Tensor>& groups) const {
    constexpr double unchosen = std::numeric_limits<double>::infinity();
    const Tensor chosen_TE = chosen_experts(choice_TK, spec_.max_experts, at::kFloat);
    const Tensor bound_TE = score_TE.masked_fill(chosen_TE.eq(0), unchosen);
    Tensor sum_E = at::zeros({spec_.max_experts}, score_TE.options()), groups_E = at::zeros_like(sum_E);
    for (const Tensor& row_N : groups) {
      const Tensor last_E = bound_TE.index_select(0, row_N).amin(0), found_E = last_E.isfinite();
      sum_E.add_(last_E.masked_fill(found_E.logical_not(), 0));
      groups_E.add_(found_E);
    }
    return {{"last_scores", sum_E}, {"groups", groups_E}};
  }

  bool over_tokens_;
  bool by_threshold_;
  int64_t cap_;
  std::string group_;
  CapacityPolicy train_choice_;
  CapacityPolicy eval_choice_;
  Tensor thresholds_E_;
};

const Registration<RouterEntry> registration_expert_choice{{
    .name = "expert_choice",
    .title = "Expert choice: experts choose rows",
    .citation = "Zhou et al., 2022, arXiv:2202.09368",
    .equation = "S = softmax(W x);  each expert takes the C rows of a group with its largest S;  gate S",
    .facts = {.stateful = true,
              .variable_k = true,
              .capacity_is_choice = true,
              .batch_independent = false,
              .batch_independent_eval = false,
              .decodes = false},
    .options = {option("score_norm", "experts",
                       "S is a softmax over experts, or over the group's rows (Mesh TensorFlow's; its loss "
                       "is `coverage`)")
                    .one_of({"experts", "tokens"}),
                option("cap_per_token", 0, "experts per row, at most; 0 = any number").at_least(0),
                option("cap_lambda", 1e-3, "weight of the entropy where cap_per_token is set")
                    .between(1e-6, 10)
                    .read_unless("cap_per_token", "0"),
                option("cap_iterations", 100, "rounds of projections, at most").at_least(1).read_unless("cap_per_token", "0"),
                option("group", "scope", "rows that compete: as [moe.capacity] scope says, or one of these")
                    .one_of({"scope", "sequence", "micro", "time_step"}),
                option("eval", "choice", "evaluation chooses as training does, or by each expert's running threshold")
                    .one_of({"choice", "thresholds"}),
                option("threshold_rate", 0.1, "of the running thresholds").between(0, 1), renormalise_option("none")},
    .paper_capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = 1, .round = CapacityPolicy::Round::kRound},
    .noise_shape = "normal [T,E]",
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them over experts"}},
    .differences = {"a group is a sequence, unless [moe.capacity] scope or `group` says otherwise",
                    "C is rounded as [moe.capacity] says; without [moe.capacity.eval] evaluation has the C of training",
                    "cap_per_token: lambda falls to its value from 0.1, and full rows refuse, so that few projections do",
                    "thresholds for evaluation are not in the paper"},
    .verified_with = {{{"cap_per_token", int64_t{2}}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<ExpertChoiceRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
