// Probe: a router that adds an expert after step 2 and removes one after step 5. The trainer makes the new one, its moments
// start at zero, a masked one does not move, and a run that is saved and resumed between is the unstopped one bit for bit.
#include "core/linear_router.h"
#include "experiments/experiment.h"
#include "tests/support/program.h"
#include "trainers/trainer.h"

#include <ATen/ATen.h>

#include <catch2/catch_test_macros.hpp>

using namespace moelab;

namespace {

const char* const kSurgeryExperiment = R"(
[model]
layers = 1
width = 8
heads = 2
context = 6
[moe]
experts = 3
max_experts = 4
[moe.router]
name = "surgery_probe"
[moe.expert]
width = 4
[data]
name = "markov"
[train]
steps = 9
batch = 4
[checkpoint]
every = 1
keep_last = 20
)";

constexpr int64_t kAdded = 3, kRemoved = 1, kSource = 0;

// Top-2 of a linear router; buffer `mask` says who is there.
class SurgeryRouter : public LinearRouter {
 public:
  explicit SurgeryRouter(const RouterSpec& spec)
      : LinearRouter(spec, at::randn({spec.max_experts, spec.width}).mul(0.5), {.kind = NoiseSpec::Kind::kNone}) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    return route_topk(in, score(in), 2, SoftmaxOver::kChosen);
  }

  std::vector<Event> end_step(const std::map<std::string, Tensor>&, int64_t step) override {
    if (step != 2 && step != 5) return {};
    mask_E_[step == 2 ? kAdded : kRemoved] = step == 2 ? 1 : 0;
    if (step == 5) return {{Event::Kind::kExpertRemoved, kRemoved, -1, {}, ""}};
    weight_ED_.detach()[kAdded].copy_(weight_ED_.detach()[kSource]).add_(0.01);
    return {{Event::Kind::kExpertAdded, kAdded, kSource, {}, ""}};
  }
};

const Registration<RouterEntry> surgery_registration{{
    .name = "surgery_probe",
    .title = "",
    .citation = "",
    .equation = "",
    .facts = {.stateful = true, .fixed_k = 2},
    .make = [](const RouterSpec& spec) { at::manual_seed(4); return std::make_unique<SurgeryRouter>(spec); },
}};

using Snapshot = std::map<std::string, Tensor>;

Snapshot snapshot_of(const Trainer& trainer) {
  Snapshot all;
  for (const auto& list : {trainer.model().parameters(), trainer.model().buffers(), trainer.optimizer().state()})
    for (const NamedTensor& entry : list) all[entry.name] = entry.tensor.detach().clone();
  return all;
}

Trainer surgery_trainer(int64_t steps, const std::string& checkpoints, std::vector<Observer*> observers = {}) {
  const Experiment e = load_experiment(parse_config(kSurgeryExperiment, "surgery.toml", {"schedule.decay=constant"}));
  TrainSettings settings = e.train;
  settings.steps = steps;
  return Trainer(settings, e.model, e.data, single_comm(), checkpoints, std::move(observers));
}

Snapshot after(int64_t steps, const std::string& checkpoints = "", std::vector<Observer*> observers = {}) {
  Trainer trainer = surgery_trainer(steps, checkpoints, std::move(observers));
  trainer.run();
  return snapshot_of(trainer);
}

const std::string kStacked = "layers.0.moe.experts.w_in", kRows = "layers.0.moe.router.weight";

struct EventLog : Observer {
  std::vector<int64_t> steps, experts;
  void on_event(const std::string&, const Event& event, int64_t step) override {
    steps.push_back(step), experts.push_back(event.expert);
  }
};

}  // namespace

TEST_CASE("an added expert starts from its source with moments of zero, and one that is masked never moves") {
  EventLog log;
  const Snapshot start = after(0), two = after(2), three = after(3, "", {&log}), five = after(5), six = after(6), nine = after(9);
  CHECK(log.steps == std::vector<int64_t>{2});
  CHECK(log.experts == std::vector<int64_t>{kAdded});
  CHECK(at::equal(two.at(kStacked)[kAdded], start.at(kStacked)[kAdded]));
  CHECK(at::equal(three.at(kStacked)[kAdded], three.at(kStacked)[kSource]));
  for (const char* moment : {"m.", "v."}) {
    CHECK(three.at(moment + kStacked)[kAdded].abs().max().item<double>() == 0);
    CHECK(three.at(moment + kRows)[kAdded].abs().max().item<double>() == 0);
    CHECK(three.at(moment + kStacked)[kSource].abs().max().item<double>() > 0);
  }
  CHECK_FALSE(at::equal(five.at(kStacked)[kAdded], three.at(kStacked)[kAdded]));
  for (const std::string& name : {kStacked, kRows, "m." + kStacked}) {
    CAPTURE(name);
    CHECK_FALSE(at::equal(six.at(name)[kRemoved], five.at(name)[kRemoved]));
    CHECK(at::equal(nine.at(name)[kRemoved], six.at(name)[kRemoved]));
  }
}

TEST_CASE("a run with surgery, saved and resumed at any step, ends bitwise as unstopped") {
  const test::ScratchFolder folder;
  const Snapshot whole = after(9, folder.path());
  for (int64_t step = 1; step < 9; ++step) {
    Trainer trainer = surgery_trainer(9, "");
    trainer.resume(load_checkpoint(folder / ("step-" + std::to_string(step))));
    trainer.run();
    for (const auto& [name, tensor] : snapshot_of(trainer)) {
      CAPTURE(step, name);
      CHECK(at::equal(tensor, whole.at(name)));
    }
  }
}
