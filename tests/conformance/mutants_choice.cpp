// Mutants that choose, weigh or count wrongly.
#include "tests/conformance/mutants.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros_like.h>

namespace moelab {
namespace {

struct GateDetached : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const RouteInput&, const Tensor& prob_TK) const override { return prob_TK.detach(); }
};

struct RenormalisedTwice : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const RouteInput&, const Tensor& prob_TK) const override { return prob_TK.div(prob_TK.sum(1, true).square()); }
  RouterSpec finishing() const override {
    RouterSpec spec = spec_;
    spec.options.set(renormalise_option("none"), std::string("none"));
    return spec;
  }
};

struct RenormalisationSkipped : PlainRouter {
  using PlainRouter::PlainRouter;
  RouterSpec finishing() const override {
    RouterSpec spec = spec_;
    spec.options.set(renormalise_option("none"), std::string("none"));
    return spec;
  }
};

struct SecondSoftmaxOfGates : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor gate(const RouteInput&, const Tensor& prob_TK) const override { return prob_TK.softmax(1); }
};

struct SecondSoftmaxOfLosses : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor loss_probabilities(const Tensor& logits_TE) const override { return logits_TE.softmax(1).softmax(1); }
};

// Σ exp z without taking the largest z out first.
struct NaiveSoftmax : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor probabilities(const Tensor& logits_TE) const override { return logits_TE.exp().div(logits_TE.exp().sum(1, true)); }
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

struct NeedsTwoExperts : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor choice(const Tensor& logits_TE) const override { return stable_topk(logits_TE, 2).slice(1, 0, spec_.k()); }
};

// Leaves out a second expert that the row hardly wants.
struct VariesItsChoices : PlainRouter {
  using PlainRouter::PlainRouter;
  Tensor choice(const Tensor& logits_TE) const override {
    const Tensor choice_TK = stable_topk(logits_TE, spec_.k());
    const Tensor weak_TK = gather_choices(logits_TE.softmax(1), choice_TK).lt(0.2).logical_and(at::arange(spec_.k()).gt(0));
    return choice_TK.masked_fill(weak_TK, -1);
  }
};

// Forgets the mask of experts that are not there yet.
struct ChoosesAbsentExperts : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    return noisy_logits(in, weight_ED_, noise_);
  }
};

struct ExpertNumberMatters : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    return moved(score(in), at::arange(spec_.max_experts, weight_ED_.options().requires_grad(false)).mul(-0.3));
  }
};

struct RowNumberMatters : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    return {logits.clean_TE.mul(scale(in)), logits.noisy_TE.mul(scale(in)), {}};
  }
  Tensor scale(const RouteInput& in) const {
    return at::arange(in.rows(), weight_ED_.options().requires_grad(false)).remainder(7).add(1).unsqueeze(1);
  }
};

// The logits are computed in the precision that the activations come in.
struct HalfPrecision : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const Tensor logits_TE = in.x_TD.matmul(weight_ED_.t().to(in.x_TD.scalar_type())).to(weight_ED_.scalar_type());
    return checked(in, {logits_TE, logits_TE, {}});
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

// Whoever scores best is served first, whatever the capacity says: later rows take the places of earlier ones.
struct LeaksThroughCapacity : PlainRouter {
  using PlainRouter::PlainRouter;
  RouterSpec finishing() const override {
    RouterSpec spec = spec_;
    spec.train_capacity.priority = spec.eval_capacity.priority = CapacityPolicy::Priority::kBatch;
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

const Registration<RouterEntry> choice_registrations[] = {
    registered<GateDetached>("mutant_gate_detached"),
    registered<RenormalisedTwice>("mutant_renormalised_twice", {}, "before_drop"),
    registered<RenormalisationSkipped>("mutant_renormalisation_skipped", {}, "before_drop"),
    registered<SecondSoftmaxOfGates>("mutant_second_softmax_of_gates"),
    registered<SecondSoftmaxOfLosses>("mutant_second_softmax_of_losses"),
    registered<NaiveSoftmax>("mutant_naive_softmax"),
    registered<TiesToHighest>("mutant_ties_to_highest"),
    registered<SameExpertTwice>("mutant_same_expert_twice"),
    registered<NeedsTwoExperts>("mutant_needs_two_experts"),
    registered<VariesItsChoices>("mutant_varies_its_choices"),
    registered<ChoosesAbsentExperts>("mutant_chooses_absent_experts"),
    registered<ExpertNumberMatters>("mutant_expert_number_matters"),
    registered<RowNumberMatters>("mutant_row_number_matters"),
    registered<HalfPrecision>("mutant_half_precision"),
    registered<CountsAfterDrop>("mutant_counts_after_drop"),
    registered<CapacityWithoutK>("mutant_capacity_without_k"),
    registered<WrongDropOrder>("mutant_wrong_drop_order"),
    registered<LeaksThroughCapacity>("mutant_leaks_through_capacity"),
    registered<SwallowsNaN>("mutant_swallows_nan"),
    registered<DeafToReplay>("mutant_deaf_to_replay"),
    registered<PlainRouter>("control_plain"),
};

}  // namespace

std::vector<Mutant> choice_mutants() {
  return {
      {"mutant_gate_detached", "finite_differences", {"learning"}},
      {"mutant_renormalised_twice", "gates", {}},
      {"mutant_renormalisation_skipped", "gates", {}},
      {"mutant_second_softmax_of_gates", "scores", {}},
      {"mutant_second_softmax_of_losses", "scores", {}},
      {"mutant_naive_softmax", "shapes", {}},
      {"mutant_ties_to_highest", "ties", {}},
      {"mutant_same_expert_twice", "shapes", {kAnyProperty}},
      {"mutant_needs_two_experts", "shapes", {"plan_form", "executors"}},
      {"mutant_varies_its_choices", "plan_form", {}},
      {"mutant_chooses_absent_experts", "room", {}},
      {"mutant_expert_number_matters", "expert_order", {"ties"}},
      {"mutant_row_number_matters", "row_order", {"other_rows", "micro_batches", "thread_ranks", "decode"}},
      {"mutant_half_precision", "precision", {}},
      {"mutant_counts_after_drop", "conserved", {"replay"}},
      {"mutant_capacity_without_k", "capacity", {}},
      {"mutant_wrong_drop_order", "capacity", {"causality"}},
      {"mutant_leaks_through_capacity", "causality", {"capacity"}},
      {"mutant_swallows_nan", "non_finite", {}},
      {"mutant_deaf_to_replay", "replay", {}},
  };
}

}  // namespace moelab
