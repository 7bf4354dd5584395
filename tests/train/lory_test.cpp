// Lory's dense warm-up as training sees it: one expert at first, then copies of it, and nothing is lost on the way.
#include "tests/support/program.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>

namespace moelab::test {
namespace {

constexpr int64_t kWarmupSteps = 4;

Experiment lory_experiment(int64_t steps, std::vector<std::string> more = {}) {
  const std::string text = fmt::format(R"(
seed = 3
[model]
layers = 2
width = 16
heads = 2
context = 12
dtype = "float64"
[moe]
experts = 4
[moe.router]
name = "lory"
segment_length = 4
warmup_steps = {}
[moe.expert]
width = 8
[data]
name = "markov"
validation_documents = 4
[train]
steps = {}
batch = 4
[optimizer]
lr = 0.01
[schedule]
decay = "constant"
)", kWarmupSteps, steps);
  return load_experiment(parse_config(text, "lory.toml", more));
}

Tensor logits_of_batch(const Model& model) {
  Batch batch;
  batch.tokens_BL = at::arange(36, at::kLong).mul(7).remainder(11).view({3, 12});
  StepContext context;
  context.mode = Mode::kEval;
  return model.forward(batch, context).logits_BLV.detach();
}

double farthest(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

// Of every stacked parameter of the experts: the largest distance between expert 0 and any other.
double distance_between_experts(const Tensors& state, const std::string& prefix = "") {
  double most = 0;
  for (const auto& [name, tensor] : state)
    if (name.starts_with(prefix + "layers.") && name.find(".moe.experts.") != std::string::npos)
      most = std::max(most, farthest(tensor, tensor.slice(0, 0, 1).expand_as(tensor)));
  return most;
}

struct EventCounter : Observer {
  std::map<int64_t, std::vector<std::pair<int64_t, int64_t>>> copies_at;  // step → (expert, source)
  int64_t stages = 0;
  void on_event(const std::string&, const Event& event, int64_t step) override {
    if (event.kind == Event::Kind::kStageChanged) ++stages;
    else copies_at[step].push_back({event.expert, event.source});
  }
};

TEST_CASE("during lory's warm-up the model is dense: only expert 0 gets gradients, the router none") {
  const Experiment e = lory_experiment(kWarmupSteps - 1);
  const Tensors before = copies_of(e.model->parameters());
  const Tensors after = trained(e);
  for (const std::string layer : {"layers.0.moe.", "layers.1.moe."}) {
    CHECK(farthest(after.at(layer + "router.weight"), before.at(layer + "router.weight")) == 0);
    for (const char* moment : {"m.", "v."}) {
      CHECK(after.at(moment + layer + "experts.w_in")[0].abs().max().item<double>() > 0);
      CHECK(after.at(moment + layer + "experts.w_in").slice(0, 1).abs().max().item<double>() == 0);
    }
    CHECK(after.at(layer + "router.dense").item<double>() == 1);
  }
}

TEST_CASE("lory (spec 3.8): the switch from dense to experts preserves the function, and copies parameters and moments") {
  const Experiment e = lory_experiment(kWarmupSteps);
  shake(*e.model);
  EventCounter events;
  const Tensors state = trained(e, {&events});
  CHECK(events.stages == 2);
  REQUIRE(events.copies_at.size() == 1);
  CHECK(events.copies_at.at(kWarmupSteps - 1).size() == 6);  // two layers
  for (const char* prefix : {"", "m.", "v."}) CHECK(distance_between_experts(state, prefix) == 0);
  CHECK(state.at("m.layers.0.moe.experts.w_in").abs().max().item<double>() > 0);
  const Tensor switched = logits_of_batch(*e.model);
  for (const NamedTensor& buffer : e.model->buffers())
    if (buffer.name.ends_with(".dense")) buffer.tensor.fill_(1);
  const Tensor dense = logits_of_batch(*e.model);
  CHECK(farthest(switched, dense) <= 1e-12 * dense.abs().max().item<double>());
}

TEST_CASE("lory (spec 3.8): ten steps after the switch the experts differ") {
  const Tensors state = trained(lory_experiment(kWarmupSteps + 10));
  CHECK(distance_between_experts(state) > 1e-4);
}

TEST_CASE("a run with lory's warm-up, stopped after any step and resumed, ends bitwise as unstopped") {
  for (const std::string mode : {"train.micro_batches=1", "train.micro_batches=2"}) {
    CAPTURE(mode);
    const std::vector<std::string> set{"checkpoint.every=1", "checkpoint.keep_last=20", mode};
    const ScratchFolder folder;
    EventCounter events;
    Trainer whole = trainer_of(lory_experiment(kWarmupSteps + 4, set), folder.path(), {&events});
    whole.run();
    REQUIRE(events.copies_at.count(kWarmupSteps - 1) == 1);  // the checkpoints lie on both sides of the end of the warm-up
    const Tensors expected = state_of(whole);
    for (int64_t step = 1; step < kWarmupSteps + 4; ++step) {
      CAPTURE(step);
      Trainer trainer = trainer_of(lory_experiment(kWarmupSteps + 4, set));
      trainer.resume(load_checkpoint(fmt::format("{}/step-{}", folder.path(), step)));
      trainer.run();
      CHECK(bitwise_equal(state_of(trainer), expected));
    }
  }
}

}  // namespace
}  // namespace moelab::test
