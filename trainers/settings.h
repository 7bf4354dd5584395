// What `[train]`, `[objective]`, `[optimizer]`, `[schedule]`, `[eval]`, `[checkpoint]`, `[init]` and `[data]` say. Options are
// declared once, here.
#pragma once

#include "core/config.h"
#include "core/dataset.h"

#include <memory>
#include <string>

namespace moelab {

struct OptimizerSettings {
  std::string name = "adamw";
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, momentum = 0.9, weight_decay = 0.1, router_lr_scale = 1;
  bool skip_unused_experts = false;
};

struct ScheduleSettings {
  int64_t warmup_steps = 0;
  std::string decay = "cosine";
  double final_fraction = 0.1;
  double decay_fraction = 0.1;       // wsd only
  std::string decay_shape = "linear";
};

struct TrainSettings {
  int64_t seed = 0;
  int64_t steps = 200;
  int64_t batch = 16;           // samples per step, over all micro-batches and ranks
  int64_t micro_batches = 1;    // per rank
  bool bf16 = false;
  bool recompute = false;
  double clip_norm = 1;         // 0 = no clipping
  int64_t log_every = 10;
  int64_t eval_every = 0;       // 0 = only at the end
  int64_t eval_prompt = 0;      // tokens that begin each sequence of an evaluation unscored
  int64_t eval_sequences = 0;   // during training; 0 = the whole split. The final evaluation always reads all of it
  bool ngram_baselines = false; // fit n-gram models on the training bytes and report them beside the model
  int64_t checkpoint_every = 0; // 0 = only at the end
  int64_t keep_last = 2;
  bool checkpoint_trained_only = false;
  std::string init_from;        // what an earlier run learned; "" = nothing
  double init_noise = 0;        // on experts that start as copies of its dense layers
  int64_t threads = 0;          // 0 = the library's choice
  std::string objective = "task";
  Options objective_options;    // declared by the objective's entry
  bool allow_noncausal_training = false;
  OptimizerSettings optimizer;
  ScheduleSettings schedule;
};

// Each table's declaration, for `describe`, `check` and the docs.
OptionSpec plugins_option();
OptionSpecs train_options();
OptionSpecs optimizer_options();
OptionSpecs schedule_options();
OptionSpecs eval_options();
OptionSpecs checkpoint_options();
OptionSpecs init_options();

TrainSettings read_train_settings(const Table& root);

// `[objective] name` with its own options, or `[train] objective`. After plugins are loaded: one of them may bring it.
void read_objective(const Table& root, TrainSettings& settings);

// The data set that `[data] name` asks for; an unknown one is Error(kUsage) with its place.
const DatasetEntry& dataset_entry(const Table& root);

// `[data] name` and its own options; `context` is the model's, 0 where it reads no tokens. `tokenizer` is what an earlier run
// learned; "" = learn anew.
std::shared_ptr<const Dataset> read_dataset(const Table& root, int64_t context, const std::string& tokenizer = "");

// Refuses tables that no reader knows.
void check_top_level(const Table& root);

// Learning rate of a step (counted from 0): linear warm-up, then constant, or a cosine or a line down to final_fraction; `wsd`
// stays at the peak and falls over the last decay_fraction of all steps.
double learning_rate(double peak, const ScheduleSettings& schedule, int64_t step, int64_t total_steps);

}  // namespace moelab
