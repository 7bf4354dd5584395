// Losses that break one rule each. They are attached to any router with choices and scores while they are on trial.
#include "tests/conformance/mutants.h"

#include "core/losses/parts.h"

#include <algorithm>

namespace moelab {
namespace {

// E · Σ f P over every choice, as `balance` with counts = any_choice: k at balance, E at collapse.
class PlainBalance : public Loss {
 public:
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {chosen(input), input.out.scores.loss_TE};
  }
  Tensor value(const LossStatistics& statistics, const Router&) const override {
    const Tensor share_E = mean_over_rows(statistics.sums[0], statistics.rows);
    return share_E.mul(mean_over_rows(statistics.sums[1], statistics.rows)).sum().mul(share_E.size(0));
  }
  Landmarks landmarks(int64_t experts, int64_t k) const override {
    return {static_cast<double>(k), static_cast<double>(experts)};
  }

 protected:
  static Tensor chosen(const LossInput& input) {
    return chosen_experts(input.out.assignment.choice_TK, input.experts, input.out.gate_TK.scalar_type());
  }
};

class ForgetsK : public PlainBalance {
  Landmarks landmarks(int64_t experts, int64_t k) const override {
    return {1, static_cast<double>(experts) / static_cast<double>(k)};
  }
};

class SoftmaxOfProbabilities : public PlainBalance {
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {chosen(input), input.out.scores.loss_TE.softmax(1)};
  }
};

// Each part's means instead of its sums.
class MeanStatistics : public PlainBalance {
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const auto rows = static_cast<double>(std::max<int64_t>(input.in.rows(), 1));
    return {chosen(input).div(rows), input.out.scores.loss_TE};
  }
  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return statistics.sums[0].mul(mean_over_rows(statistics.sums[1], statistics.rows)).sum().mul(statistics.sums[0].size(0));
  }
};

class DetachedProbabilities : public PlainBalance {
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    return {chosen(input), input.out.scores.loss_TE.detach()};
  }
};

class CountsServedRows : public PlainBalance {
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Assignment& assignment = input.out.assignment;
    const Tensor served_TK = assignment.choice_TK.masked_fill(assignment.kept_TK.logical_not(), -1);
    return {chosen_experts(served_TK, input.experts, input.out.gate_TK.scalar_type()), input.out.scores.loss_TE};
  }
};

// CV² by the sample variance, with the landmarks of the population variance.
class SampleVariance : public PlainBalance {
  std::vector<Tensor> row_statistics(const LossInput& input) const override { return {chosen(input)}; }
  Tensor value(const LossStatistics& statistics, const Router&) const override {
    return squared_variation(statistics.sums[0], /*sample_variance=*/true);
  }
  Landmarks landmarks(int64_t experts, int64_t k) const override { return {0, collapsed_variation(experts, k, false)}; }
};

template <class Broken>
Registration<LossEntry> registered_loss(const char* name) {
  return Registration<LossEntry>{{
      .name = name,
      .title = "for tests",
      .citation = "none",
      .equation = "none",
      .make = [](const Options&, const RouterEntry&) { return std::make_unique<Broken>(); },
      .refuses = [name](const RouterFacts&) { return loss_on_trial() == name ? "" : "it is not on trial"; },
  }};
}

const Registration<LossEntry> loss_registrations[] = {
    registered_loss<ForgetsK>("mutant_loss_forgets_k"),
    registered_loss<SoftmaxOfProbabilities>("mutant_loss_second_softmax"),
    registered_loss<MeanStatistics>("mutant_loss_mean_statistics"),
    registered_loss<DetachedProbabilities>("mutant_loss_detached"),
    registered_loss<CountsServedRows>("mutant_loss_counts_served_rows"),
    registered_loss<SampleVariance>("mutant_loss_sample_variance"),
    registered_loss<PlainBalance>("control_loss"),
};

}  // namespace

std::string& loss_on_trial() {
  static std::string name;
  return name;
}

std::vector<Mutant> loss_mutants() {
  return {
      {"mutant_loss_forgets_k", "landmarks", {}},
      {"mutant_loss_second_softmax", "landmarks", {}},
      {"mutant_loss_mean_statistics", "micro_batches", {"thread_ranks"}},
      {"mutant_loss_detached", "finite_differences", {}},
      {"mutant_loss_counts_served_rows", "conserved", {}},
      {"mutant_loss_sample_variance", "landmarks", {}},
  };
}

std::vector<Mutant> mutants() {
  std::vector<Mutant> all;
  for (const auto& list : {choice_mutants(), state_mutants(), decode_mutants(), fact_mutants()})
    all.insert(all.end(), list.begin(), list.end());
  return all;
}

std::vector<std::string> controls() {
  return {"control_plain", "control_noisy", "control_stateful", "control_staged", "control_looks_back", "control_hands_on",
          "control_straight_through", "control_batch_mean"};
}

}  // namespace moelab
