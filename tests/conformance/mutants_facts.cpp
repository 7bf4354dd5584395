// Mutants that lie about themselves.
#include "tests/conformance/mutants.h"

#include "core/error.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

namespace moelab {
namespace {

struct BatchMean : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    return in.rows() == 0 ? logits : moved(logits, logits.clean_TE.mean(0, true).mul(3));
  }
};

struct PeeksAtNextRow : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    return in.rows() == 0 ? logits : moved(logits, logits.clean_TE.roll({-1}, {0}).mul(0.5));
  }
};

// Moves the logits by the mean token id of all ranks.
struct AsksOtherRanks : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    if (!in.token_ids_T.defined()) usage_error("it needs token ids");
    const Tensor sum = in.token_ids_T.sum().reshape({1}), rows = at::full({1}, in.rows(), at::kLong);
    in.comm->all_reduce(sum);
    in.comm->all_reduce(rows);
    const Tensor by_E = at::arange(spec_.max_experts, weight_ED_.options().requires_grad(false));
    return moved(score(in), by_E.mul(sum.div(rows.clamp_min(1)).sin()));
  }
};

struct ReadsTokenIds : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    if (!in.token_ids_T.defined()) return logits;
    const Tensor size_T1 = in.token_ids_T.remainder(3).add(1).unsqueeze(1);
    return {logits.clean_TE.mul(size_T1), logits.noisy_TE.mul(size_T1), {}};
  }
};

struct SaysItLearns : PlainRouter {
  explicit SaysItLearns(const RouterSpec& spec) : PlainRouter(spec, {.kind = NoiseSpec::Kind::kNone}, false) {}
};

// Declares a surrogate, so that nobody asks for the gate's gradient.
struct HidesDetachedGate : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const RouteInput&, const Tensor& prob_TK) const override { return prob_TK.detach(); }
};

// A surrogate without saying so.
struct SecretSurrogate : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const RouteInput& in, const Tensor& prob_TK) const override { return stop_gradient(in, "gate", prob_TK); }
};

// Half of the gate goes straight through.
struct StraightThrough : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const RouteInput& in, const Tensor& prob_TK) const override {
    return prob_TK.square().add(stop_gradient(in, "p - p²", prob_TK.sub(prob_TK.square())));
  }
};

// Surgery would move its experts and leave their rows of the router behind.
struct ForgetsRowsOfExperts : PlainRouter {
  using PlainRouter::PlainRouter;
  std::vector<Tensor> per_expert_tensors() const override { return {}; }
};

const RouterFacts kDependentOnIds{.needs_token_ids = true, .batch_independent = false, .batch_independent_eval = false,
                                  .permutation_equivariant = false, .decodes = false};

const Registration<RouterEntry> fact_registrations[] = {
    registered<BatchMean>("mutant_batch_mean"),
    registered<PeeksAtNextRow>("mutant_peeks_at_next_row"),
    registered<AsksOtherRanks>("mutant_asks_other_ranks", kDependentOnIds),
    registered<ReadsTokenIds>("mutant_reads_token_ids"),
    registered<SaysItLearns>("mutant_says_it_learns"),
    registered<HidesDetachedGate>("mutant_hides_detached_gate", {.straight_through = true}),
    registered<SecretSurrogate>("mutant_secret_surrogate"),
    registered<PlainRouter>("mutant_says_it_is_straight_through", {.straight_through = true}),
    registered<ForgetsRowsOfExperts>("mutant_forgets_rows_of_experts"),
    registered<PlainRouter>("mutant_says_it_looks_ahead", {.looks_ahead = true}),
    registered<PlainRouter>("mutant_says_time_ordered",
                            {.batch_independent = false, .batch_independent_eval = false, .time_ordered = true}),
    registered<BatchMean>("mutant_reads_on_after_a_prompt",
                          {.batch_independent = false, .batch_independent_eval = false, .reads_prompt = true, .decodes = false}),
    registered<PlainRouter>("mutant_says_it_reads_prompts", {.reads_prompt = true}),
    registered<PlainRouter>("mutant_says_it_merges", {.plan = PlanForm::kMerge}),
    registered<PlainRouter>("mutant_says_one_choice", {.fixed_k = 1}),
    registered<PlainRouter>("mutant_says_sigmoid", {.probabilities = ProbabilityRule::kSigmoidShare}),
    registered<PlainRouter>("mutant_says_it_needs_labels", {.needs_domain = true, .decodes = false}),
    registered<StraightThrough>("control_straight_through", {.straight_through = true}),
    registered<BatchMean>("control_batch_mean", {.batch_independent = false, .batch_independent_eval = false, .decodes = false}),
};

}  // namespace

std::vector<Mutant> fact_mutants() {
  return {
      {"mutant_batch_mean", "causality", {"micro_batches", "thread_ranks", "other_rows", "decode"}},
      {"mutant_peeks_at_next_row", "causality", {"micro_batches", "thread_ranks", "other_rows", "row_order", "decode"}},
      {"mutant_asks_other_ranks", "thread_ranks", {}},
      {"mutant_reads_token_ids", "channels", {}},
      {"mutant_says_it_learns", "learning", {}},
      {"mutant_hides_detached_gate", "finite_differences", {"learning"}},
      {"mutant_secret_surrogate", "finite_differences", {"learning"}},
      {"mutant_says_it_is_straight_through", "finite_differences", {}},
      {"mutant_forgets_rows_of_experts", "expert_order", {}},
      {"mutant_says_it_looks_ahead", "causality", {}},
      {"mutant_says_time_ordered", "causality", {}},
      {"mutant_reads_on_after_a_prompt", "prompt", {}},
      {"mutant_says_it_reads_prompts", "prompt", {}},
      {"mutant_says_it_merges", "plan_form", {}},
      {"mutant_says_one_choice", "plan_form", {}},
      {"mutant_says_sigmoid", "scores", {}},
      {"mutant_says_it_needs_labels", "channels", {}},
  };
}

}  // namespace moelab
