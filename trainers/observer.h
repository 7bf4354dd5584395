// Observers see each step, evaluation, checkpoint, event and the end. They can ask for a checkpoint or a stop, and can change
// nothing: training with all of them is bitwise equal to training with none.
#pragma once

#include "trainers/evaluate.h"
#include "trainers/step.h"
#include "trainers/window.h"

#include <functional>
#include <string>

namespace moelab {

enum class Request { kNone, kCheckpoint, kStop };

struct StepView {
  int64_t step;          // counted from 0
  int64_t total_steps;
  int64_t tokens;        // target tokens so far, with this step
  double lr;
  double gradient_norm;  // before clipping
  const StepResult& result;
  const MetricsWindow& window;  // since the last flush, with this step
  bool flush;                   // this step ends a window of log_every steps
  const Model& model;
  // A forward pass in evaluation mode that changes no state; `forced` replays a selection per site.
  std::function<ModelOutput(const Batch&, const std::vector<Assignment>* forced)> probe_forward;
};

class Observer {
 public:
  virtual ~Observer();
  virtual Request on_step(const StepView&) { return Request::kNone; }
  virtual void on_evaluation(const Evaluation&, int64_t step, bool final) { (void)step, (void)final; }
  virtual void on_checkpoint(const std::string& folder, int64_t step) { (void)folder, (void)step; }
  virtual void on_event(const std::string& site, const Event&, int64_t step) { (void)site, (void)step; }
  virtual void on_end(int64_t step) { (void)step; }
};

}  // namespace moelab
