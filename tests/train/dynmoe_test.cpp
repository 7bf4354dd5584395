// Training with DynMoE: experts go and come at the ends of windows, on all ranks alike, and no stop changes a bit.
#include "experiments/run_folder.h"
#include "tests/support/program.h"
#include "train_support.h"

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>

#include <set>
#include <sstream>

namespace moelab::test::dynmoe_run {
namespace {

// Windows are the steps 2 and 3, 6 and 7, 10 and 11. Experts 1 and 2 of the first layer start out of reach of any row.
Experiment dynmoe_experiment(std::vector<std::string> more = {}) {
  more.insert(more.begin(), {"schedule.decay=constant", "optimizer.weight_decay=0"});
  Experiment e = load_experiment(parse_config(R"(
seed = 3
[model]
layers = 2
width = 16
heads = 2
context = 12
[moe]
experts = 3
max_experts = 5
[moe.router]
name = "dynmoe"
window_start = 1
window_update = 3
window_period = 4
[moe.expert]
width = 8
[data]
name = "markov"
validation_documents = 6
[train]
steps = 12
batch = 4
log_every = 4
[optimizer]
lr = 0.01
)", "dynmoe.toml", more));
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : e.model->parameters())
    if (entry.name == "layers.0.moe.router.thresholds") entry.tensor.slice(0, 1, 3).fill_(5);
  return e;
}

// "layers.0.moe adds 1 at 2", in the order in which it happened.
class DynmoeLog : public Observer {
 public:
  void on_event(const std::string& site, const Event& event, int64_t step) override {
    const char* verb = event.kind == Event::Kind::kExpertAdded ? "adds" : "removes";
    all.push_back(fmt::format("{} {} {} at {}", site, verb, event.expert, step));
    steps.push_back(step);
    if (event.kind == Event::Kind::kExpertAdded) added.push_back(fmt::format("{} at {}", site, step));
  }
  std::vector<std::string> of_first_layer() const {
    std::vector<std::string> some;
    for (const std::string& one : all)
      if (one.starts_with("layers.0.")) some.push_back(one);
    return some;
  }
  std::vector<std::string> all, added;
  std::vector<int64_t> steps;
};

const std::string kWeights = "layers.0.moe.experts.w_in", kDirections = "layers.0.moe.router.weight";
const std::string kThresholds = "layers.0.moe.router.thresholds", kMask = "layers.0.moe.router.mask";

Tensors after_steps(int64_t steps, std::vector<Observer*> observers = {}) {
  return trained(dynmoe_experiment({fmt::format("train.steps={}", steps)}), std::move(observers));
}

TEST_CASE("3.10 experts that no row used are removed after the window, and the first inactive one is added") {
  DynmoeLog log;
  const Tensors start = after_steps(0), two = after_steps(2), three = after_steps(3, {&log}), six = after_steps(6);
  CHECK(log.of_first_layer() ==
        std::vector<std::string>{"layers.0.moe removes 1 at 2", "layers.0.moe removes 2 at 2", "layers.0.moe adds 1 at 2"});
  CHECK(at::equal(two.at(kMask), at::tensor({1.f, 1.f, 1.f, 0.f, 0.f})));
  CHECK(at::equal(three.at(kMask), at::tensor({1.f, 1.f, 0.f, 0.f, 0.f})));
  CHECK(at::equal(three.at(kWeights)[1], start.at(kWeights)[1]));  // what the slot held: never used, so never moved
  CHECK(three.at(kDirections)[1].norm().item<double>() == Catch::Approx(1).epsilon(1e-6));
  CHECK_FALSE(at::equal(three.at(kDirections)[1], two.at(kDirections)[1]));
  CHECK(three.at(kThresholds)[1].item<double>() == 0);
  for (const std::string& name : {kWeights, kDirections, kThresholds})
    for (const char* moment : {"m.", "v."}) {
      CAPTURE(name, moment);
      CHECK(three.at(moment + name)[1].abs().max().item<double>() == 0);
      CHECK(three.at(moment + name)[0].abs().max().item<double>() > 0);
      CHECK(six.at(moment + name)[1].abs().max().item<double>() > 0);
    }
  CHECK(two.at("m." + kDirections)[1].abs().max().item<double>() > 0);  // there was something to reset
  for (const std::string& name : {kWeights, kDirections, kThresholds}) CHECK(at::equal(six.at(name)[2], three.at(name)[2]));
}

TEST_CASE("3.10 C-DYN-2: every window adds one expert at most, also over many windows") {
  DynmoeLog log;
  after_steps(40, {&log});
  for (const int64_t step : log.steps) CHECK(step % 4 == 2);
  CHECK(log.added.size() > 1);
  CHECK(std::set(log.added.begin(), log.added.end()).size() == log.added.size());
}

TEST_CASE("5 a DynMoE run that is stopped at any step and resumed ends bitwise as unstopped") {
  for (const char* mode : {"train.micro_batches=1", "train.micro_batches=2", "train.precision=bf16", "train.recompute=true"}) {
    const std::vector<std::string> set{"checkpoint.every=1", "checkpoint.keep_last=20", mode};
    const ScratchFolder folder;
    DynmoeLog log;
    Trainer whole = trainer_of(dynmoe_experiment(set), folder.path(), {&log});
    whole.run();
    // So the checkpoints 1 to 3 lie where counting begins, inside the window, and after experts have gone and one has come.
    REQUIRE(log.of_first_layer().size() >= 3);
    CHECK(log.of_first_layer()[0] == "layers.0.moe removes 1 at 2");
    CHECK(log.of_first_layer()[2] == "layers.0.moe adds 1 at 2");
    for (int64_t step = 1; step < 12; ++step) {
      CAPTURE(mode, step);
      Trainer trainer = trainer_of(dynmoe_experiment(set));
      trainer.resume(load_checkpoint(fmt::format("{}/step-{}", folder.path(), step)));
      trainer.run();
      CHECK(bitwise_equal(state_of(trainer), state_of(whole)));
    }
  }
}

TEST_CASE("recomputed activations are not recorded twice") {
  CHECK(bitwise_equal(trained(dynmoe_experiment({"train.recompute=true"})), trained(dynmoe_experiment())));
}

TEST_CASE("3.10 two ranks, or two micro-batches, change the same experts at the same steps as one") {
  const auto make = [](int64_t micro_batches) {
    return dynmoe_experiment({"model.dtype=float64", fmt::format("train.micro_batches={}", micro_batches)});
  };
  DynmoeLog whole_log, cut_log;
  const Tensors whole = trained(make(1), {&whole_log});
  REQUIRE(whole_log.all.size() >= 3);
  CHECK(largest_error(trained(make(2), {&cut_log}), whole) <= 1e-11);
  CHECK(cut_log.all == whole_log.all);
  std::vector<Tensors> ranks(2);
  std::vector<DynmoeLog> logs(2);
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) {
    const auto rank = static_cast<size_t>(comm->rank());
    ranks[rank] = trained(make(1), {&logs[rank]}, comm);
  });
  CHECK(logs[0].all == whole_log.all);
  CHECK(logs[1].all == whole_log.all);
  CHECK(bitwise_equal(ranks[0], ranks[1]));
  CHECK(largest_error(ranks[0], whole) <= 1e-11);
}

TEST_CASE("experts that go and come are in events.jsonl, with their step, site and a note") {
  const ScratchFolder scratch;
  const auto folder = RunFolder::create(scratch / "run", "dynmoe", "0", 3, scratch.put("dynmoe.toml", ""), "");
  RecordWriter records(*folder);
  after_steps(4, {&records});
  std::istringstream text(text_of(folder->file("events.jsonl")));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) {
    const auto event = nlohmann::json::parse(line);
    if (event["details"].value("site", "") != "layers.0.moe") continue;
    CHECK(event["step"] == 3);
    CHECK(event["details"]["note"].get<std::string>().find("steps 2 to 3") != std::string::npos);
    lines.push_back(fmt::format("{} {}", event["event"].get<std::string>(), event["details"]["expert"].get<int64_t>()));
  }
  CHECK(lines == std::vector<std::string>{"expert_removed 1", "expert_removed 2", "expert_added 1"});
}

}  // namespace
}  // namespace moelab::test::dynmoe_run
