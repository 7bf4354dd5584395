// Probe: an objective of two stochastic passes and their divergence (as THOR's). The balance losses are those of both passes
// averaged, not added, and the gradient is that of the whole, with one micro-batch and with two.
#include "core/config.h"
#include "experiments/experiment.h"
#include "trainers/trainer.h"

#include <ATen/ATen.h>

#include <catch2/catch_test_macros.hpp>

using namespace moelab;

namespace {

const char* const kTwoPassExperiment = R"(
[model]
layers = 1
width = 8
heads = 2
context = 6
dtype = "float64"
[moe]
experts = 4
[moe.router]
name = "noisy_topk"
k = 2
[moe.expert]
width = 4
[data]
name = "markov"
[[loss]]
name = "importance"
coefficient = 0.5
)";

// Σ over target tokens of KL(p1 ‖ p2) + KL(p2 ‖ p1).
Tensor symmetric_divergence(const Tensor& first_BLV, const Tensor& second_BLV) {
  const Tensor log_p = first_BLV.log_softmax(-1), log_q = second_BLV.log_softmax(-1);
  return log_p.exp().sub(log_q.exp()).mul(log_p.sub(log_q)).sum();
}

class TwoPassObjective : public Objective {
 public:
  int64_t passes() const override { return 2; }
  ObjectiveOutput compute(const Model& model, const Batch& batch, const StepContext& context) const override {
    ObjectiveOutput out;
    StepContext second = context;
    second.pass = 1;
    out.passes = {model.forward(batch, context), model.forward(batch, second)};
    const Tensor &a = out.passes[0].logits_BLV, &b = out.passes[1].logits_BLV;
    const Tensor task = (cross_entropy_sum(a, batch.targets_BL) + cross_entropy_sum(b, batch.targets_BL)).div(2);
    const Tensor divergence = symmetric_divergence(a, b);
    out.task_sum = task.item<double>();
    out.loss_sum = task + divergence * 0.1;
    out.metrics["divergence"] = divergence.item<double>();
    return out;
  }
};

const Registration<ObjectiveEntry> two_pass_registration{
    {.name = "two_pass_probe", .title = "", .equation = "", .make = [](const Options&) {
       return std::make_unique<TwoPassObjective>();
     }}};

// The same by hand over the whole batch: CV² of the gates' sums, averaged over the passes before it is formed.
struct TwoPassByHand {
  double task, divergence, importance, total;
};

TwoPassByHand two_passes_by_hand(const Model& model, const Batch& batch, StepContext context) {
  model.zero_grad();
  const ModelOutput first = model.forward(batch, context);
  context.pass = 1;
  const ModelOutput second = model.forward(batch, context);
  const auto sum_of = [](const ModelOutput& pass) { return pass.sites[0].statistics[0].per_scope[0].sums[0]; };
  const Tensor importance_E = (sum_of(first) + sum_of(second)) / 2;
  const Tensor mean = importance_E.mean();
  const Tensor importance = (importance_E - mean).square().mean() / mean.square();
  const auto targets = static_cast<double>(batch.target_tokens());
  const Tensor task = (cross_entropy_sum(first.logits_BLV, batch.targets_BL) +
                       cross_entropy_sum(second.logits_BLV, batch.targets_BL)) /
                      (2 * targets);
  const Tensor divergence = symmetric_divergence(first.logits_BLV, second.logits_BLV) / targets;
  const Tensor total = task + divergence * 0.1 + importance * 0.5;
  total.backward();
  return {task.item<double>(), divergence.item<double>(), importance.item<double>(), total.item<double>()};
}

bool two_pass_near(double a, double b) { return std::abs(a - b) <= 1e-10 * std::abs(b); }

}  // namespace

TEST_CASE("an objective of two passes counts the balance losses once, and its gradient is exact over micro-batches") {
  const Experiment e = load_experiment(parse_config(kTwoPassExperiment, "two_pass.toml", {"train.objective=two_pass_probe"}));
  for (const NamedTensor& p : e.model->parameters())
    if (p.name.find("noise_weight") != std::string::npos) p.tensor.detach().fill_(0.3);  // two passes that differ
  const std::shared_ptr<Comm> alone = single_comm();
  StepContext context;
  context.comm = alone.get();
  const auto rows = [&](int64_t first, int64_t count) { return with_lengths(e.data->train_batch(0, 0, first, count, 4)); };
  const TwoPassByHand plain = two_passes_by_hand(*e.model, rows(0, 4), context);
  std::vector<Tensor> expected;
  for (const NamedTensor& p : e.model->trainable()) expected.push_back(p.tensor.grad().clone());
  REQUIRE(plain.divergence > 1e-6);
  for (const std::vector<Batch>& cut : {std::vector<Batch>{rows(0, 4)}, std::vector<Batch>{rows(0, 2), rows(2, 2)}}) {
    e.model->zero_grad();
    const StepResult result = compute_step(*e.model, *make_objective("two_pass_probe"), cut, context, false);
    CHECK(two_pass_near(result.task_loss, plain.task));
    CHECK(two_pass_near(result.metrics.at("divergence"), plain.divergence));
    CHECK(two_pass_near(result.terms[0][0].value, plain.importance));
    CHECK(two_pass_near(result.total_loss, plain.total));
    CHECK(result.records[0].rows == 2 * 4 * 6);  // both passes were routed
    const std::vector<NamedTensor> parameters = e.model->trainable();
    for (size_t p = 0; p < parameters.size(); ++p) {
      CAPTURE(parameters[p].name);
      const double scale = std::max(expected[p].abs().max().item<double>(), 1e-30);
      CHECK((parameters[p].tensor.grad() - expected[p]).abs().max().item<double>() <= 1e-10 * scale);
    }
  }
}
