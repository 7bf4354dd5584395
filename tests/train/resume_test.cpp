// A run that stops at any step and goes on from its checkpoint is, bit for bit, the run that never stopped.
#include "tests/support/program.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>

#include <algorithm>
#include <functional>

namespace moelab::test {
namespace {

// Metrics by step; evaluations at 1000 + step; the trainer's own last window at -1.
using Windows = std::map<int64_t, std::map<std::string, double>>;

// Keeps what would be written to metrics.jsonl, and stops after `stop_at` steps.
class WindowObserver : public Observer {
 public:
  explicit WindowObserver(int64_t stop_at = -1) : stop_at_(stop_at) {}
  Request on_step(const StepView& view) override {
    if (view.flush) windows[view.step + 1] = view.window.metrics();
    return view.step + 1 == stop_at_ ? Request::kStop : Request::kNone;
  }
  void on_evaluation(const Evaluation& evaluation, int64_t step, bool) override {
    windows[1000 + step] = {{"loss", evaluation.loss}, {"accuracy", evaluation.accuracy}};
  }
  Windows windows;

 private:
  int64_t stop_at_;
};

// Same keys, same bits; NaN equals NaN.
bool same_windows(const Windows& a, const Windows& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [step, metrics] : b) {
    if (a.count(step) == 0 || a.at(step).size() != metrics.size()) return false;
    for (const auto& [name, value] : metrics) {
      const double other = a.at(step).at(name);
      if (other != value && !(std::isnan(other) && std::isnan(value))) return false;
    }
  }
  return true;
}

struct Finished {
  Tensors state;
  Windows windows;
  int64_t tokens;
};

Finished unstopped(const Experiment& e, const std::string& checkpoints = "") {
  WindowObserver windows;
  Trainer trainer = trainer_of(e, checkpoints, {&windows});
  trainer.run();
  windows.windows[-1] = trainer.last_window().metrics();
  return {state_of(trainer), windows.windows, trainer.tokens()};
}

Finished resumed(const Experiment& e, const Checkpoint& checkpoint, Windows before) {
  WindowObserver windows;
  Trainer trainer = trainer_of(e, "", {&windows});
  trainer.resume(checkpoint);
  trainer.run();
  windows.windows.merge(before);
  windows.windows[-1] = trainer.last_window().metrics();
  return {state_of(trainer), windows.windows, trainer.tokens()};
}

Windows up_to(Windows windows, int64_t step) {
  std::erase_if(windows, [&](const auto& entry) { return entry.first < 0 || entry.first % 1000 > step || entry.first == 1012; });
  return windows;
}

void check_same(const Finished& a, const Finished& b) {
  CHECK(bitwise_equal(a.state, b.state));
  CHECK(same_windows(a.windows, b.windows));
  CHECK(a.tokens == b.tokens);
}

std::vector<std::string> changed_by(const std::string& mode) {
  std::vector<std::string> set{"model.layers=1", "checkpoint.every=1", "checkpoint.keep_last=20", "eval.every=5"};
  if (mode == "accumulation") set.push_back("train.micro_batches=2");
  if (mode == "bf16") set.push_back("train.precision=bf16");
  if (mode == "recompute") set.push_back("train.recompute=true");
  return set;
}

bool evaluates_by_thresholds(const RouterEntry& router) {
  for (const OptionSpec& option : router.options)
    if (option.name == "eval") return std::count(option.choices.begin(), option.choices.end(), "thresholds") > 0;
  return false;
}

// A decoder lets it evaluate.
bool is_for_decoders(const RouterEntry& router) {
  return evaluates_by_thresholds(router) || causality(router.facts, {}, Mode::kEval, 1).causal;
}

// Stages of a router, where it has any, begin and end within the 12 steps of the run.
std::vector<std::string> with_stages(const RouterEntry& router, std::vector<std::string> set) {
  const std::map<std::string, OptionValue> stages = stages_within(router.options, 6);
  for (const auto& [key, step] : stages) set.push_back(fmt::format("moe.router.{}={}", key, to_text(step)));
  if (!stages.empty()) set.push_back("moe.max_experts=6");
  return set;
}

Experiment decoder_with(const RouterEntry& router, std::vector<std::string> set) {
  if (evaluates_by_thresholds(router)) set.push_back("moe.router.eval=thresholds");
  set.push_back("train.allow_noncausal_training=true");
  return tiny_experiment(router.name, set);
}

// A classifier of images where a decoder refuses the router.
Experiment experiment_for(const RouterEntry& router, const std::vector<std::string>& settings) {
  const std::vector<std::string> set = with_stages(router, settings);
  return is_for_decoders(router) ? decoder_with(router, set) : tiny_classifier("patches", router.name, set);
}

// No model gives a router segments.
std::vector<std::string> router_names() {
  std::vector<std::string> names;
  for (const RouterEntry& router : Registry<RouterEntry>::instance().all())
    if (!router.facts.needs_segments) names.push_back(router.name);
  return names;
}

void check_every_stop(const std::function<Experiment()>& make) {
  const ScratchFolder folder;
  const Finished whole = unstopped(make(), folder.path());
  for (int64_t step = 1; step <= 12; ++step) {
    CAPTURE(step);
    const Checkpoint checkpoint = load_checkpoint(fmt::format("{}/step-{}", folder.path(), step));
    check_same(resumed(make(), checkpoint, up_to(whole.windows, step)), whole);
  }
}

TEST_CASE("stopped after any of its steps and resumed, a run with any router ends bitwise as unstopped") {
  const std::string name = GENERATE(from_range(router_names()));
  const std::string mode = GENERATE("plain", "accumulation", "bf16", "recompute");
  CAPTURE(name, mode);
  check_every_stop([&] { return experiment_for(Registry<RouterEntry>::instance().find(name), changed_by(mode)); });
}

TEST_CASE("stopped after any of its steps and resumed, a classifier ends bitwise as unstopped") {
  const std::string model = GENERATE("patches", "mlp"), router = GENERATE("soft_moe", "expert_choice", "vmoe");
  const std::string mode = GENERATE("plain", "accumulation");  // the others: with soft_moe and smear, above
  CAPTURE(model, router, mode);
  check_every_stop([&] { return tiny_classifier(model, router, changed_by(mode)); });
}

// Of training alone.
Windows without_evaluations(Windows windows) {
  std::erase_if(windows, [](const auto& entry) { return entry.first >= 1000; });
  return windows;
}

TEST_CASE("evaluating after every step, or recomputing activations, changes no bit of a run with any router, and no counter") {
  const std::string name = GENERATE(from_range(router_names()));
  CAPTURE(name);
  const auto run = [&](const std::vector<std::string>& settings) {
    Finished end = unstopped(experiment_for(Registry<RouterEntry>::instance().find(name), settings));
    end.windows = without_evaluations(end.windows);
    return end;
  };
  const Finished plain = run({});
  check_same(run({"eval.every=1"}), plain);
  check_same(run({"train.recompute=true"}), plain);
}

TEST_CASE("a model is evaluated twice alike, whatever its router") {
  const std::string name = GENERATE(from_range(router_names()));
  CAPTURE(name);
  const Experiment e = experiment_for(Registry<RouterEntry>::instance().find(name), {"train.steps=3"});
  trained(e);
  const std::shared_ptr<Comm> alone = single_comm();
  const Evaluation first = evaluate(*e.model, *e.data, {0, 4, 3}, *alone);
  const Evaluation second = evaluate(*e.model, *e.data, {0, 4, 3}, *alone);
  CHECK(first.loss == second.loss);
  REQUIRE(first.records.size() == second.records.size());
  for (size_t s = 0; s < first.records.size(); ++s) {
    CHECK(first.records[s].chosen_E == second.records[s].chosen_E);
    CHECK(first.records[s].entropy_sum == second.records[s].entropy_sum);
  }
}

TEST_CASE("the same run twice is bitwise the same, and another seed is not") {
  const std::string router = GENERATE("noisy_topk", "gshard");
  const Finished first = unstopped(tiny_experiment(router));
  check_same(unstopped(tiny_experiment(router)), first);
  CHECK_FALSE(bitwise_equal(unstopped(tiny_experiment(router, {"seed=4"})).state, first.state));
}

TEST_CASE("SGD, skipped experts and unfrozen training windows go on as well") {
  const std::vector<std::string> set{"optimizer.name=sgd", "optimizer.unused_experts=skip", "schedule.warmup_steps=5",
                                     "train.log_every=7"};
  const ScratchFolder folder;
  const Finished whole = unstopped(tiny_experiment("noisy_topk", set));
  WindowObserver windows(9);
  const Experiment e = tiny_experiment("noisy_topk", set);
  Trainer trainer = trainer_of(e, folder.path(), {&windows});
  CHECK(trainer.run() == Outcome::kStoppedByObserver);
  check_same(resumed(tiny_experiment("noisy_topk", set), load_latest(folder.path()), windows.windows), whole);
}

TEST_CASE("a checkpoint of another config is refused with the tensor, and nothing is changed") {
  const ScratchFolder folder;
  unstopped(tiny_experiment("switch"), folder.path());
  const Experiment other = tiny_experiment("switch", {"moe.experts=5"});
  const Tensors before = copies_of(other.model->parameters());
  Trainer trainer = trainer_of(other);
  std::string message;
  try {
    trainer.resume(load_latest(folder.path()));
  } catch (const Error& error) {
    message = error.what();
    CHECK(error.code() == ExitCode::kData);
  }
  CAPTURE(message);
  CHECK(message.find("tensor 'layers.0.moe.") != std::string::npos);
  CHECK(bitwise_equal(copies_of(other.model->parameters()), before));
}

}  // namespace
}  // namespace moelab::test
