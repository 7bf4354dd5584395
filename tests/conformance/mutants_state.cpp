// Mutants whose decisions depend on chance, on state or on a split as they must not.
#include "tests/conformance/mutants.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

namespace moelab {
namespace {

// Noise on the logits in training.
struct NoisyRouter : PlainRouter {
  explicit NoisyRouter(const RouterSpec& spec) : PlainRouter(spec, {.kind = NoiseSpec::Kind::kNormal, .std = 1}, true) {}
};

struct NoiseInEvaluation : NoisyRouter {
  using NoisyRouter::NoisyRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    RouteInput training = in;
    training.mode = Mode::kTrain;
    return score(training);
  }
};

struct SecretNoise : NoisyRouter {
  using NoisyRouter::NoisyRouter;
  RouterFacts facts() const override { return entry().facts; }
};

struct GlobalGenerator : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    return moved(logits, at::rand_like(logits.clean_TE.detach()));
  }
  RouterFacts facts() const override { return entry().facts; }
};

// Its noise is keyed by the row's place in the batch, so a batch cut in two draws anew.
struct NoiseByRowNumber : NoisyRouter {
  using NoisyRouter::NoisyRouter;
  RouteInput input(const RouteInput& in) const override {
    RouteInput seen = in;
    seen.position_T = at::arange(in.rows(), at::kLong);
    seen.sequence_key_T = at::zeros_like(seen.position_T);
    return seen;
  }
};

// Both passes of a step draw the same noise.
struct SecondPassAsFirst : NoisyRouter {
  using NoisyRouter::NoisyRouter;
  RouteInput input(const RouteInput& in) const override {
    RouteInput seen = in;
    seen.random = in.random.in_pass(-in.pass);
    return seen;
  }
};

struct StateTouched : PlainRouter {
  explicit StateTouched(const RouterSpec& spec) : PlainRouter(spec) {
    calls_ = add_buffer("calls", at::zeros({1}, spec.dtype));
  }
  void afterwards(const RouteInput&, RouteOutput&) const override { calls_.add_(1); }
  Tensor calls_;
};

// Evaluations are counted where no checkpoint looks, and the next training step knows of them.
struct RemembersEvaluations : PlainRouter {
  explicit RemembersEvaluations(const RouterSpec& spec) : PlainRouter(spec), seen_(at::zeros({1}, at::kLong)) {}
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    if (in.mode == Mode::kEval) seen_.add_(1);
    const NoisyLogits logits = score(in);
    const bool flips = in.training() && seen_.item<int64_t>() % 2 == 1;
    return flips ? NoisyLogits{logits.clean_TE.neg(), logits.noisy_TE.neg(), logits.std_TE} : logits;
  }
  Tensor seen_;
};

// A bias that follows the load, in the choice only, moved by end_step().
struct Balanced : PlainRouter {
  explicit Balanced(const RouterSpec& spec) : PlainRouter(spec) {
    bias_E_ = add_buffer("bias", at::zeros({spec.max_experts}, spec.dtype));
  }
  Tensor choice(const Tensor& logits_TE) const override { return stable_topk(logits_TE.detach().add(bias_E_), spec_.k()); }
  void afterwards(const RouteInput& in, RouteOutput& out) const override {
    if (!counts(in)) return;
    const Tensor load_E = at::zeros({spec_.max_experts}, at::kDouble);
    const Tensor choice_N = out.assignment.choice_TK.reshape({-1});
    out.deltas["load"] = load_E.index_add(0, choice_N, at::ones({choice_N.numel()}, at::kDouble)).div(unit(in));
  }
  std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t) override {
    const Tensor& load_E = deltas.at("load");
    bias_E_.add_(load_E.mean().sub(load_E).sign().to(bias_E_.scalar_type()), 0.1);
    return {};
  }
  virtual bool counts(const RouteInput& in) const { return in.training(); }
  virtual double unit(const RouteInput&) const { return 1; }
  Tensor bias_E_;
};

struct MeanDelta : Balanced {
  using Balanced::Balanced;
  double unit(const RouteInput& in) const override { return static_cast<double>(std::max<int64_t>(in.rows(), 1)); }
};

struct CountsEvaluations : Balanced {
  using Balanced::Balanced;
  bool counts(const RouteInput&) const override { return true; }
};

// Drops the first expert after a step.
struct DropsAnExpert : PlainRouter {
  explicit DropsAnExpert(const RouterSpec& spec) : PlainRouter(spec) {
    present_E_ = add_buffer("present", at::ones({spec.max_experts}, at::kBool));
  }
  Tensor active_experts_E() const override { return present_E_; }
  Tensor choice(const Tensor& logits_TE) const override {
    return stable_topk(logits_TE.detach().masked_fill(present_E_.logical_not(), -1e9), spec_.k());
  }
  std::vector<Event> end_step(const std::map<std::string, Tensor>&, int64_t) override {
    present_E_.select(0, 0).fill_(false);
    return {};
  }
  Tensor present_E_;
};

// Its bias is no buffer, so a checkpoint does not hold it.
struct HiddenState : PlainRouter {
  explicit HiddenState(const RouterSpec& spec) : PlainRouter(spec), bias_E_(at::zeros({spec.max_experts}, spec.dtype)) {}
  Tensor choice(const Tensor& logits_TE) const override { return stable_topk(logits_TE.detach().add(bias_E_), spec_.k()); }
  std::vector<Event> end_step(const std::map<std::string, Tensor>&, int64_t) override {
    bias_E_.select(0, 0).add_(10);
    return {};
  }
  Tensor bias_E_;
};

// Two stages: the second takes the least wanted experts. A buffer says which one it is.
struct Staged : PlainRouter {
  explicit Staged(const RouterSpec& spec) : PlainRouter(spec), first_steps_(spec.options.integer("first_steps")) {
    stage_ = add_buffer("stage", at::full({1}, 1, at::kLong));
  }
  virtual int64_t stage() const { return stage_.item<int64_t>(); }
  Tensor choice(const Tensor& logits_TE) const override {
    return stable_topk(stage() == 1 ? logits_TE : logits_TE.neg(), spec_.k());
  }
  std::vector<Event> end_step(const std::map<std::string, Tensor>&, int64_t step) override {
    if (step + 1 != first_steps_) return {};
    move();
    return std::vector<Event>(1);
  }
  virtual void move() { stage_.fill_(2); }
  int64_t first_steps_;
  Tensor stage_;
};

// Only its memory knows the stage, so a run that is resumed in the second one is back in the first.
struct ForgetsStage : Staged {
  using Staged::Staged;
  int64_t stage() const override { return now_; }
  void move() override { now_ = 2; }
  int64_t now_ = 1;
};

const OptionSpecs kFirstSteps{option("first_steps", 1000, "steps of the first stage").at_least(1).in_steps()};

const Registration<RouterEntry> state_registrations[] = {
    registered<NoiseInEvaluation>("mutant_noise_in_evaluation", {.noisy_in_training = true}),
    registered<SecretNoise>("mutant_secret_noise"),
    registered<GlobalGenerator>("mutant_global_generator", {.noisy_in_training = true, .random_in_eval = true}),
    registered<NoiseByRowNumber>("mutant_noise_by_row_number", {.noisy_in_training = true}),
    registered<SecondPassAsFirst>("mutant_second_pass_as_first", {.noisy_in_training = true, .passes = 2}),
    registered<StateTouched>("mutant_state_touched"),
    registered<RemembersEvaluations>("mutant_remembers_evaluations"),
    registered<MeanDelta>("mutant_mean_delta", {.stateful = true}),
    registered<CountsEvaluations>("mutant_counts_evaluations", {.stateful = true}),
    registered<Balanced>("mutant_says_it_is_stateless"),
    registered<DropsAnExpert>("mutant_says_its_experts_stay", {.stateful = true}),
    registered<HiddenState>("mutant_hidden_state", {.stateful = true}),
    registered<ForgetsStage>("mutant_forgets_stage", {.stateful = true}, "none", kFirstSteps),
    registered<NoisyRouter>("control_noisy", {.noisy_in_training = true, .passes = 2}),
    registered<Balanced>("control_stateful", {.stateful = true}),
    registered<Staged>("control_staged", {.stateful = true}, "none", kFirstSteps),
};

}  // namespace

std::vector<Mutant> state_mutants() {
  return {
      {"mutant_noise_in_evaluation", "draws", {"ties", "expert_order"}},
      {"mutant_secret_noise", "draws", {"expert_order"}},
      {"mutant_global_generator", "determinism", {kAnyProperty}},
      {"mutant_noise_by_row_number", "micro_batches", {"thread_ranks", "other_rows", "row_order"}},
      {"mutant_second_pass_as_first", "draws", {}},
      {"mutant_state_touched", "const_route", {"end_step", "passive"}},
      {"mutant_remembers_evaluations", "passive", {"save_load"}},
      {"mutant_mean_delta", "micro_batches", {"thread_ranks"}},
      {"mutant_counts_evaluations", "passive", {}},
      {"mutant_says_it_is_stateless", "end_step", {}},
      {"mutant_says_its_experts_stay", "end_step", {kAnyProperty}},
      {"mutant_hidden_state", "save_load", {}},
      {"mutant_forgets_stage", "save_load", {}},
  };
}

}  // namespace moelab
