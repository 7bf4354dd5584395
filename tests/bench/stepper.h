// Whole training steps of a small model: gradients of one batch, clipping and the optimiser's update.
#pragma once

#include "bench_support.h"

#include "core/comm.h"
#include "core/config.h"
#include "experiments/experiment.h"
#include "trainers/optimizer.h"
#include "trainers/step.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab::bench {

class Stepper {
 public:
  Stepper(const std::string& config, const std::vector<std::string>& more)
      : experiment_(load_experiment(parse_config(config, "step.toml", more))),
        optimizer_(experiment_.train.optimizer, experiment_.model->optimised()),
        batches_{experiment_.data->train_batch(1, 0, 0, experiment_.train.batch, experiment_.train.batch)} {}

  void once() {
    StepContext context;
    context.comm = comm_.get();
    context.seed = 1;
    const Model& model = *experiment_.model;
    model.zero_grad();
    benchmark::DoNotOptimize(compute_step(model, *objective_, batches_, context, experiment_.train.bf16).task_loss);
    const std::vector<NamedTensor> parameters = model.parameters();
    clip_gradients(parameters, gradient_norm(parameters), experiment_.train.clip_norm);
    optimizer_.step(1e-4);
  }

  double flops() const { return 3 * experiment_.model->flops_per_token() * static_cast<double>(batches_.front().rows()); }

 private:
  Experiment experiment_;
  Optimizer optimizer_;
  std::vector<Batch> batches_;
  std::shared_ptr<Comm> comm_ = single_comm();
  std::shared_ptr<Objective> objective_ = make_objective("task");
};

// Lines "AREA/NAME/threads1" and "…/threads2".
inline void add_steps(Suite& suite, const std::string& area, const std::string& name, const std::string& config,
                      const std::vector<std::string>& more) {
  const auto stepper = std::make_shared<Stepper>(config, more);
  for (const int threads : {1, 2})
    suite.add(Line{.name = area + "/" + name + "/threads" + std::to_string(threads),
                   .work = [=] { stepper->once(); },
                   .threads = threads,
                   .counters = {{"flops", stepper->flops()}}});
}

}  // namespace moelab::bench
