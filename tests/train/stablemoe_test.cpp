// StableMoE in training (spec/routers.md 3.5): what stands still after the switch, and resuming around it.
#include "tests/support/program.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

constexpr int64_t kSwitch = 5;  // of 12 steps

Experiment stable_experiment(const std::string& distilled, std::vector<std::string> more = {}) {
  const std::string router =
      fmt::format("name = \"stablemoe\"\nstage1_steps = {}\ndistilled = \"{}\"\ndistill_dim = 6", kSwitch, distilled);
  const std::string text = fmt::format(R"(
seed = 3
[model]
layers = 2
width = 16
heads = 2
context = 12
[moe]
experts = 4
[moe.router]
{}
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
weight_decay = 0.5
)", router);
  return load_experiment(parse_config(text, "stable.toml", more));
}

bool is_distilled(const std::string& name) {
  return name.find(".router.embedding") != std::string::npos || name.find(".router.distilled") != std::string::npos ||
         name.find(".router.taps") != std::string::npos;
}

// Everything of the distilled routers, their moments and counts of updates included.
Tensors distilled_part(Tensors state) {
  std::erase_if(state, [](const auto& entry) { return !is_distilled(entry.first); });
  return state;
}

// Which experts each id goes to, in evaluation as by the router of a step.
std::vector<Tensor> stable_routes(const Model& model, int64_t step) {
  const at::NoGradGuard no_grad;
  Batch batch;
  batch.tokens_BL = at::arange(12, at::kLong).unsqueeze(0);
  batch.targets_BL = batch.tokens_BL;
  StepContext context;
  context.mode = Mode::kEval;
  context.step = step;
  std::vector<Tensor> choices;
  for (const SiteResult& site : model.forward(batch, context).sites) choices.push_back(site.assignment.choice_TK);
  return choices;
}

// The distilled part of the model's parameters and the routes of all ids, after every step; and the events.
class StableObserver : public Observer {
 public:
  explicit StableObserver(const Model& model) : model_(model) {}
  Request on_step(const StepView& view) override {
    parameters.push_back(distilled_part(copies_of(model_.parameters())));
    chosen.push_back(stable_routes(model_, view.step + 1));
    weights.push_back(view.model.trainable().size());
    terms.push_back(view.result.terms);
    return Request::kNone;
  }
  void on_event(const std::string& site, const Event& event, int64_t step) override {
    if (event.kind == Event::Kind::kFreeze) frozen.emplace_back(site, step);
  }
  std::vector<Tensors> parameters;
  std::vector<std::vector<Tensor>> chosen;
  std::vector<size_t> weights;
  std::vector<std::vector<std::vector<TermReading>>> terms;
  std::vector<std::pair<std::string, int64_t>> frozen;

 private:
  const Model& model_;
};

TEST_CASE("the distilled router and its moments are bitwise constant in stage 2, with momentum and decay; W goes on learning") {
  const std::string distilled = GENERATE("word", "cnn"), optimizer = GENERATE("adamw", "sgd");
  CAPTURE(distilled, optimizer);
  const ScratchFolder folder;
  const Experiment e =
      stable_experiment(distilled, {"optimizer.name=" + optimizer, "checkpoint.every=1", "checkpoint.keep_last=20"});
  StableObserver seen(*e.model);
  Trainer trainer = trainer_of(e, folder.path(), {&seen});
  trainer.run();
  REQUIRE(seen.parameters.size() == 12);
  for (size_t step = 1; step < 12; ++step) {
    CAPTURE(step);
    const bool still = step >= static_cast<size_t>(kSwitch);
    CHECK(bitwise_equal(seen.parameters[step], seen.parameters[step - 1]) == still);
    if (!still) continue;
    for (size_t site = 0; site < 2; ++site) CHECK(at::equal(seen.chosen[step][site], seen.chosen[step - 1][site]));
  }
  const std::vector<std::pair<std::string, int64_t>> expected{{"layers.0.moe", kSwitch - 1}, {"layers.1.moe", kSwitch - 1}};
  CHECK(seen.frozen == expected);

  const Experiment at_switch = stable_experiment(distilled, {"optimizer.name=" + optimizer});
  const Tensors start = copies_of(at_switch.model->parameters());
  Trainer earlier = trainer_of(at_switch);
  earlier.resume(load_checkpoint(fmt::format("{}/step-{}", folder.path(), kSwitch)));
  const Tensors before = state_of(earlier), after = state_of(trainer);
  CHECK(bitwise_equal(distilled_part(after), distilled_part(before)));
  CHECK(before.at("m.layers.0.moe.router.distilled").abs().max().item<double>() > 0);  // momentum that would have moved it
  CHECK_FALSE(at::equal(before.at("layers.0.moe.router.distilled"), start.at("layers.0.moe.router.distilled")));
  CHECK_FALSE(at::equal(after.at("layers.0.moe.router.weight"), before.at("layers.0.moe.router.weight")));
}

TEST_CASE("the losses of StableMoE are there in stage 1 and 0 in stage 2, over micro-batches too") {
  const std::string micro = GENERATE("train.micro_batches=1", "train.micro_batches=2");
  const Experiment e = stable_experiment("word", {micro});
  StableObserver seen(*e.model);
  trained(e, {&seen});
  for (size_t step = 0; step < 12; ++step)
    for (const std::vector<TermReading>& site : seen.terms[step]) {
      REQUIRE(site.size() == 2);
      const bool first = step < static_cast<size_t>(kSwitch);
      CHECK((site[1].value > 0) == first);
      CHECK((site[0].value != 0) == first);
      CHECK(std::abs(site[1].weighted - site[1].value / 48) < 1e-12);  // a sum, per target token of the step: 4 · 12
    }
}

TEST_CASE("stopped at S1 - 1, S1 or S1 + 1 and resumed, a StableMoE run ends bitwise as unstopped") {
  const std::string distilled = GENERATE("word", "cnn"),
                    mode = GENERATE("train.micro_batches=1", "train.micro_batches=2", "train.recompute=true");
  CAPTURE(distilled, mode);
  const std::vector<std::string> set{mode, "checkpoint.every=1", "checkpoint.keep_last=20", "moe.router.eval_router=main"};
  const ScratchFolder folder;
  const Experiment e = stable_experiment(distilled, set);
  Trainer whole = trainer_of(e, folder.path());
  whole.run();
  for (const int64_t step : {kSwitch - 1, kSwitch, kSwitch + 1}) {
    CAPTURE(step);
    const Checkpoint checkpoint = load_checkpoint(fmt::format("{}/step-{}", folder.path(), step));
    CHECK((checkpoint.content.state.at("frozen").size() > 0) == (step >= kSwitch));
    const Experiment again = stable_experiment(distilled, set);
    Trainer trainer = trainer_of(again);
    trainer.resume(checkpoint);
    for (const NamedTensor& entry : again.model->parameters())
      CHECK(entry.tensor.requires_grad() == (step < kSwitch || !is_distilled(entry.name)));
    trainer.run();
    CHECK(bitwise_equal(state_of(trainer), state_of(whole)));
    CHECK(trainer.last_evaluation().loss == whole.last_evaluation().loss);
  }
}

TEST_CASE(
    "after the switch everybody routes by the distilled router: by the step, and by the checkpoint where no step is known") {
  const ScratchFolder folder;
  const std::vector<std::string> set{"moe.router.eval_router=main"};
  const Experiment e = stable_experiment("word", set);
  const std::vector<Tensor> by_main = stable_routes(*e.model, 0), by_step = stable_routes(*e.model, kSwitch);
  CHECK_FALSE(at::equal(by_main[0], by_step[0]));
  trainer_of(e, folder.path()).run();
  const Experiment loaded = stable_experiment("word", set);
  restore_model(load_latest(folder.path()), *loaded.model);
  const std::vector<Tensor> without_step = stable_routes(*loaded.model, 0), with_step = stable_routes(*loaded.model, 12);
  for (size_t site = 0; site < 2; ++site) CHECK(at::equal(without_step[site], with_step[site]));
}

TEST_CASE("a model with the convolution decodes token by token as its full forward pass") {
  const Experiment e = stable_experiment("cnn");
  shake(*e.model);
  trained(e);
  const at::NoGradGuard no_grad;
  Batch batch;
  batch.tokens_BL = at::arange(20, at::kLong).mul(7).remainder(11).view({2, 10});
  batch.targets_BL = batch.tokens_BL;
  StepContext context;
  context.mode = Mode::kEval;
  const Tensor whole_BLV = e.model->forward(batch, context).logits_BLV;
  DecodeState state;
  for (int64_t l = 0; l < 10; ++l) {
    const Tensor next_BV = e.model->decode(batch.tokens_BL.slice(1, l, l + 1), state);
    const Tensor expected_BV = whole_BLV.select(1, l);
    CHECK((next_BV - expected_BV).abs().max().item<double>() < 1e-4 * expected_BV.abs().max().item<double>());
  }
}

}  // namespace
}  // namespace moelab::test
