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

void check_draws(const Subject& subject) {
  check_draws_in(subject, Mode::kTrain, subject.facts.noisy_in_training);
  check_draws_in(subject, Mode::kEval, subject.facts.random_in_eval);
}

std::vector<NamedTensor> state_of(const Module& module) {
  std::vector<NamedTensor> state = module.parameters();
  for (NamedTensor& buffer : module.buffers()) state.push_back(std::move(buffer));
  return state;
}

std::vector<NamedTensor> copied_state(const Module& module) {
  std::vector<NamedTensor> state = state_of(module);
  for (NamedTensor& entry : state) entry.tensor = entry.tensor.detach().clone();
  return state;
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
    must_equal(record_of(in, again, at.experts), record_of(in, first, at.experts), "counters of the replay", at);
    in.x_TD = in.x_TD.detach().neg();  // a replay obeys, whatever the scores say now
    const Assignment obeyed = layer.route(in).assignment;
    must(at::equal(obeyed.choice_TK, first.assignment.choice_TK) && at::equal(obeyed.kept_TK, first.assignment.kept_TK),
         "a replay with other scores chooses anew", at);
  }
}

void copy_state(const Module& from, const Module& to, const KitCase& at) {
  const at::NoGradGuard no_grad;
  const std::vector<NamedTensor> saved = state_of(from), loaded = state_of(to);
  must(saved.size() == loaded.size(), "two instances register different numbers of tensors", at);
  for (size_t i = 0; i < saved.size(); ++i) {
    must(saved[i].name == loaded[i].name && saved[i].tensor.sizes() == loaded[i].tensor.sizes(),
         "two instances register " + saved[i].name + " differently", at);
    loaded[i].tensor.copy_(saved[i].tensor);
  }
}

void take_step(const KitLayer& layer, RouteInput in, int64_t step) {
  in.step = step;
  const std::map<std::string, Tensor> deltas = layer.route(in).deltas;
  const at::NoGradGuard no_grad;
  layer.site.router->end_step(deltas, step);
}

// Some steps, save, load into a router of another seed, then five steps side by side.
void check_save_load(const Subject& subject) {
  const KitCase at = state_case(subject, Mode::kTrain);
  KitCase elsewhere = at;
  elsewhere.seed = at.seed + 1;
  const KitLayer layer = kit_layer(subject, at), fresh = kit_layer(subject, elsewhere);
  RouteInput in = kit_input(at);
  for (int64_t step = 0; step < 3; ++step) take_step(layer, in, step);
  copy_state(*layer.site.router, *fresh.site.router, at);
  for (int64_t step = 3; step < 8; ++step)
    for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
      in.mode = mode;
      in.step = step;
      must_keep_bits(fresh.route(in).plan, layer.route(in).plan, fmt::format("step {} after loading", step), at);
      if (mode == Mode::kEval) continue;
      take_step(layer, in, step);
      take_step(fresh, in, step);
    }
}

std::vector<Tensor> buffers_after_step(const Subject& subject, const KitCase& at) {
  const KitLayer layer = kit_layer(subject, at);
  for (int64_t step = 0; step < 3; ++step) take_step(layer, kit_input(at), step);
  std::vector<Tensor> buffers;
  for (const NamedTensor& entry : layer.site.router->buffers()) buffers.push_back(entry.tensor);
  return buffers;
}

void check_end_step(const Subject& subject) {
  const KitCase at = state_case(subject, Mode::kTrain);
  const std::vector<Tensor> moved = buffers_after_step(subject, at);
  std::vector<NamedTensor> start = kit_layer(subject, at).site.router->buffers();
  for (size_t i = 0; i < moved.size(); ++i)
    must(subject.facts.stateful || at::equal(moved[i], start[i].tensor),
         "it says that it has no state, but end_step() moves " + start[i].name, at);
}

}  // namespace

std::vector<Property> state_properties() {
  return {
      {"determinism", "the same call twice is bitwise equal, in training and in evaluation", always_applies, check_determinism},
      {"draws", "another step or seed gives another plan or change of state exactly where the facts say that it draws",
       always_applies, check_draws},
      {"const_route", "route() changes no parameter and no buffer", always_applies, check_const_route},
      {"replay", "a forced selection gives the recorded plan bitwise and counts the same", needs_choices, check_replay},
      {"end_step", "buffers move in end_step() only where the facts say so", always_applies, check_end_step},
      {"save_load", "parameters and buffers in a fresh instance give bitwise the same plans, over 5 more steps", always_applies,
       check_save_load},
  };
}

}  // namespace moelab
