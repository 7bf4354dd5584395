// What a step computes does not depend on how it is cut into micro-batches and ranks, and equals plain loops.
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

constexpr int64_t kBatch = 8;

struct StepCut {
  int ranks = 1;
  int64_t micro_batches = 1;
};

struct StepOutcome {
  StepResult result;
  Tensors gradients;
};

// Sequence s keeps 12 - 3·(s mod 5) tokens: the last of five is empty.
Batch ragged(Batch batch) {
  batch.length_B = (12 - batch.sequence_B.remainder(5) * 3).contiguous();
  const Tensor past_BL = at::arange(12, at::kLong).unsqueeze(0).ge(batch.length_B.unsqueeze(1));
  batch.targets_BL = batch.targets_BL.masked_fill(past_BL, -1);
  return batch;
}

std::vector<Batch> batches_of(const Experiment& e, int rank, StepCut cut, bool padded) {
  const int64_t count = kBatch / (cut.ranks * cut.micro_batches);
  std::vector<Batch> batches;
  for (int64_t m = 0; m < cut.micro_batches; ++m) {
    Batch batch = with_lengths(e.data->train_batch(3, 0, (rank * cut.micro_batches + m) * count, count, kBatch));
    batches.push_back(padded ? ragged(batch) : batch);
  }
  return batches;
}

StepOutcome step_on(const Experiment& e, const std::vector<Batch>& batches, Comm& comm, bool recompute = false) {
  StepContext context;
  context.comm = &comm;
  context.seed = 3;
  context.recompute = recompute;
  e.model->zero_grad();
  StepOutcome out{compute_step(*e.model, *make_objective("task"), batches, context, false), {}};
  out.gradients = gradients_of(*e.model);
  return out;
}

// Every rank builds the model anew; the outcome is rank 0's, and all ranks must agree.
StepOutcome step_of(const std::function<Experiment()>& make, StepCut cut, bool padded = false) {
  std::vector<StepOutcome> outcomes(static_cast<size_t>(cut.ranks));
  run_on_threads(cut.ranks, [&](std::shared_ptr<Comm> comm) {
    const Experiment e = make();
    shake(*e.model);
    outcomes[static_cast<size_t>(comm->rank())] = step_on(e, batches_of(e, comm->rank(), cut, padded), *comm);
  });
  for (const StepOutcome& other : outcomes) REQUIRE(bitwise_equal(other.gradients, outcomes[0].gradients));
  return outcomes[0];
}

void check_equal(const StepOutcome& a, const StepOutcome& b, double bound) {
  CHECK(far(a.result.task_loss, b.result.task_loss) <= bound);
  CHECK(far(a.result.total_loss, b.result.total_loss) <= bound);
  CHECK(a.result.target_tokens == b.result.target_tokens);
  CHECK(largest_error(a.gradients, b.gradients) <= bound);
  for (size_t s = 0; s < b.result.records.size(); ++s) {
    CHECK(a.result.records[s].chosen_E == b.result.records[s].chosen_E);
    CHECK(a.result.records[s].accepted_E == b.result.records[s].accepted_E);
    CHECK(a.result.records[s].rows == b.result.records[s].rows);
    CHECK(far(a.result.records[s].entropy_sum, b.result.records[s].entropy_sum) <= bound);
    for (size_t t = 0; t < b.result.terms[s].size(); ++t)
      CHECK(far(a.result.terms[s][t].value, b.result.terms[s][t].value) <= bound);
  }
}

struct RoutedCase {
  std::string router;
  std::string losses = "";
  std::vector<std::string> set = {};
};

const char* const kAllLosses = R"(
[[loss]]
name = "balance"
coefficient = 0.3
[[loss]]
name = "importance"
coefficient = 0.2
[[loss]]
name = "z"
coefficient = 0.1
)";

RoutedCase independent_case() {
  return GENERATE(
      RoutedCase{"noisy_topk"}, RoutedCase{"softmax_topk", kAllLosses},
      RoutedCase{"softmax_topk", "", {"moe.router.softmax=after"}}, RoutedCase{"switch", "", {"moe.router.k=1"}},
      RoutedCase{"gshard"}, RoutedCase{"gshard", "", {"moe.router.second_expert=gumbel"}},
      RoutedCase{"stablemoe", "[[loss]]\nname = \"distillation\"\n"},
      RoutedCase{"stablemoe", "[[loss]]\nname = \"distillation\"\nscope = \"sequence\"\n"}, RoutedCase{"frozen"},
      RoutedCase{"random"}, RoutedCase{"uniform"},
      RoutedCase{"switch", "", {"moe.capacity.mode=factor", "moe.capacity.scope=sequence", "moe.capacity.factor=0.8"}});
}

TEST_CASE("a classifier's step equals itself cut into micro-batches and thread ranks, in float64") {
  const std::string model = GENERATE("patches", "mlp");
  const RoutedCase routed = GENERATE(
      RoutedCase{"softmax_topk", kAllLosses}, RoutedCase{"vmoe"}, RoutedCase{"soft_moe"}, RoutedCase{"smear"},
      RoutedCase{"expert_choice", "", {"moe.capacity.mode=factor", "moe.capacity.scope=sequence"}},
      RoutedCase{"softmax_topk", "[[loss]]\nname = \"balance\"\ncoefficient = 0.3\nscope = \"sequence\"\n"});
  CAPTURE(model, routed.router);
  const auto make = [&] {
    std::vector<std::string> set = routed.set;
    set.push_back("model.dtype=float64");
    return tiny_classifier(model, routed.router, set, routed.losses);
  };
  const StepOutcome whole = step_of(make, {});
  CHECK(whole.result.target_tokens == kBatch);
  for (const StepCut cut : {StepCut{1, 4}, StepCut{2, 1}, StepCut{2, 2}}) check_equal(step_of(make, cut), whole, 1e-11);
}

TEST_CASE("a step equals itself cut into micro-batches, thread ranks and both, in float64") {
  const RoutedCase routed = independent_case();
  const bool padded = GENERATE(false, true);
  const auto make = [&] {
    std::vector<std::string> set = routed.set;
    set.push_back("model.dtype=float64");
    return tiny_experiment(routed.router, set, routed.losses);
  };
  CAPTURE(routed.router, routed.set, padded);
  const StepOutcome whole = step_of(make, {1, 1}, padded);
  for (const StepCut cut : {StepCut{1, 2}, StepCut{1, 4}, StepCut{2, 1}, StepCut{2, 2}}) {
    CAPTURE(cut.ranks, cut.micro_batches);
    check_equal(step_of(make, cut, padded), whole, 1e-11);
  }
}

TEST_CASE("a step equals itself cut in two, in float32") {
  const RoutedCase routed = independent_case();
  const auto make = [&] { return tiny_experiment(routed.router, routed.set, routed.losses); };
  CAPTURE(routed.router);
  const StepOutcome whole = step_of(make, {1, 1});
  check_equal(step_of(make, {1, 2}), whole, 1e-5);
  check_equal(step_of(make, {2, 1}), whole, 1e-5);
}

// Mean over `parts` of the batch, weighted by rows, of each site's balance loss; the gradient of task + 0.3 · Σ_sites.
StepOutcome scoped_by_hand(const Experiment& e, const std::vector<Batch>& parts) {
  StepContext context;
  const std::shared_ptr<Comm> alone = single_comm();
  context.comm = alone.get();
  context.seed = 3;
  double targets = 0, rows = 0;
  for (const Batch& part : parts) targets += static_cast<double>(part.target_tokens()), rows += static_cast<double>(part.rows());
  StepOutcome out;
  out.result.terms.resize(2, std::vector<TermReading>(1));
  e.model->zero_grad();
  for (const Batch& part : parts) {
    const ModelOutput forward = e.model->forward(part, context);
    Tensor loss = cross_entropy_sum(forward.logits_BLV, part.targets_BL).div(targets);
    const auto part_rows = static_cast<double>(part.rows());
    for (size_t s = 0; s < 2 && part_rows > 0; ++s) {
      const LossStatistics& sums = forward.sites[s].statistics[0].per_scope[0];
      const Tensor value = balance_by_hand(sums.sums[0], sums.sums[1], part_rows) * (part_rows / rows);
      out.result.terms[s][0].value += value.item<double>();
      loss = loss + value * 0.3;
    }
    loss.backward();
  }
  out.gradients = gradients_of(*e.model);
  return out;
}

TEST_CASE("losses of scope micro and sequence are row-weighted means of plain loops over micro-batches and sequences") {
  const std::string scope = GENERATE("micro", "sequence");
  const Experiment e = balanced(scope), by_hand = balanced("micro");
  const std::vector<Batch> micro = batches_of(e, 0, {1, 2}, true);
  const StepOutcome ours = step_on(e, micro, *single_comm());
  const StepOutcome plain = scoped_by_hand(by_hand, scope == "micro" ? micro : batches_of(e, 0, {1, kBatch}, true));
  CHECK(largest_error(ours.gradients, plain.gradients) <= 1e-10);
  for (size_t s = 0; s < 2; ++s) CHECK(far(ours.result.terms[s][0].value, plain.result.terms[s][0].value) <= 1e-10);
}

TEST_CASE("a pooled loss is one value from the counts of all layers, and is counted once") {
  const Experiment e = balanced("step", "pooled");
  const std::vector<Batch> one = batches_of(e, 0, {1, 1}, false);
  StepContext context;
  const std::shared_ptr<Comm> alone = single_comm();
  context.comm = alone.get();
  context.seed = 3;
  e.model->zero_grad();
  const ModelOutput forward = e.model->forward(one[0], context);
  Tensor counts_E = at::zeros({4}, at::kDouble), probability_E = at::zeros({4}, at::kDouble);
  for (const SiteResult& site : forward.sites) {
    counts_E = counts_E + site.statistics[0].per_scope[0].sums[0];
    probability_E = probability_E + site.statistics[0].per_scope[0].sums[1];
  }
  const Tensor value = balance_by_hand(counts_E, probability_E, 2 * 8 * 12);
  const Tensor task = cross_entropy_sum(forward.logits_BLV, one[0].targets_BL).div(8 * 12);
  (task + value * 0.3).backward();
  const Tensors plain = gradients_of(*e.model);
  for (const int64_t cut : {1, 4}) {
    const StepOutcome ours = step_on(e, batches_of(e, 0, {1, cut}, false), *alone);
    CHECK(far(ours.result.terms[0][0].value, value.item<double>()) <= 1e-10);
    CHECK(far(ours.result.total_loss, (task + value * 0.3).item<double>()) <= 1e-10);
    CHECK(largest_error(ours.gradients, plain) <= 1e-10);
  }
}

// Σ over experts of (mean probability · the router's first column): reads a parameter beside its sums.
struct WeightReader : Loss {
  std::vector<Tensor> row_statistics(const LossInput& input) const override { return {input.out.scores.loss_TE}; }
  Tensor value(const LossStatistics& s, const Router& router) const override {
    return s.sums[0].div(std::max<int64_t>(1, s.rows)).mul(router.parameters()[0].tensor.select(1, 0)).sum();
  }
  Landmarks landmarks(int64_t, int64_t) const override { return {0, 0}; }
};

TEST_CASE("a step-scope loss whose value reads a router's parameters has its whole gradient, whatever the split") {
  const auto make = [] {
    Experiment e = tiny_experiment("switch", {"model.dtype=float64", "moe.noise.kind=none", "moe.losses=none"});
    for (Site* site : e.model->sites())
      site->losses.push_back({std::make_shared<WeightReader>(), "reader", 0.3, LossScope::kStep});
    return e;
  };
  const Experiment e = make();
  shake(*e.model);
  StepContext context;
  const std::shared_ptr<Comm> alone = single_comm();
  context.comm = alone.get();
  context.seed = 3;
  const Batch whole = batches_of(e, 0, {1, 1}, false)[0];
  const ModelOutput forward = e.model->forward(whole, context);
  Tensor loss = cross_entropy_sum(forward.logits_BLV, whole.targets_BL).div(8 * 12);
  for (size_t s = 0; s < 2; ++s)
    loss = loss + WeightReader().value(forward.sites[s].statistics[0].per_scope[0], *e.model->sites()[s]->router) * 0.3;
  e.model->zero_grad();
  loss.backward();
  const Tensors plain = gradients_of(*e.model);
  for (const StepCut cut : {StepCut{1, 1}, StepCut{1, 4}, StepCut{2, 1}, StepCut{2, 2}}) {
    CAPTURE(cut.ranks, cut.micro_batches);
    CHECK(largest_error(step_of(make, cut).gradients, plain) <= 1e-10);
  }
}

TEST_CASE("recomputing activations changes no gradient and no counter") {
  const RoutedCase routed = independent_case();
  const int64_t cut = GENERATE(1, 2);
  const Experiment e = tiny_experiment(routed.router, routed.set, routed.losses);
  shake(*e.model);
  const std::vector<Batch> batches = batches_of(e, 0, {1, cut}, true);
  const StepOutcome kept = step_on(e, batches, *single_comm());
  const StepOutcome recomputed = step_on(e, batches, *single_comm(), /*recompute=*/true);
  CHECK(bitwise_equal(recomputed.gradients, kept.gradients));
  check_equal(recomputed, kept, 0);
}

TEST_CASE("the task loss is the sum over target tokens divided by the step's target tokens, whatever the split") {
  const Experiment e = tiny_experiment("frozen", {"model.dtype=float64"});
  shake(*e.model);
  StepContext context;
  const std::shared_ptr<Comm> alone = single_comm();
  context.comm = alone.get();
  context.seed = 3;
  double sum = 0;
  for (const Batch& batch : batches_of(e, 0, {1, kBatch}, true)) {
    const Tensor log_p_BLV = e.model->forward(batch, context).logits_BLV.log_softmax(-1);
    for (int64_t l = 0; l < 12; ++l) {
      const int64_t target = batch.targets_BL[0][l].item<int64_t>();
      if (target >= 0) sum -= log_p_BLV[0][l][target].item<double>();
    }
  }
  // Lengths 12, 9, 6, 3, 0, 12, 9, 6 of the eight sequences.
  for (const int64_t cut : {1, 2, 8}) {
    const StepResult result = step_on(e, batches_of(e, 0, {1, cut}, true), *alone).result;
    CHECK(result.target_tokens == 57);
    CHECK(far(result.task_loss, sum / 57) <= 1e-10);
  }
}

TEST_CASE("what stands in padding changes nothing, bit for bit") {
  const RoutedCase routed = independent_case();
  const Experiment e = tiny_experiment(routed.router, routed.set, routed.losses);
  shake(*e.model);
  std::vector<Batch> batches = batches_of(e, 0, {1, 2}, true);
  const StepOutcome before = step_on(e, batches, *single_comm());
  for (Batch& batch : batches)
    batch.tokens_BL = at::where(batch.targets_BL.lt(0), at::full_like(batch.tokens_BL, 7), batch.tokens_BL);
  const StepOutcome after = step_on(e, batches, *single_comm());
  CHECK(bitwise_equal(after.gradients, before.gradients));
  check_equal(after, before, 0);
}

TEST_CASE("20 steps in float64 with one and with two micro-batches or ranks end at the same parameters") {
  const std::string router = GENERATE("noisy_topk", "softmax_topk", "switch", "gshard", "frozen");
  const auto make = [&](int64_t micro_batches) {
    return tiny_experiment(router,
                           {"model.dtype=float64", "train.steps=20", fmt::format("train.micro_batches={}", micro_batches)});
  };
  const Tensors whole = trained(make(1));
  CHECK(largest_error(trained(make(2)), whole) <= 1e-11);
  std::vector<Tensors> ranks(2);
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) { ranks[static_cast<size_t>(comm->rank())] = trained(make(1), {}, comm); });
  CHECK(largest_error(ranks[0], whole) <= 1e-11);
  CHECK(bitwise_equal(ranks[0], ranks[1]));
}

// Looks at everything it can, and asks the model questions of its own.
class CuriousObserver : public Observer {
 public:
  explicit CuriousObserver(const Batch& batch) : batch_(batch) {}
  Request on_step(const StepView& view) override {
    view.window.metrics();
    const ModelOutput free = view.probe_forward(batch_, nullptr);
    std::vector<Assignment> forced;
    for (const SiteResult& site : free.sites) forced.push_back(site.assignment);
    view.probe_forward(batch_, &forced);
    return Request::kNone;
  }

 private:
  Batch batch_;
};

TEST_CASE("evaluations and observers between steps change no bit of a run") {
  const std::string router = GENERATE("noisy_topk", "softmax_topk", "switch", "gshard", "uniform", "random", "frozen");
  CAPTURE(router);
  const Tensors plain = trained(tiny_experiment(router));
  const Experiment watched = tiny_experiment(router, {"eval.every=1", "train.steps=12"});
  CuriousObserver curious(with_lengths(watched.data->eval_batch(0, 2)));
  CHECK(bitwise_equal(trained(watched, {&curious}), plain));
}

TEST_CASE("ranks share an evaluation and all report the whole") {
  const auto make = [] { return tiny_experiment("noisy_topk", {"model.dtype=float64"}, kAllLosses); };
  const Experiment e = make();
  const Evaluation alone = evaluate(*e.model, *e.data, {0, 4, 3}, *single_comm());
  run_on_threads(3, [&](std::shared_ptr<Comm> comm) {  // six sequences, four at a time: the third rank has none
    const Experiment own = make();
    const Evaluation shared = evaluate(*own.model, *own.data, {0, 4, 3}, *comm);
    if (shared.tokens != alone.tokens || far(shared.loss, alone.loss) > 1e-11) throw std::runtime_error("loss differs");
    for (size_t s = 0; s < 2; ++s) {
      if (shared.records[s].chosen_E != alone.records[s].chosen_E) throw std::runtime_error("counts differ");
      for (size_t t = 0; t < alone.terms[s].size(); ++t)
        if (far(shared.terms[s][t].value, alone.terms[s][t].value) > 1e-11) throw std::runtime_error("loss terms differ");
    }
  });
}

}  // namespace
}  // namespace moelab::test
