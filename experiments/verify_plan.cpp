// Properties of one decision: sizes at the edge, ties, gates that sum to one, bad input.
#include "core/error.h"
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <stdexcept>

namespace moelab {
namespace {

bool is_finite(const Tensor& tensor) { return tensor.detach().isfinite().all().item<bool>(); }

// Distinct experts in 0 … E-1, or -1.
bool are_choices(const Tensor& choice_TK, int64_t experts) {
  const Tensor sorted_TK = std::get<0>(choice_TK.sort(1));
  const Tensor next_TK = sorted_TK.slice(1, 1), before_TK = sorted_TK.slice(1, 0, std::max<int64_t>(sorted_TK.size(1) - 1, 0));
  const bool twice = next_TK.eq(before_TK).logical_and(next_TK.ge(0)).any().item<bool>();
  return !twice && !choice_TK.lt(-1).logical_or(choice_TK.ge(experts)).any().item<bool>();
}

void check_output(const Subject& subject, const RouteOutput& out, const KitCase& at, int64_t max_experts) {
  for (const auto& [name, probe] : out.probes) must(is_finite(probe), "probe '" + name + "' is not finite", at);
  if (subject.facts.has_scores)
    must(out.scores.loss_TE.defined() && out.scores.loss_TE.sizes() == at::IntArrayRef({at.rows, max_experts}),
         "it has scores, but its probabilities are not [T,E]", at);
  if (!out.assignment.defined()) return;
  const Tensor& choice_TK = out.assignment.choice_TK;
  must(choice_TK.size(0) == at.rows && out.gate_TK.sizes() == choice_TK.sizes(), "choices and gates are not [T,K]", at);
  must(are_choices(choice_TK, at.experts), "a row chooses an expert twice, or one that does not exist", at);
  must(out.k == 0 || out.k == choice_TK.size(1), "k is not the number of choices", at);
}

// Of experts that are there; 0 where there are no logits.
double largest_logit(const RouteOutput& out) {
  const auto logits = out.probes.find("logits");
  if (logits == out.probes.end() || logits->second.numel() == 0) return 0;
  const Tensor size = logits->second.detach().abs();
  return size.masked_fill(size.gt(1e8), 0).max().item<double>();
}

// Makes the largest logit `target`, by larger inputs, or by larger parameters where inputs do not move logits. Cosines stay.
void stretch_logits(const KitLayer& layer, RouteInput& in, double target) {
  const at::NoGradGuard no_grad;
  const auto scaled = [&](double by) { in.x_TD = in.x_TD.detach().mul(by); };
  const double usual = largest_logit(layer.route(in));
  scaled(usual > 0 ? target / usual : target);
  if (largest_logit(layer.route(in)) >= 0.99 * target) return;
  for (const NamedTensor& entry : layer.site.router->parameters()) entry.tensor.mul_(target);
}

struct EdgeInput {
  const char* what;
  at::ScalarType dtype;
  CapacityPolicy::Mode capacity;
};
constexpr EdgeInput kEdgeInputs[] = {{"usual inputs", at::kDouble, CapacityPolicy::Mode::kNone},
                                     {"equal logits", at::kFloat, CapacityPolicy::Mode::kFactor},
                                     {"logits of ±1e4", at::kFloat, CapacityPolicy::Mode::kFactor}};

RouteInput edge_input(const KitLayer& layer, const EdgeInput& input) {
  RouteInput in = kit_input(layer.at);
  if (&input == &kEdgeInputs[1]) in.x_TD = in.x_TD.detach().mul(0);
  if (&input == &kEdgeInputs[2]) stretch_logits(layer, in, 1e4);
  in.x_TD = in.x_TD.detach().requires_grad_(true);
  return in;
}

void check_size(const Subject& subject, const KitCase& at, const EdgeInput& input) {
  const KitLayer layer = kit_layer(subject, at);
  const RouteInput in = edge_input(layer, input);
  const RouteOutput out = layer.route(in);
  check_output(subject, out, at, layer.max_experts());
  const Tensor scalar = kit_scalar(layer, in, out, at);
  must(is_finite(scalar), fmt::format("the output or a loss is not finite at {}", input.what), at);
  must(at.rows > 0 || scalar.item<double>() == 0, "a loss of no rows is not 0", at);
  scalar.backward();
  for (const auto& [name, gradient] : gradients_of(layer))
    must(is_finite(gradient), fmt::format("the gradient of {} is not finite at {}", name, input.what), at);
}

std::vector<KitCase> edge_sizes() {
  std::vector<KitCase> sizes;
  for (const int64_t rows : {0, 1, 3, 13}) sizes.push_back({.rows = rows});
  sizes.push_back({.rows = 13, .experts = 1});
  sizes.push_back({.rows = 13, .k = 1});
  sizes.push_back({.rows = 13, .k = 4});
  return sizes;
}

void check_shapes(const Subject& subject) {
  for (KitCase at : edge_sizes())
    for (const Mode mode : {Mode::kTrain, Mode::kEval})
      for (const EdgeInput& input : kEdgeInputs) {
        at.mode = mode;
        at.dtype = input.dtype;
        at.capacity.mode = input.capacity;
        if (has_size(subject, at)) check_size(subject, at, input);
      }
}

std::string ties_not_applicable(const Subject& subject) {
  const RouterFacts& facts = subject.facts;
  if (!facts.has_scores) return "it has no scores that could be equal";
  if (facts.random_in_eval) return "it draws in evaluation, which breaks ties";
  const std::string reason = needs_choices(subject);
  if (!reason.empty()) return reason;
  return facts.batch_independent_eval ? "" : "its rows compete, so equal scores do not settle a choice";
}

// The experts 0, 1, …, k-1; of groups the first ones, and as many of the first experts of each.
Tensor lowest_experts(const RouterFacts& facts, int64_t experts, int64_t k) {
  const Tensor group_K1 = at::arange(facts.k_groups, at::kLong).unsqueeze(1).mul(experts / facts.groups);
  return group_K1.add(at::arange(k / facts.k_groups, at::kLong)).flatten();
}

// A row of equal scores takes the lowest experts, in their order; as many of them as it takes, where k varies.
void check_ties(const Subject& subject) {
  const KitCase at{.mode = Mode::kEval};
  const KitLayer layer = kit_layer(subject, at);
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : layer.site.router->parameters()) entry.tensor.zero_();
  const RouteOutput out = layer.route(kit_input(at));
  const Tensor probability_TE = out.scores.loss_TE.slice(1, 0, at.experts);
  must(at::equal(probability_TE, probability_TE.slice(1, 0, 1).expand_as(probability_TE)),
       "parameters of zero do not give equal probabilities", at);
  const Tensor& choice_TK = out.assignment.choice_TK;
  const Tensor lowest_TK = lowest_experts(subject.facts, at.experts, choice_TK.size(1)).expand_as(choice_TK);
  must(at::equal(choice_TK, lowest_TK.masked_fill(choice_TK.lt(0), -1)), "a tie does not go to the lowest expert index", at);
  must(choice_TK.select(1, 0).eq(0).all().item<bool>(), "a row of equal scores takes no expert", at);
}

Renormalise renormalise_of(const Subject& subject) {
  return kit_router(subject.entry, subject.variant, {})->spec().renormalise();
}

std::string gates_not_applicable(const Subject& subject) {
  return renormalise_of(subject) == Renormalise::kNone ? "its gates are not renormalised" : "";
}

// before_drop: over the choices; after_drop: over the survivors, where there is one.
void check_gates(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    KitCase at{.capacity = {.mode = CapacityPolicy::Mode::kFactor}, .mode = mode};
    const KitLayer layer = kit_layer(subject, at);
    const RouteOutput out = layer.route(kit_input(at));
    const bool after = renormalise_of(subject) == Renormalise::kAfterDrop;
    const Tensor counted_TK = after ? out.assignment.kept_TK : out.assignment.choice_TK.ge(0);
    const Tensor gates_TE = decision_of_rows(out).slice(1, 0, layer.max_experts());
    const Tensor sum_T = after ? gates_TE.sum(1) : out.gate_TK.detach().masked_fill(counted_TK.logical_not(), 0).sum(1);
    const Tensor expected_T = counted_TK.any(1).to(at.dtype);
    must_agree(sum_T, expected_T, 1e-6, "renormalised gates do not sum to 1", at);
  }
}

std::string refusal_of(const KitLayer& layer, const RouteInput& in, const KitCase& at) {
  try {
    layer.route(in);
  } catch (const Error& error) {
    must(error.code() == ExitCode::kDiverged,
         std::string("non-finite input ends with another exit code than 3: ") + error.what(), at);
    return error.what();
  }
  throw std::runtime_error(fmt::format("non-finite input is not refused ({})", at.text()));
}

void check_non_finite(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      const KitCase at{.mode = mode};
      RouteInput in = kit_input(at);
      in.x_TD = in.x_TD.detach().clone();
      in.x_TD.mutable_data_ptr<double>()[at.width * 4 + 2] = bad;
      const std::string message = refusal_of(kit_layer(subject, at), in, at);
      must(message.find(fmt::format("layer {}", in.layer)) != std::string::npos,
           "the refusal does not name the layer: " + message, at);
      must(message.find(fmt::format("step {}", in.step)) != std::string::npos, "the refusal does not name the step: " + message,
           at);
    }
}

}  // namespace

std::vector<Property> plan_properties() {
  return {
      {"shapes", "valid plans and finite results at T = 0, 1, below E and prime, E = 1, k = E, equal logits, logits of ±1e4",
       always_applies, check_shapes},
      {"ties", "equal scores go to the lowest expert index", ties_not_applicable, check_ties},
      {"gates", "renormalised gates sum to 1 over the choices, or over the survivors", gates_not_applicable, check_gates},
      {"non_finite", "NaN and Inf in the input are refused, naming layer and step", always_applies, check_non_finite},
  };
}

}  // namespace moelab
