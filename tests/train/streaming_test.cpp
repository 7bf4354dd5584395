// Loss scope step_streaming: each micro-batch's gradient refers to the sums so far, stretched to the rows of the step.
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

constexpr double kStreamCoefficient = 0.3;
constexpr int64_t kStreamContext = 12;

Experiment streaming(const std::string& loss, const std::string& scope) {
  Experiment e = tiny_experiment("switch", {"model.dtype=float64", "moe.noise.kind=none"},
                                 fmt::format("[[loss]]\nname = \"{}\"\ncoefficient = {}\nscope = \"{}\"\n", loss,
                                             kStreamCoefficient, scope));
  shake(*e.model);
  return e;
}

// The sequences named, the s-th cut to 12 - 3·(s mod 4) tokens.
Batch sequences_of(const Experiment& e, const std::vector<int64_t>& ids) {
  const Tensor id_B = at::tensor(ids, at::kLong);
  Batch batch = with_lengths(e.data->train_batch(3, 0, 0, 8, 8));
  for (Tensor* part : {&batch.tokens_BL, &batch.targets_BL, &batch.sequence_B}) *part = part->index_select(0, id_B);
  batch.length_B = (kStreamContext - batch.sequence_B.remainder(4) * 3).contiguous();
  const Tensor past_BL = at::arange(kStreamContext, at::kLong).unsqueeze(0).ge(batch.length_B.unsqueeze(1));
  batch.targets_BL = batch.targets_BL.masked_fill(past_BL, -1);
  if (batch.domain_B.defined()) batch.domain_B = batch.domain_B.index_select(0, id_B);
  return batch;
}

struct StreamedStep {
  StepResult result;
  Tensors gradients;
};

StepContext stream_context(Comm& comm) {
  StepContext context;
  context.comm = &comm;
  context.seed = 3;
  return context;
}

StreamedStep streamed(const Experiment& e, const std::vector<Batch>& batches, Comm& comm, const std::string& objective = "task") {
  e.model->zero_grad();
  StreamedStep out{compute_step(*e.model, *make_objective(objective), batches, stream_context(comm), false), {}};
  out.gradients = gradients_of(*e.model);
  return out;
}

// Weights that the gradient gives to one micro-batch's own sums, by the formula of the loss and loops over experts.
std::vector<double> weights_by_hand(const std::string& loss, const std::vector<std::vector<double>>& so_far, double rows,
                                    double step_rows) {
  std::vector<double> weights;
  double sum = 0, squares = 0;
  for (const double value : so_far.back()) sum += value, squares += value * value;
  for (int64_t e = 0; e < 4; ++e) {
    const auto i = static_cast<size_t>(e);
    // balance = E Σ (c/R)(p/R): E·(c so far/rows so far)/R. importance = E ΣS²/(ΣS)² - 1 has no size: S so far stretched by
    // R/rows.
    if (loss == "balance") weights.push_back(4 * so_far[0][i] / rows / step_rows);
    else weights.push_back(2 * 4 * (so_far[0][i] / (sum * sum) - squares / (sum * sum * sum)) * rows / step_rows);
  }
  return weights;
}

std::vector<double> added(const std::vector<double>& so_far, const Tensor& more_E) {
  std::vector<double> all(4);
  for (int64_t e = 0; e < 4; ++e)
    all[static_cast<size_t>(e)] = (so_far.empty() ? 0 : so_far[static_cast<size_t>(e)]) + more_E[e].item<double>();
  return all;
}

Tensors streamed_by_hand(const std::string& loss, const Experiment& e, const std::vector<Batch>& batches) {
  const std::shared_ptr<Comm> alone = single_comm();
  double targets = 0, step_rows = 0, rows = 0;
  for (const Batch& batch : batches)
    targets += static_cast<double>(batch.target_tokens()), step_rows += static_cast<double>(batch.rows());
  std::vector<std::vector<std::vector<double>>> so_far(2);
  e.model->zero_grad();
  for (const Batch& batch : batches) {
    const ModelOutput forward = e.model->forward(batch, stream_context(*alone));
    Tensor total = cross_entropy_sum(forward.logits_BLV, batch.targets_BL).div(targets);
    rows += static_cast<double>(batch.rows());
    for (size_t s = 0; s < 2; ++s) {
      const std::vector<Tensor>& sums = forward.sites[s].statistics[0].per_scope[0].sums;
      so_far[s].resize(sums.size());
      for (size_t i = 0; i < sums.size(); ++i) so_far[s][i] = added(so_far[s][i], sums[i]);
      const std::vector<double> weights = weights_by_hand(loss, so_far[s], rows, step_rows);
      for (int64_t x = 0; x < 4; ++x) total = total + kStreamCoefficient * weights[static_cast<size_t>(x)] * sums.back()[x];
    }
    total.backward();
  }
  return gradients_of(*e.model);
}

double apart(double a, double b) { return std::abs(a - b) / std::max(std::abs(b), 1e-30); }

TEST_CASE("step_streaming equals plain loops: counts so far, stretched to the step's rows; its value is the step's own") {
  const std::string loss = GENERATE("balance", "importance");
  const Experiment e = streaming(loss, "step_streaming"), exact = streaming(loss, "step");
  const std::vector<Batch> batches{sequences_of(e, {0, 1}), sequences_of(e, {2, 3, 4}), sequences_of(e, {5}),
                                   sequences_of(e, {6, 7})};
  CAPTURE(loss);
  const StreamedStep ours = streamed(e, batches, *single_comm()), whole = streamed(exact, batches, *single_comm());
  CHECK(largest_error(ours.gradients, streamed_by_hand(loss, e, batches)) <= 1e-10);
  CHECK(largest_error(ours.gradients, whole.gradients) > 1e-6);  // an approximation, and seen as such
  for (size_t s = 0; s < 2; ++s) CHECK(apart(ours.result.terms[s][0].value, whole.result.terms[s][0].value) <= 1e-12);
  CHECK(apart(ours.result.total_loss, whole.result.total_loss) <= 1e-12);
}

TEST_CASE("with one micro-batch per rank step_streaming is the exact scope step") {
  const std::string loss = GENERATE("balance", "importance");
  const Experiment e = streaming(loss, "step_streaming"), exact = streaming(loss, "step");
  const std::vector<Batch> one{sequences_of(e, {0, 1, 2, 3, 4, 5, 6, 7})};
  CHECK(largest_error(streamed(e, one, *single_comm()).gradients, streamed(exact, one, *single_comm()).gradients) <= 1e-12);
}

TEST_CASE("step_streaming over two ranks counts what all ranks have shown so far") {
  const auto make = [] { return streaming("balance", "step_streaming"); };
  const Experiment e = make();
  const StreamedStep together = streamed(e, {sequences_of(e, {0, 1, 4, 5}), sequences_of(e, {2, 3, 6, 7})}, *single_comm());
  std::vector<StreamedStep> ranks(2);
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) {
    const Experiment own = make();
    const int64_t first = 4 * comm->rank();
    ranks[static_cast<size_t>(comm->rank())] = streamed(
        own, {sequences_of(own, {first, first + 1}), sequences_of(own, {first + 2, first + 3})}, *comm);
  });
  for (const StreamedStep& rank : ranks) {
    CHECK(largest_error(rank.gradients, together.gradients) <= 1e-11);
    CHECK(apart(rank.result.terms[1][0].value, together.result.terms[1][0].value) <= 1e-11);
  }
}

int forward_passes = 0;

class CountingObjective : public Objective {
 public:
  ObjectiveOutput compute(const Model& model, const Batch& batch, const StepContext& context) const override {
    ++forward_passes;
    return make_objective("task")->compute(model, batch, context);
  }
};

const Registration<ObjectiveEntry> registration_counting{
    {.name = "counting_probe", .title = "", .make = [](const Options&) { return std::make_unique<CountingObjective>(); }}};

TEST_CASE("step_streaming needs no first sweep, where step sweeps over several micro-batches") {
  for (const auto& [scope, expected] : std::map<std::string, int>{{"step_streaming", 2}, {"step", 4}}) {
    const Experiment e = streaming("balance", scope);
    forward_passes = 0;
    streamed(e, {sequences_of(e, {0, 1}), sequences_of(e, {2, 3})}, *single_comm(), "counting_probe");
    CHECK(forward_passes == expected);
  }
}

TEST_CASE("a loss that pools its layers refuses step_streaming") {
  CHECK_THROWS_AS(
      tiny_experiment("switch", {}, "[[loss]]\nname = \"balance\"\nlayers = \"pooled\"\nscope = \"step_streaming\"\n"), Error);
}

}  // namespace
}  // namespace moelab::test
