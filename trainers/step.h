// One optimiser step's gradients, exact whatever the split into micro-batches and ranks: the task loss is Σ over target tokens
// ÷ target tokens of the whole step, and losses of scope "step" are formed from statistics summed over the whole step.
#pragma once

#include "core/diagnostics.h"
#include "core/model/model.h"
#include "trainers/objective.h"
#include "trainers/terms.h"

#include <map>
#include <string>
#include <vector>

namespace moelab {

struct StepResult {
  double task_loss = 0;         // nats per target token of the step
  double total_loss = 0;        // with the weighted routing losses and what the objective adds
  int64_t target_tokens = 0;    // over all micro-batches and ranks
  std::vector<RoutingRecord> records;                // per site, over all micro-batches and ranks
  std::vector<std::vector<TermReading>> terms;       // per site, per loss term
  std::vector<std::map<std::string, Tensor>> deltas; // per site: summed state changes for Router::end_step
  std::map<std::string, double> metrics;             // of the objective, per target token
};

// Leaves the summed gradient in every parameter's grad; parameters are not moved. `context.comm` joins the ranks; each rank
// brings the same number of micro-batches. Throws Error(kDiverged) when the loss is not finite, on every rank alike.
StepResult compute_step(const Model& model, const Objective& objective, const std::vector<Batch>& micro_batches,
                        const StepContext& context, bool bf16);

// Runs the model's forward passes under bf16 autocast while it lives, if `on`.
class AutocastGuard {
 public:
  explicit AutocastGuard(bool on);
  ~AutocastGuard();
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  bool on_;
};

}  // namespace moelab
