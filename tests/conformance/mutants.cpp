#include "tests/conformance/mutants.h"

#include "core/linear_router.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace moelab {
namespace {

// A plain softmax top-k router, cut at the places where mutants differ from it.
class PlainRouter : public LinearRouter {
 public:
  explicit PlainRouter(const RouterSpec& spec)
      : PlainRouter(spec, resolved_noise(spec.noise, NoiseSpec::Kind::kNone), /*trainable=*/true) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const RouteInput seen = input(in);
    const NoisyLogits logits = scored(seen);
    const Tensor choice_TK = seen.forced ? seen.forced->choice_TK : choice(logits.noisy_TE);
    const Tensor probs_TE = logits.noisy_TE.softmax(1), prob_TK = gather_choices(probs_TE, choice_TK);
    RouteOutput out = finish_sparse(seen, finishing(), {choice_TK, gate(prob_TK), prob_TK, {}}, scores_of(logits, probs_TE));
    afterwards(in, out);
    return out;
  }

 protected:
  PlainRouter(const RouterSpec& spec, NoiseSpec noise, bool trainable)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype), noise,
                     trainable) {}

  virtual RouteInput input(const RouteInput& in) const { return in; }
  virtual NoisyLogits scored(const RouteInput& in) const { return score(in); }
  virtual Tensor choice(const Tensor& logits_TE) const { return stable_topk(logits_TE, spec_.k()); }
  virtual Tensor gate(const Tensor& prob_TK) const { return prob_TK; }
  virtual RouterSpec finishing() const { return spec_; }
  virtual void afterwards(const RouteInput&, RouteOutput&) const {}
};

NoisyLogits moved(NoisyLogits logits, const Tensor& by) {
  logits.clean_TE = logits.clean_TE.add(by);
  logits.noisy_TE = logits.noisy_TE.add(by);
  return logits;
}

struct GateDetached : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const Tensor& prob_TK) const override { return prob_TK.detach(); }
};

struct RenormalisedTwice : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const Tensor& prob_TK) const override { return prob_TK.div(prob_TK.sum(1, true).square()); }
  RouterSpec finishing() const override {
    RouterSpec spec = spec_;
    spec.options.set(renormalise_option("none"), std::string("none"));
    return spec;
  }
};

struct TiesToHighest : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor choice(const Tensor& logits_TE) const override {
    return stable_topk(logits_TE.flip({1}), spec_.k()).neg().add(logits_TE.size(1) - 1);
  }
};

struct SameExpertTwice : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor choice(const Tensor& logits_TE) const override {
    return stable_topk(logits_TE, 1).expand({logits_TE.size(0), spec_.k()}).contiguous();
  }
};

struct NoiseInEvaluation : PlainRouter {
  explicit NoiseInEvaluation(const RouterSpec& spec) : PlainRouter(spec, {.kind = NoiseSpec::Kind::kNormal, .std = 1}, true) {}
  NoisyLogits scored(const RouteInput& in) const override {
    RouteInput training = in;
    training.mode = Mode::kTrain;
    return score(training);
  }
};

struct GlobalGenerator : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in) const override {
    const NoisyLogits logits = score(in);
    return moved(logits, at::rand_like(logits.clean_TE.detach()));
  }
};

// Its noise is keyed by the row's place in the batch, so a batch cut in two draws anew.
struct NoiseByRowNumber : PlainRouter {
  explicit NoiseByRowNumber(const RouterSpec& spec) : PlainRouter(spec, {.kind = NoiseSpec::Kind::kNormal, .std = 1}, true) {}
  RouteInput input(const RouteInput& in) const override {
    RouteInput seen = in;
    seen.position_T = at::arange(in.rows(), at::kLong);
    seen.sequence_key_T = at::zeros_like(seen.position_T);
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

struct BatchMean : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in) const override {
    const NoisyLogits logits = score(in);
    return in.rows() == 0 ? logits : moved(logits, logits.clean_TE.mean(0, true).mul(3));
  }
};

struct PeeksAtNextRow : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in) const override {
    const NoisyLogits logits = score(in);
    return in.rows() == 0 ? logits : moved(logits, logits.clean_TE.roll({-1}, {0}).mul(0.5));
  }
};

struct CountsAfterDrop : PlainRouter {
  using PlainRouter::PlainRouter;
  void afterwards(const RouteInput&, RouteOutput& out) const override {
    out.assignment.dropped_TK = at::zeros_like(out.assignment.dropped_TK);
  }
};

struct CapacityWithoutK : PlainRouter {
  using PlainRouter::PlainRouter;
  RouterSpec finishing() const override {
    RouterSpec spec = spec_;
    spec.train_capacity.times_k = spec.eval_capacity.times_k = false;
    return spec;
  }
};

struct WrongDropOrder : PlainRouter {
  using PlainRouter::PlainRouter;
  RouterSpec finishing() const override {
    RouterSpec spec = spec_;
    using Order = CapacityPolicy::Order;
    for (CapacityPolicy* policy : {&spec.train_capacity, &spec.eval_capacity})
      policy->order = policy->order == Order::kTokenMajor ? Order::kChoiceMajor : Order::kTokenMajor;
    return spec;
  }
};

struct SwallowsNaN : PlainRouter {
  using PlainRouter::PlainRouter;
  RouteInput input(const RouteInput& in) const override {
    RouteInput seen = in;
    seen.x_TD = in.x_TD.nan_to_num(0, 0, 0);
    return seen;
  }
};

struct DeafToReplay : PlainRouter {
  using PlainRouter::PlainRouter;
  RouteInput input(const RouteInput& in) const override {
    RouteInput seen = in;
    seen.forced = nullptr;
    return seen;
  }
};

struct SaysItLearns : PlainRouter {
  explicit SaysItLearns(const RouterSpec& spec) : PlainRouter(spec, {.kind = NoiseSpec::Kind::kNone}, false) {}
};

// A bias that follows the load, in the choice only, moved by end_step().
struct Balanced : PlainRouter {
  explicit Balanced(const RouterSpec& spec) : PlainRouter(spec) {
    bias_E_ = add_buffer("bias", at::zeros({spec.max_experts}, spec.dtype));
  }
  Tensor choice(const Tensor& logits_TE) const override { return stable_topk(logits_TE.detach().add(bias_E_), spec_.k()); }
  void afterwards(const RouteInput& in, RouteOutput& out) const override {
    const Tensor load_E = at::zeros({spec_.max_experts}, at::kDouble);
    const Tensor choice_N = out.assignment.choice_TK.reshape({-1});
    out.deltas["load"] = load_E.index_add(0, choice_N, at::ones({choice_N.numel()}, at::kDouble)).div(unit(in));
  }
  std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t) override {
    const Tensor& load_E = deltas.at("load");
    bias_E_.add_(load_E.mean().sub(load_E).sign().to(bias_E_.scalar_type()), 0.1);
    return {};
  }
  virtual double unit(const RouteInput&) const { return 1; }
  Tensor bias_E_;
};

struct MeanDelta : Balanced {
  using Balanced::Balanced;
  double unit(const RouteInput& in) const override { return static_cast<double>(std::max<int64_t>(in.rows(), 1)); }
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

template <class Broken>
Registration<RouterEntry> registered(const char* name, RouterFacts facts = {}, const char* renormalise = "none") {
  return Registration<RouterEntry>{{
      .name = name,
      .title = "for tests",
      .citation = "none",
      .equation = "none",
      .facts = facts,
      .options = {k_option(2), renormalise_option(renormalise)},
      .paper_losses = {{"balance", 0.01, {{"counts", std::string("any_choice")}}}},
      .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<Broken>(spec); },
  }};
}

const Registration<RouterEntry> kMutantRegistrations[] = {
    registered<GateDetached>("mutant_gate_detached"),
    registered<RenormalisedTwice>("mutant_renormalised_twice", {}, "before_drop"),
    registered<TiesToHighest>("mutant_ties_to_highest"),
    registered<SameExpertTwice>("mutant_same_expert_twice"),
    registered<NoiseInEvaluation>("mutant_noise_in_evaluation", {.noisy_in_training = true}),
    registered<GlobalGenerator>("mutant_global_generator", {.noisy_in_training = true, .random_in_eval = true}),
    registered<NoiseByRowNumber>("mutant_noise_by_row_number", {.noisy_in_training = true}),
    registered<StateTouched>("mutant_state_touched"),
    registered<BatchMean>("mutant_batch_mean"),
    registered<PeeksAtNextRow>("mutant_peeks_at_next_row"),
    registered<CountsAfterDrop>("mutant_counts_after_drop"),
    registered<CapacityWithoutK>("mutant_capacity_without_k"),
    registered<WrongDropOrder>("mutant_wrong_drop_order"),
    registered<SwallowsNaN>("mutant_swallows_nan"),
    registered<DeafToReplay>("mutant_deaf_to_replay"),
    registered<SaysItLearns>("mutant_says_it_learns"),
    registered<MeanDelta>("mutant_mean_delta", {.stateful = true}),
    registered<Balanced>("mutant_says_it_is_stateless"),
    registered<HiddenState>("mutant_hidden_state", {.stateful = true}),
    registered<PlainRouter>("mutant_says_it_looks_ahead", {.looks_ahead = true}),
    registered<PlainRouter>("control_plain"),
    registered<Balanced>("control_stateful", {.stateful = true}),
    registered<BatchMean>("control_batch_mean", {.batch_independent = false, .batch_independent_eval = false}),
};

}  // namespace

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all{
      {"mutant_gate_detached", "finite_differences"},
      {"mutant_renormalised_twice", "gates"},
      {"mutant_ties_to_highest", "ties"},
      {"mutant_same_expert_twice", "shapes"},
      {"mutant_noise_in_evaluation", "draws"},
      {"mutant_global_generator", "determinism"},
      {"mutant_noise_by_row_number", "micro_batches"},
      {"mutant_noise_by_row_number", "thread_ranks"},
      {"mutant_noise_by_row_number", "other_rows"},
      {"mutant_state_touched", "const_route"},
      {"mutant_batch_mean", "causality"},
      {"mutant_batch_mean", "micro_batches"},
      {"mutant_peeks_at_next_row", "causality"},
      {"mutant_counts_after_drop", "conserved"},
      {"mutant_capacity_without_k", "capacity"},
      {"mutant_wrong_drop_order", "capacity"},
      {"mutant_swallows_nan", "non_finite"},
      {"mutant_deaf_to_replay", "replay"},
      {"mutant_says_it_learns", "learning"},
      {"mutant_mean_delta", "micro_batches"},
      {"mutant_says_it_is_stateless", "end_step"},
      {"mutant_hidden_state", "save_load"},
      {"mutant_says_it_looks_ahead", "causality"},
  };
  return all;
}

const std::vector<std::string>& controls() {
  static const std::vector<std::string> all{"control_plain", "control_stateful", "control_batch_mean"};
  return all;
}

}  // namespace moelab
