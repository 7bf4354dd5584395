// Properties of state and chance: a decision is a pure function of input, parameters, buffers and key.
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

KitCase state_case(const Subject& subject, Mode mode) {
  return {.experts = 8, .capacity = {.mode = CapacityPolicy::Mode::kFactor}, .mode = mode, .seed = subject.seed};
}

void check_determinism(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const KitCase at = state_case(subject, mode);
    const KitLayer layer = kit_layer(subject, at);
    const RouteInput in = kit_input(at);
    must_keep_bits(layer.route(in).plan, layer.route(in).plan, "the same call twice", at);
    must_keep_bits(layer.route(in).plan, kit_layer(subject, at).route(in).plan, "the same call on an equal router", at);
  }
}

// A draw that only decides ties shows in what end_step() will get.
bool same_outcome(const RouteOutput& a, const RouteOutput& b) {
  const auto same = [](const auto& l, const auto& r) { return l.first == r.first && at::equal(l.second, r.second); };
  return same_bits(a.plan, b.plan) &&
         std::equal(a.deltas.begin(), a.deltas.end(), b.deltas.begin(), b.deltas.end(), same);
}

void check_draws_in(const Subject& subject, Mode mode, bool random) {
  KitCase at = state_case(subject, mode);
  at.capacity = {};
  const KitLayer layer = kit_layer(subject, at);
  const RouteInput one = kit_input(at);
  RouteInput other = one;
  bool same = true;  // a router may draw one expert for all rows: two seeds often agree, sixteen hardly ever
  for (int64_t seed = 0; seed < 16 && same; ++seed) {
    other.random = one.random.with("another step or seed", seed);
    same = same_outcome(layer.route(one), layer.route(other));
  }
  must(!random || !same, "it says that it draws here, but another seed gives the same plan", at);
  must(random || same, "it says that it does not draw here, but another seed gives another plan", at);
}

// Several passes per step are there to differ.
void check_passes(const Subject& subject) {
  const KitCase at = state_case(subject, Mode::kTrain);
  const KitLayer layer = kit_layer(subject, at);
  bool same = true;
  for (int64_t seed = 0; seed < 16 && same; ++seed) {
    RouteInput one = kit_input(at);
    one.random = one.random.with("another step", seed);
    RouteInput other = one;
    other.pass = 1;
    other.random = one.random.in_pass(1);
    same = same_outcome(layer.route(one), layer.route(other));
  }
  must(!same, fmt::format("it asks for {} passes per step, but the second decides as the first", subject.facts.passes), at);
}

void check_draws(const Subject& subject) {
  check_draws_in(subject, Mode::kTrain, subject.facts.noisy_in_training);
  check_draws_in(subject, Mode::kEval, subject.facts.random_in_eval);
  if (subject.facts.passes > 1) check_passes(subject);
}

void check_const_route(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const KitCase at = state_case(subject, mode);
    const KitLayer layer = kit_layer(subject, at);
    const std::vector<NamedTensor> before = copied_state(*layer.site.router);
    const RouteInput in = kit_input(at);
    kit_scalar(layer, in, layer.route(in), at).backward();
    const std::vector<NamedTensor> after = state_of(*layer.site.router);
    for (size_t i = 0; i < before.size(); ++i)
      must(at::equal(before[i].tensor, after[i].tensor), "route() changes router." + before[i].name, at);
  }
}

// Recomputation: the recorded selection gives the same plan and counts, though nobody is asked to choose again.
void check_replay(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    if (subject.facts.plan_in(mode) != PlanForm::kSparse) continue;
    const KitCase at = state_case(subject, mode);
    const KitLayer layer = kit_layer(subject, at);
    RouteInput in = kit_input(at);
    const RouteOutput first = layer.route(in);
    in.forced = &first.assignment;
    const RouteOutput again = layer.route(in);
    must_keep_bits(again.plan, first.plan, "replay of the recorded selection", at);
    const int64_t experts = layer.max_experts();
    must_equal(record_of(in, again, experts), record_of(in, first, experts), "counters of the replay", at);
    in.x_TD = in.x_TD.detach().neg();  // a replay obeys, whatever the scores say now
    const Assignment obeyed = layer.route(in).assignment;
    must(at::equal(obeyed.choice_TK, first.assignment.choice_TK) && at::equal(obeyed.kept_TK, first.assignment.kept_TK),
         "a replay with other scores chooses anew", at);
  }
}

}  // namespace

std::vector<Property> state_properties() {
  return {
      {"determinism", "the same call twice is bitwise equal, in training and in evaluation", always_applies, check_determinism},
      {"draws", "another step, seed or pass gives another plan or change of state exactly where the facts say that it draws",
       always_applies, check_draws},
      {"const_route", "route() changes no parameter and no buffer", always_applies, check_const_route},
      {"replay", "a forced selection gives the recorded plan bitwise and counts the same", needs_choices, check_replay},
  };
}

}  // namespace moelab
