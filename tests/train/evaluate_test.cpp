// Evaluation: losses formed as in training, the step that routers are told, and experts that are not there yet.
#include "train_support.h"

#include "trainers/generate.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

// The evaluation reads six sequences of 12 rows, four at a time.
TEST_CASE("evaluation forms losses as training does: pooled over layers, per sequence, per micro-batch") {
  struct Scoped {
    const char* scope;
    const char* layers;
  };
  const Scoped scoped =
      GENERATE(Scoped{"step", "each"}, Scoped{"step", "pooled"}, Scoped{"sequence", "each"}, Scoped{"micro", "each"});
  CAPTURE(scoped.scope, scoped.layers);
  const Experiment e = balanced(scoped.scope, scoped.layers), sums_of_parts = balanced("step");
  const bool by_sequence = std::string(scoped.scope) == "sequence", by_step = std::string(scoped.scope) == "step";
  const int64_t part = by_sequence ? 1 : by_step ? 6 : 4;
  StepContext context;
  const std::shared_ptr<Comm> alone = single_comm();
  context.comm = alone.get();
  context.mode = Mode::kEval;
  std::vector<double> expected(2, 0);
  for (int64_t first = 0; first < 6; first += part) {
    const Batch rows = with_lengths(e.data->eval_batch(first, std::min(part, 6 - first)));
    const ModelOutput out = sums_of_parts.model->forward(rows, context);
    const auto sums = [&](size_t site, size_t which) { return out.sites[site].statistics[0].per_scope[0].sums[which]; };
    const auto count = static_cast<double>(rows.rows());
    for (size_t s = 0; s < 2; ++s) {
      const bool pooled = std::string(scoped.layers) == "pooled";
      const Tensor counts_E = pooled ? sums(0, 0) + sums(1, 0) : sums(s, 0);
      const Tensor p_E = pooled ? sums(0, 1) + sums(1, 1) : sums(s, 1);
      expected[s] += balance_by_hand(counts_E, p_E, count * (pooled ? 2 : 1)).item<double>() * count / (6 * 12);
    }
  }
  const Evaluation found = evaluate(*e.model, *e.data, {0, 4, 3}, *alone);
  for (size_t s = 0; s < 2; ++s) {
    CHECK(far(found.terms[s].at(0).value, expected[s]) <= 1e-10);
    CHECK(far(found.terms[s].at(0).weighted, 0.3 * expected[s]) <= 1e-10);
    CHECK(found.term_labels[s].at(0) == "balance");
  }
}

// Notes the step that it is asked at.
struct ListeningModel : Model {
  mutable std::vector<int64_t> evaluated, decoded, totals;
  ModelOutput forward(const Batch& batch, const StepContext& context) const override {
    if (context.mode == Mode::kEval) evaluated.push_back(context.step);
    totals.push_back(context.total_steps);
    return {at::zeros({batch.tokens_BL.size(0), batch.tokens_BL.size(1), 256}), {}};
  }
  Tensor decode(const Tensor& tokens_BL, DecodeState& state) const override {
    decoded.push_back(state.step);
    totals.push_back(state.total_steps);
    state.position += tokens_BL.size(1);
    return at::zeros({1, 8});
  }
  std::vector<Site*> sites() const override { return {}; }
  int64_t context() const override { return 4; }
  int64_t active_parameters() const override { return 0; }
  double flops_per_token() const override { return 0; }
};

TEST_CASE("evaluation and generation happen at the step that training is at") {
  Experiment e = tiny_experiment("switch", {"train.steps=3", "eval.every=1"});
  const auto model = std::make_shared<ListeningModel>();
  e.model = model;
  Trainer trainer = trainer_of(e);
  trainer.run();
  CHECK(model->evaluated.front() == 1);
  CHECK(model->evaluated.back() == 3);
  generate(*model, {1, 2}, {6, 0, 0, 2, 3});
  CHECK(model->decoded == std::vector<int64_t>(6, 2));
  CHECK(model->totals == std::vector<int64_t>(model->totals.size(), 3));
}

TEST_CASE("experts that are not there yet are neither dead nor in the landmarks, and a saved window knows them") {
  const Experiment e = tiny_experiment("softmax_topk", {"moe.max_experts=7", "train.steps=4"}, "[[loss]]\nname = \"z\"\n");
  Trainer trainer = trainer_of(e);
  trainer.run();
  const RoutingRecord& record = trainer.last_window().records()[0];
  CHECK(record.chosen_E.size() == 7);
  CHECK(record.active_experts() == 4);
  CHECK(trainer.last_window().metrics().at("layer.0.effective_experts") <= 4);
  CHECK(metrics_of(record).at("dead") <= 2);
  MetricsWindow loaded(e.model->sites());
  loaded.load(trainer.last_window().save());
  CHECK(loaded.records()[0].active_E == record.active_E);
  CHECK(trainer.last_evaluation().records[1].active_experts() == 4);
}

}  // namespace
}  // namespace moelab::test
