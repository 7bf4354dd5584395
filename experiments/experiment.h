// An experiment file made into live objects. Stop 2 of the reading path: main → experiment (config) → trainer.
#pragma once

#include "core/config.h"
#include "core/dataset.h"
#include "core/model/model.h"
#include "trainers/settings.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace moelab {

struct Experiment {
  Table root;
  std::string name;
  std::string config_id;  // eight hex digits of the resolved values: equal ids mean equal configs
  TrainSettings train;
  std::shared_ptr<const Dataset> data;
  std::shared_ptr<Model> model;
};

// Tokens of a sequence of the model that `[model]` names; 0 for models that read none.
int64_t model_context(const Table& root);

// Reads everything and refuses what does not fit, before anything is created in a run folder. `tokenizer` is what an earlier run
// of this experiment learned, Dataset::tokenizer(); "" = learn anew.
Experiment load_experiment(const Table& root, const std::string& tokenizer = "");

// The same, with what [init] names in the model: for commands that run it.
Experiment start_experiment(const Table& root, const std::string& tokenizer = "");

// Where adapters stand on weights that nothing trained: a line that says so; "" = they do not.
std::string untrained_base(const Experiment& experiment);

// Does what needs memory in proportion to the batch. Where it runs out: Error(kUsage) at [train] batch, with the remedies.
void within_memory(const Table& root, const std::function<void()>& work);

// The parameters that the process sets for its own run: threads, memory kept, denormals.
void prepare_process(const TrainSettings& settings);

}  // namespace moelab
