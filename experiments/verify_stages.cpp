// Properties of what moves between steps: state, the stages of a method, and passes that have to leave both alone.
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>

#include <fmt/format.h>

#include <algorithm>
#include <set>

namespace moelab {
namespace {

constexpr int64_t kStepsAfterLoading = 5;

// Few rows: experts without any, and rows without an expert, are not rare.
KitCase stage_case(int64_t seed) {
  return {.rows = 8, .sequences = 2, .even = true, .short_stages = true, .seed = seed};
}

bool has_stages(const RouterEntry& entry) {
  return std::any_of(entry.options.begin(), entry.options.end(), [](const OptionSpec& spec) { return spec.steps; });
}

// Rows of each step are other ones.
RouteInput input_of_step(const KitCase& at, int64_t step, Mode mode) {
  KitCase of_step = at;
  of_step.seed = 1000 * (at.seed + 1) + step;
  of_step.mode = mode;
  RouteInput in = kit_input(of_step);
  in.step = step;
  return in;
}

std::vector<Event> end_step_of(const KitLayer& layer, const std::map<std::string, Tensor>& deltas, int64_t step) {
  const at::NoGradGuard no_grad;
  return layer.site.router->end_step(deltas, step);
}

// A layer's first steps: how each was decided, the state before it, and what came of it.
struct Life {
  std::vector<Plan> trained, evaluated;
  std::vector<std::vector<NamedTensor>> state;
  std::vector<StageEvent> events;
};

Life live(const Subject& subject, const KitCase& at, int64_t steps) {
  const KitLayer layer = kit_layer(subject, at);
  Life life;
  for (int64_t step = 0; step < steps; ++step) {
    life.state.push_back(copied_state(*layer.site.router));
    const RouteOutput out = layer.route(input_of_step(at, step, Mode::kTrain));
    life.trained.push_back(out.plan);
    life.evaluated.push_back(layer.route(input_of_step(at, step, Mode::kEval)).plan);
    for (Event& event : end_step_of(layer, out.deltas, step)) life.events.push_back({step, std::move(event)});
  }
  return life;
}

void load_state(const std::vector<NamedTensor>& saved, const KitLayer& layer) {
  const at::NoGradGuard no_grad;
  const std::vector<NamedTensor> loaded = state_of(*layer.site.router);
  must(saved.size() == loaded.size(), "two instances register different numbers of tensors", layer.at);
  for (size_t i = 0; i < saved.size(); ++i) {
    must(saved[i].name == loaded[i].name && saved[i].tensor.sizes() == loaded[i].tensor.sizes(),
         "two instances register " + saved[i].name + " differently", layer.at);
    loaded[i].tensor.copy_(saved[i].tensor);
  }
}

// A router of another seed takes the state that was saved before step `first`, and goes on.
void must_go_on(const Subject& subject, const KitCase& at, const Life& life, int64_t first) {
  KitCase elsewhere = at;
  elsewhere.seed = at.seed + 1;
  const KitLayer fresh = kit_layer(subject, elsewhere);
  load_state(life.state[static_cast<size_t>(first)], fresh);
  for (int64_t step = first; step < first + kStepsAfterLoading; ++step) {
    const auto which = static_cast<size_t>(step);
    const std::string where = fmt::format("step {} after loading what was saved after {} steps", step, first);
    const RouteOutput out = fresh.route(input_of_step(at, step, Mode::kTrain));
    must_keep_bits(out.plan, life.trained[which], where, at);
    must_keep_bits(fresh.route(input_of_step(at, step, Mode::kEval)).plan, life.evaluated[which], where + ", evaluated", at);
    end_step_of(fresh, out.deltas, step);
  }
}

// Saved before, just after and one step after each step that ends a stage; and once anywhere.
std::set<int64_t> times_to_save(const Life& life) {
  std::set<int64_t> times{3};
  for (const StageEvent& stage : life.events)
    for (const int64_t after : {0, 1, 2}) times.insert(stage.step + after);
  return times;
}

void check_save_load(const Subject& subject) {
  const bool stages = has_stages(subject.entry);
  for (int64_t seed = subject.seed; seed < subject.seed + (stages ? 3 : 1); ++seed) {
    const KitCase at = stage_case(seed);
    const int64_t steps = stages ? 2 * kKitStages + 2 : 3;
    const Life life = live(subject, at, steps + kStepsAfterLoading);
    for (const int64_t time : times_to_save(life))
      if (time <= steps) must_go_on(subject, at, life, time);
  }
}

std::shared_ptr<Router> router_after_steps(const Subject& subject, const KitCase& at, int64_t steps) {
  const KitLayer layer = kit_layer(subject, at);
  for (int64_t step = 0; step < steps; ++step)
    end_step_of(layer, layer.route(input_of_step(at, step, Mode::kTrain)).deltas, step);
  return layer.site.router;
}

void check_end_step(const Subject& subject) {
  const KitCase at{.experts = 8, .capacity = {.mode = CapacityPolicy::Mode::kFactor}, .seed = subject.seed};
  const auto first = router_after_steps(subject, at, 0), last = router_after_steps(subject, at, 3);
  const std::vector<NamedTensor> start = first->buffers(), moved = last->buffers();
  for (size_t i = 0; i < moved.size(); ++i)
    must(subject.facts.stateful || at::equal(moved[i].tensor, start[i].tensor),
         "it says that it has no state, but end_step() moves " + start[i].name, at);
  const Tensor present_E = first->active_experts_E();
  must(subject.facts.changes_experts || !present_E.defined() || at::equal(present_E, last->active_experts_E()),
       "it says that its experts stay, but end_step() adds or removes some", at);
}

// All passes of a step that are not its training: evaluation, a prompt, a recomputation.
void pass_by(const Subject& subject, const KitLayer& layer, const RouteInput& trained, const RouteOutput& out, int64_t step) {
  const RouteOutput evaluated = layer.route(input_of_step(layer.at, step, Mode::kEval));
  must(evaluated.deltas.empty(), "an evaluation leaves deltas for end_step()", layer.at);
  if (subject.facts.decodes) layer.route(input_of_step(layer.at, step, Mode::kDecode));
  RouteInput again = trained;
  if (out.assignment.defined()) again.forced = &out.assignment;
  kit_scalar(layer, again, layer.route(again), layer.at).backward();
}

void must_have_equal_state(const KitLayer& a, const KitLayer& b, int64_t step) {
  const std::vector<NamedTensor> left = state_of(*a.site.router), right = state_of(*b.site.router);
  for (size_t i = 0; i < left.size(); ++i)
    must(at::equal(left[i].tensor, right[i].tensor),
         fmt::format("evaluation, decoding or recomputation in step {} moves router.{}", step, left[i].name), a.at);
}

void check_passive(const Subject& subject) {
  const KitCase at = stage_case(subject.seed);
  const KitLayer busy = kit_layer(subject, at), quiet = kit_layer(subject, at);
  for (int64_t step = 0; step <= kKitStages; ++step) {
    const RouteInput in = input_of_step(at, step, Mode::kTrain);
    const RouteOutput out = busy.route(in), expected = quiet.route(in);
    must_keep_bits(out.plan, expected.plan, fmt::format("step {} after evaluation, decoding and recomputation", step), at);
    pass_by(subject, busy, in, out, step);
    end_step_of(busy, out.deltas, step);
    end_step_of(quiet, expected.deltas, step);
    must_have_equal_state(busy, quiet, step);
  }
}

}  // namespace

std::vector<StageEvent> stages_of(const Subject& subject) {
  return live(subject, stage_case(subject.seed), 2 * kKitStages).events;
}

std::vector<Property> stage_properties() {
  return {
      {"end_step", "buffers and experts change in end_step() only where the facts say so", always_applies, check_end_step},
      {"save_load", "parameters and buffers in a fresh instance give bitwise the same plans over 5 steps, around every stage",
       always_applies, check_save_load},
      {"passive", "evaluation, decoding and recomputation between steps leave no delta, no state and no plan changed",
       always_applies, check_passive},
  };
}

}  // namespace moelab
