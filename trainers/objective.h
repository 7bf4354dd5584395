// An objective owns what one step computes from a micro-batch: one pass and its task loss, two stochastic passes and their
// divergence, a teacher, … The trainer adds the routing losses, divides by the step's target tokens and runs the backward pass.
#pragma once

#include "core/model/model.h"
#include "core/params.h"
#include "core/registry.h"

#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace moelab {

struct ObjectiveOutput {
  Tensor loss_sum;                  // on the graph: summed over the micro-batch's target tokens
  double task_sum = 0;              // Σ −ln p(target) of the reported task loss, without anything added
  std::vector<ModelOutput> passes;  // their routing statistics, averaged over the passes by the trainer
  std::map<std::string, double> metrics;  // sums over target tokens
};

class Objective {
 public:
  virtual ~Objective();
  virtual int64_t passes() const { return 1; }
  // `context.pass` is 0; an objective of several passes counts it up.
  virtual ObjectiveOutput compute(const Model& model, const Batch& batch, const StepContext& context) const = 0;
};

struct ObjectiveEntry {
  std::string name;
  std::string title;
  std::string citation = {};
  std::string equation = {};
  OptionSpecs options = {};  // of `[objective]`, beside its name
  std::function<std::unique_ptr<Objective>(const Options&)> make;
  std::source_location where = std::source_location::current();
};

std::unique_ptr<Objective> make_objective(const std::string& name, const Options& options);
std::unique_ptr<Objective> make_objective(const std::string& name);  // with its defaults

}  // namespace moelab
