// Balance losses and other losses that read routing decisions. A loss is a function of *additive statistics*: sums over rows
// of per-row tensors. That is what makes its value exact over micro-batches and ranks (scope = "step"), and what keeps
// padding and recomputation out of it.
#pragma once

#include "core/params.h"
#include "core/registry.h"
#include "core/router.h"

#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace moelab {

// kStepStreaming: each micro-batch's gradient refers to the step's sums guessed from the rows so far; no first sweep.
enum class LossScope { kMicro, kSequence, kStep, kStepStreaming };

// What a loss may look at.
struct LossInput {
  const RouteInput& in;
  const RouteOutput& out;
  const Router& router;
  int64_t experts;
};

// Sums over the rows of a scope, in the order of Loss::row_statistics. `rows` is the number of rows summed, over all ranks.
struct LossStatistics {
  std::vector<Tensor> sums;
  int64_t rows = 0;
};

// The value of a loss at two landmarks, so that a reading can be judged; of a loss that is a sum, per row. NaN where the loss
// has none. In a layer with room to grow, E of the formulas stays max_experts; balance then means an even share for each
// *active* expert.
struct Landmarks {
  double balance;   // every expert gets the same share, probabilities uniform
  double collapse;  // all rows choose the same k experts, probability 1 spread over them
};

class Loss {
 public:
  virtual ~Loss();

  // Per-row contributions, each [T, n], on the graph where the loss has a gradient.
  virtual std::vector<Tensor> row_statistics(const LossInput& input) const = 0;

  // The unscaled loss from sums of those; one element. `statistics.rows` may be 0: the value is then 0, on the graph.
  virtual Tensor value(const LossStatistics& statistics, const Router& router) const = 0;

  // A sum over tokens (like distillation): training divides by the step's target tokens.
  virtual bool reduces_by_sum() const { return false; }
  // Terms of all layers form one value from summed statistics, instead of one value each.
  virtual bool pooled_over_layers() const { return false; }

  // With all experts active.
  virtual Landmarks landmarks(int64_t experts, int64_t k) const = 0;
  // With `active` of them: rows that all choose the same k collapse alike; balance over fewer is known where overridden.
  virtual Landmarks landmarks_among(int64_t active, int64_t experts, int64_t k) const;
};

struct LossEntry {
  std::string name;
  std::string title;
  std::string citation;
  std::string equation;
  double coefficient = 0.01;  // of a [[loss]] that gives none, at a router whose paper gives none
  OptionSpecs options = {};
  std::function<std::unique_ptr<Loss>(const Options&, const RouterEntry& router)> make;  // defaults may be the router's paper's
  std::function<std::string(const RouterFacts&)> refuses = {};  // reason why it cannot be attached, "" = it can
  bool needs_noise = false;                                     // without noise on the logits it has a value, but no gradient
  std::source_location where = std::source_location::current();
};

// A loss attached to a layer: `[[loss]]`, or one of the paper's set.
struct LossTerm {
  std::shared_ptr<const Loss> loss;
  std::string label;
  double coefficient = 0;
  LossScope scope = LossScope::kStep;
};

// Sums per scope: one entry for kMicro, kStep and kStepStreaming, one per sequence that has rows for kSequence (without any row:
// one entry of zero rows, so that the value is 0 and still on the graph).
std::vector<LossStatistics> collect_statistics(const Loss& loss, LossScope scope, const LossInput& input);

// Local value of a term in one micro-batch: value(S), or the mean over sequences weighted by rows.
Tensor local_value(const LossTerm& term, const std::vector<LossStatistics>& statistics, const Router& router);

// ∂value/∂S at the step's total S, without gradient: what a micro-batch multiplies its own S with. No other tensor's .grad
// moves: the gradient of what value() reads of the router is the trainer's to take, once per step.
std::vector<Tensor> statistics_gradient(const Loss& loss, const LossStatistics& total, const Router& router);

// ⟨gradient, S⟩, on the graph of S.
Tensor inner_product(const std::vector<Tensor>& gradient, const LossStatistics& statistics);

// P(expert e is among the k chosen if its own additive noise were drawn again), [T,E], on the graph of clean logits, noise
// scale and threshold. The threshold is the k-th largest noisy logit of the row, e itself left out (Shazeer) or counted too
// (V-MoE). Needs clean_TE, noisy_TE, noise_std_TE and 0 < k < E.
Tensor load_probability(const Scores& scores, int64_t k, bool include_self);

// The rows that loss `load` and `probe.load` sum: load_probability in training where noise was added and k < E, else the
// choices themselves, without gradient. [T,E]. A choice in two levels has three of them: of the groups [T,G]; of the experts
// inside their groups [T,E], of the rows that chose the group; and these rows, as 1, [T,G].
std::vector<Tensor> load_rows(const RouteInput& in, const RouteOutput& out, int64_t experts, bool include_self);

// The load of each expert from their sums: the sum itself, or load_g · load_e / rows of g. [E]
Tensor load_of(const std::vector<Tensor>& sums);

}  // namespace moelab
