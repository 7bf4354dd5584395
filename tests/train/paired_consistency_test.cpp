// THOR's objective, spec/routers.md 3.7: the divergence by hand, what is reported, and that it trains like any other objective.
#include "tests/support/program.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

// Gives the logits of its pass, whatever the batch.
class PassModel : public Model {
 public:
  explicit PassModel(std::vector<Tensor> logits_of_pass) : logits_(std::move(logits_of_pass)) {}
  ModelOutput forward(const Batch&, const StepContext& context) const override {
    return {logits_.at(static_cast<size_t>(context.pass)), {}};
  }
  Tensor decode(const Tensor&, DecodeState&) const override { return {}; }
  std::vector<Site*> sites() const override { return {}; }
  int64_t context() const override { return 1; }
  int64_t active_parameters() const override { return 0; }
  double flops_per_token() const override { return 0; }

 private:
  std::vector<Tensor> logits_;
};

std::unique_ptr<Objective> paired(double alpha = 1, int64_t passes = 2) {
  const OptionSpecs& specs = Registry<ObjectiveEntry>::instance().find("paired_consistency").options;
  Options options(specs);
  for (const OptionSpec& spec : specs) options.set(spec, spec.name == "alpha" ? OptionValue(alpha) : OptionValue(passes));
  return make_objective("paired_consistency", options);
}

// One sequence whose positions have the logits of `rows`.
Tensor logits_of(const std::vector<double>& probabilities) {
  return at::tensor(probabilities, at::kDouble).log().view({1, 1, -1});
}

Batch targets(const std::vector<int64_t>& targets_L) {
  const Tensor row_1L = at::tensor(targets_L, at::kLong).unsqueeze(0);
  Batch batch;
  batch.tokens_BL = at::zeros_like(row_1L);
  batch.targets_BL = row_1L;
  return batch;
}

ObjectiveOutput outcome(const std::vector<Tensor>& logits, const Batch& batch, double alpha = 1) {
  return paired(alpha, static_cast<int64_t>(logits.size()))->compute(PassModel(logits), batch, {});
}

double divergence(const Tensor& a, const Tensor& b) { return outcome({a, b}, targets({0})).metrics.at("consistency"); }

const std::vector<double> kP{.7, .2, .1}, kQ{.5, .3, .2}, kR{.2, .2, .6};

// ½ Σ (p - q)(ln p - ln q), and both directions apart.
double by_loops(const std::vector<double>& p, const std::vector<double>& q) {
  double forwards = 0, backwards = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    forwards += p[v] * std::log(p[v] / q[v]);
    backwards += q[v] * std::log(q[v] / p[v]);
  }
  return (forwards + backwards) / 2;
}

TEST_CASE("3.7 oracle: the divergence of (.7,.2,.1) and (.5,.3,.2) is 0.088578, symmetric, and 0 for equal passes only") {
  CHECK(std::abs(divergence(logits_of(kP), logits_of(kQ)) - 0.088578) < 5e-7);
  CHECK(std::abs(divergence(logits_of(kP), logits_of(kQ)) - by_loops(kP, kQ)) < 1e-12);
  CHECK(divergence(logits_of(kQ), logits_of(kP)) == divergence(logits_of(kP), logits_of(kQ)));
  CHECK(divergence(logits_of(kP), logits_of(kP)) == 0);
  CHECK(divergence(logits_of(kP), logits_of(kP) + 1e-4 * at::arange(3, at::kDouble)) > 0);
  CHECK(divergence(logits_of(kP), logits_of(kP) + 3) < 1e-15);  // the same distribution
}

TEST_CASE("3.7 the divergence of vanishing probabilities is finite, with a finite gradient") {
  const Tensor far = at::tensor({-1e4, 0.0, 5.0}, at::kFloat).view({1, 1, 3}).requires_grad_(true);
  const ObjectiveOutput out = outcome({far, -far}, targets({1}));
  CHECK(std::isfinite(out.metrics.at("consistency")));
  out.loss_sum.backward();
  CHECK(far.grad().isfinite().all().item<bool>());
}

TEST_CASE("3.7 the loss is the passes' cross entropies and alpha times the divergence; the task loss is their mean") {
  const Tensor first = at::cat({logits_of(kP), logits_of(kQ), logits_of(kR)}, 1);
  const Tensor second = at::cat({logits_of(kQ), logits_of(kR), logits_of(kP)}, 1);
  const ObjectiveOutput out = outcome({first, second}, targets({2, -1, 0}), 5);  // the middle position is nobody's target
  const double task = -(std::log(.1) + std::log(.2) + std::log(.2) + std::log(.7)), apart = by_loops(kP, kQ) + by_loops(kR, kP);
  CHECK(std::abs(out.task_sum - task / 2) < 1e-12);
  CHECK(std::abs(out.metrics.at("consistency") - apart) < 1e-12);
  CHECK(std::abs(out.loss_sum.item<double>() - (task + 5 * apart)) < 1e-12);
  CHECK(outcome({first, second}, targets({-1, -1, -1})).loss_sum.item<double>() == 0);
}

TEST_CASE("three passes agree pair by pair, in the mean") {
  const ObjectiveOutput out = outcome({logits_of(kP), logits_of(kQ), logits_of(kR)}, targets({0}));
  CHECK(std::abs(out.metrics.at("consistency") - (by_loops(kP, kQ) + by_loops(kP, kR) + by_loops(kQ, kR)) / 3) < 1e-12);
  CHECK(std::abs(out.task_sum + (std::log(.7) + std::log(.5) + std::log(.2)) / 3) < 1e-12);
  CHECK(out.passes.size() == 3);
}

TEST_CASE("3.7 no side of the divergence is cut off: its gradient is that of central differences in both passes") {
  std::vector<Tensor> logits{logits_of(kP).requires_grad_(true), logits_of(kR).requires_grad_(true)};
  outcome(logits, targets({1}), 2).loss_sum.backward();
  const at::NoGradGuard no_grad;
  for (const Tensor& leaf : logits)
    for (int64_t v = 0; v < 3; ++v) {
      const Tensor entry = leaf[0][0][v];
      entry.add_(1e-5);
      const double above = outcome(logits, targets({1}), 2).loss_sum.item<double>();
      entry.sub_(2e-5);
      const double below = outcome(logits, targets({1}), 2).loss_sum.item<double>();
      entry.add_(1e-5);
      CHECK(std::abs(leaf.grad()[0][0][v].item<double>() - (above - below) / 2e-5) < 1e-8);
    }
}

Experiment thor_experiment(std::vector<std::string> more = {}) {
  const std::string text = R"(
seed = 3
[model]
layers = 2
width = 16
heads = 2
context = 12
[moe]
experts = 4
[moe.router]
name = "thor"
[moe.expert]
width = 8
[data]
name = "markov"
validation_documents = 6
[train]
steps = 12
batch = 4
log_every = 4
[objective]
name = "paired_consistency"
alpha = 2.0
[optimizer]
lr = 0.01
)";
  return load_experiment(parse_config(text, "thor.toml", std::move(more)));
}

struct PairedStep {
  StepResult result;
  Tensors gradients;
};

PairedStep step_on(const Experiment& e, Comm& comm, int64_t micro_batches, bool recompute = false) {
  StepContext context;
  context.comm = &comm;
  context.seed = 3;
  context.recompute = recompute;
  std::vector<Batch> batches;
  const int64_t count = 8 / (comm.size() * micro_batches);
  for (int64_t m = 0; m < micro_batches; ++m)
    batches.push_back(with_lengths(e.data->train_batch(3, 0, (comm.rank() * micro_batches + m) * count, count, 8)));
  e.model->zero_grad();
  PairedStep out{compute_step(*e.model, *make_objective(e.train.objective, e.train.objective_options), batches, context, false),
                 {}};
  out.gradients = gradients_of(*e.model);
  return out;
}

TEST_CASE("3.7 with one expert and no dropout the divergence is exactly 0; with distinct experts it is not") {
  const Experiment one = thor_experiment({"moe.experts=1"}), four = thor_experiment({"moe.router.pair=distinct"});
  for (const Experiment* e : {&one, &four}) shake(*e->model);
  const StepResult alone = step_on(one, *single_comm(), 1).result, several = step_on(four, *single_comm(), 1).result;
  CHECK(alone.metrics.at("consistency") == 0);
  CHECK(alone.total_loss == 2 * alone.task_loss);
  CHECK(several.metrics.at("consistency") > 1e-4);
  CHECK(std::abs(several.total_loss - 2 * several.task_loss - 2 * several.metrics.at("consistency")) < 1e-5);
}

TEST_CASE("3.7 the same seed selects the same on any number of micro-batches and ranks: a step of two passes equals itself") {
  const std::string granularity = GENERATE("batch", "sequence", "position", "token");
  const std::string pair = GENERATE("independent", "distinct");
  const auto make = [&] {
    Experiment e = thor_experiment({"model.dtype=float64", "moe.router.granularity=" + granularity, "moe.router.pair=" + pair});
    shake(*e.model);
    return e;
  };
  CAPTURE(granularity, pair);
  const PairedStep whole = step_on(make(), *single_comm(), 1);
  const auto same = [&](const PairedStep& cut) {
    return largest_error(cut.gradients, whole.gradients) <= 1e-11 &&
           cut.result.records[1].chosen_E == whole.result.records[1].chosen_E &&
           std::abs(cut.result.metrics.at("consistency") - whole.result.metrics.at("consistency")) < 1e-11 &&
           std::abs(cut.result.total_loss - whole.result.total_loss) < 1e-11;
  };
  CHECK(same(step_on(make(), *single_comm(), 4)));
  std::vector<PairedStep> ranks(2);
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) {
    ranks[static_cast<size_t>(comm->rank())] = step_on(make(), *comm, 2);
  });
  for (const PairedStep& rank : ranks) CHECK(same(rank));
  CHECK(whole.result.records[0].rows == 2 * 8 * 12);
}

TEST_CASE("recomputing activations changes no bit of a step of two passes") {
  const Experiment e = thor_experiment({"moe.router.granularity=token"});
  shake(*e.model);
  const PairedStep kept = step_on(e, *single_comm(), 2);
  CHECK(bitwise_equal(step_on(e, *single_comm(), 2, /*recompute=*/true).gradients, kept.gradients));
}

// What a run leaves behind, its metrics among it.
struct PairedRun {
  Tensors state;
  std::map<std::string, double> window;
};

PairedRun run_of(const Experiment& e, const std::string& checkpoints, const Checkpoint* from = nullptr) {
  Trainer trainer = trainer_of(e, checkpoints);
  if (from != nullptr) trainer.resume(*from);
  trainer.run();
  return {state_of(trainer), trainer.last_window().metrics()};
}

TEST_CASE("a run with two passes resumes bitwise, with its metric") {
  const std::string mode = GENERATE("train.batch=4", "train.micro_batches=2", "train.precision=bf16", "train.recompute=true");
  CAPTURE(mode);
  const auto make = [&] { return thor_experiment({mode, "checkpoint.every=1", "checkpoint.keep_last=20", "model.layers=1"}); };
  const ScratchFolder folder;
  const PairedRun whole = run_of(make(), folder.path());
  CHECK(whole.window.at("consistency") >= 0);
  for (const int64_t step : {1, 6, 11}) {
    const Checkpoint checkpoint = load_checkpoint(fmt::format("{}/step-{}", folder.path(), step));
    const PairedRun resumed = run_of(make(), "", &checkpoint);
    CHECK(bitwise_equal(resumed.state, whole.state));
    CHECK(resumed.window.at("consistency") == whole.window.at("consistency"));
    CHECK(resumed.window.at("loss") == whole.window.at("loss"));
  }
}

TEST_CASE("evaluation by averaged parameters and by ensemble runs beside training and is reported") {
  const std::string inference = GENERATE("averaged", "ensemble", "fixed", "random");
  const Experiment e = thor_experiment({"moe.router.inference=" + inference, "train.steps=2", "eval.every=1"});
  Trainer trainer = trainer_of(e);
  trainer.run();
  CHECK(std::isfinite(trainer.last_evaluation().loss));
  CHECK(trainer.last_evaluation().records[0].chosen_E.empty() == (inference == "averaged"));
}

std::string refusal(const std::vector<std::string>& set) {
  try {
    thor_experiment(set);
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "accepted";
}

TEST_CASE("[objective] and [train] objective name it; its options are checked, and dropped with another name") {
  const Experiment e = thor_experiment({"objective.passes=3"});
  CHECK(e.train.objective == "paired_consistency");
  CHECK(e.train.objective_options.real("alpha") == 2);
  CHECK(e.train.objective_options.integer("passes") == 3);
  CHECK(thor_experiment({"objective.name=task"}).train.objective == "task");
  CHECK(tiny_experiment("random", {"train.objective=paired_consistency"}).train.objective_options.real("alpha") == 1);
  CHECK(refusal({"train.objective=paired_consistency"}) == "accepted");
  CHECK(refusal({"train.objective=task"}).find("say it in one place") != std::string::npos);
  CHECK(refusal({"objective.passes=1"}).find("passes") != std::string::npos);
  CHECK(refusal({"objective.beta=1"}).find("unknown key 'beta'") != std::string::npos);
  CHECK(refusal({"objective.name=paired"}).find("nothing is named 'paired'") != std::string::npos);
}

}  // namespace
}  // namespace moelab::test
