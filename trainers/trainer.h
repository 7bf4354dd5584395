// The training loop. Stop 3 of the reading path: config → trainer → model.
#pragma once

#include "core/dataset.h"
#include "core/io/checkpoint.h"
#include "core/model/model.h"
#include "trainers/objective.h"
#include "trainers/observer.h"
#include "trainers/optimizer.h"
#include "trainers/settings.h"
#include "trainers/window.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab {

enum class Outcome { kDone, kStoppedByObserver, kInterrupted, kTerminated };

class Trainer {
 public:
  // `checkpoint_root` "" keeps no checkpoints (tests). Observers are borrowed.
  Trainer(const TrainSettings& settings, std::shared_ptr<Model> model, std::shared_ptr<const Dataset> data,
          std::shared_ptr<Comm> comm, std::string checkpoint_root, std::vector<Observer*> observers);

  // Trains from the current step to the last, or until a signal or an observer ends it; then a checkpoint has been written.
  Outcome run();

  // Goes on from this checkpoint; `run` continues bitwise as if it had never stopped.
  void resume(const Checkpoint& checkpoint);

  int64_t step() const { return step_; }
  int64_t tokens() const { return tokens_; }
  const Evaluation& last_evaluation() const { return last_evaluation_; }
  const MetricsWindow& last_window() const { return last_window_; }  // the last one that was flushed
  const Model& model() const { return *model_; }
  const Optimizer& optimizer() const { return optimizer_; }

 private:
  std::vector<Batch> load_micro_batches() const;
  StepContext step_context() const;
  double apply_gradients(double lr, const StepResult& result);
  void end_routers_step(const StepResult& result);
  void apply(Site& site, const Event& event);
  Request observe(const StepResult& result, double lr, double norm);
  void evaluate_now(bool final);
  void save();
  bool due(int64_t every) const { return every > 0 && step_ % every == 0; }

  TrainSettings settings_;
  std::shared_ptr<Model> model_;
  std::shared_ptr<const Dataset> data_;
  std::shared_ptr<Comm> comm_;
  std::string checkpoint_root_;
  std::vector<Observer*> observers_;
  std::unique_ptr<Objective> objective_;
  Optimizer optimizer_;
  MetricsWindow window_;
  MetricsWindow last_window_;
  Evaluation last_evaluation_;
  int64_t step_ = 0;
  int64_t tokens_ = 0;
  int64_t saved_step_ = -1;
};

}  // namespace moelab
