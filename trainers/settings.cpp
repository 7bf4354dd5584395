#include "trainers/settings.h"

#include "core/error.h"
#include "trainers/objective.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moelab {
namespace {

OptionSpecs top_level_options() {
  return {
      option("name", "run", "names the folder below runs/"),
      option("seed", 0, "of everything random: data order, initial weights, noise").at_least(0),
      plugins_option(),
  };
}

OptionSpecs data_options(const OptionSpecs& own) {
  OptionSpecs specs{option("name", "bytes", "which data set")};
  specs.insert(specs.end(), own.begin(), own.end());
  return specs;
}

OptimizerSettings read_optimizer(const Table& table) {
  const Options o = table.options(optimizer_options());
  return {.name = o.text("name"),
          .lr = o.real("lr"),
          .beta1 = o.real("beta1"),
          .beta2 = o.real("beta2"),
          .epsilon = o.real("epsilon"),
          .momentum = o.real("momentum"),
          .weight_decay = o.real("weight_decay"),
          .router_lr_scale = o.real("router_lr_scale"),
          .skip_unused_experts = o.text("unused_experts") == "skip"};
}

OptionSpecs objective_options(const std::string& name, const OptionSpecs& own) {
  OptionSpecs specs{option("name", name.c_str(), "what one step computes")};
  specs.insert(specs.end(), own.begin(), own.end());
  return specs;
}

// 0 where the decay begins, 1 where it is over.
double decay_progress(const ScheduleSettings& schedule, int64_t step, int64_t total_steps) {
  int64_t first = schedule.warmup_steps;
  if (schedule.decay == "wsd")
    first = std::max<int64_t>(first, total_steps - std::llround(schedule.decay_fraction * static_cast<double>(total_steps)));
  const auto span = static_cast<double>(std::max<int64_t>(1, total_steps - first));
  return std::clamp(static_cast<double>(step - first) / span, 0.0, 1.0);
}

// Of the way down: 1 at the peak, 0 at the end.
double share_left(const ScheduleSettings& schedule, double progress) {
  if (schedule.decay == "cosine") return 0.5 * (1 + std::cos(std::numbers::pi * progress));
  return 1 - (schedule.decay == "wsd" && schedule.decay_shape == "sqrt" ? std::sqrt(progress) : progress);
}

}  // namespace

OptionSpec plugins_option() {
  return option("plugins", "", "shared libraries with routers or experts of your own, separated by commas").as_paths();
}

OptionSpecs train_options() {
  return {
      option("steps", 200, "optimiser steps").at_least(0),
      option("batch", 16, "sequences, images or vectors per step, over all micro-batches and ranks").at_least(1),
      option("micro_batches", 1, "gradient accumulation: parts that a step's batch is computed in").at_least(1),
      option("precision", "float32", "float32, or bf16 autocast with the router kept in float32").one_of({"float32", "bf16"}),
      option("recompute", false, "recompute each block's activations in the backward pass"),
      option("clip_norm", 1.0, "largest gradient norm; 0 = no clipping").at_least(0),
      option("log_every", 10, "steps per line of metrics.jsonl").at_least(1),
      option("threads", 0, "CPU threads; 0 = the library's choice").at_least(0),
      option("objective", "task", "what one step computes; [objective] names it too, and sets its options"),
      option("allow_noncausal_training", false, "train a causal model with a router that looks ahead; its loss is labelled so"),
  };
}

OptionSpecs optimizer_options() {
  return {
      option("name", "adamw", "update rule").one_of({"adamw", "sgd"}),
      option("lr", 1e-3, "peak learning rate").at_least(0),
      option("beta1", 0.9, "adamw: decay of the first moment").at_least(0).below(1).read_when("name", {"adamw"}),
      option("beta2", 0.95, "adamw: decay of the second moment").at_least(0).below(1).read_when("name", {"adamw"}),
      option("epsilon", 1e-8, "adamw: added to the root of the second moment").at_least(0).read_when("name", {"adamw"}),
      option("momentum", 0.9, "sgd: momentum").at_least(0).below(1).read_when("name", {"sgd"}),
      option("weight_decay", 0.1, "of matrices; vectors, embeddings and routers are not decayed").at_least(0),
      option("router_lr_scale", 1.0, "the routers' learning rate as a multiple of lr").at_least(0),
      option("unused_experts", "zero_grad",
             "an expert without tokens gets a zero gradient (moments and decay go on), or is skipped")
          .one_of({"zero_grad", "skip"}),
  };
}

OptionSpecs schedule_options() {
  return {
      option("warmup_steps", 0, "steps of linear warm-up").at_least(0),
      option("decay", "cosine", "what follows the warm-up; wsd: constant, then down at the end")
          .one_of({"cosine", "linear", "wsd", "constant"}),
      option("final_fraction", 0.1, "where the decay ends, as a fraction of lr").between(0, 1).read_unless("decay", "constant"),
      option("decay_fraction", 0.1, "wsd: the last part of all steps, over which lr falls")
          .between(0, 1)
          .read_when("decay", {"wsd"}),
      option("decay_shape", "linear", "wsd: lr falls with the share p of the decay that is over, or with its root")
          .one_of({"linear", "sqrt"})
          .read_when("decay", {"wsd"}),
  };
}

OptionSpecs eval_options() {
  return {
      option("every", 0, "steps between evaluations; 0 = only at the end").at_least(0),
      option("sequences", 0, "validation sequences, images or vectors of an evaluation during training; 0 = all").at_least(0),
      option("prompt", 0, "tokens that begin each validation sequence, unscored: a prompt that routers may read whole; 0 = none")
          .at_least(0),
      option("baseline", "none", "models to report beside ours: none, or interpolated n-grams of bytes")
          .one_of({"none", "ngram"}),
  };
}

OptionSpecs checkpoint_options() {
  return {
      option("every", 0, "steps between checkpoints; 0 = only at the end").at_least(0),
      option("keep_last", 2, "checkpoints to keep").at_least(1),
      option("holds", "all", "trained: without a base that stands still under adapters, which [init] has to give again")
          .one_of({"all", "trained"}),
  };
}

OptionSpecs init_options() {
  return {option("from", "",
                 "start from what an earlier run learned: its folder, a checkpoint, or a safetensors file; names have to "
                 "match, and routers, experts and adapters that it lacks start anew; where it has a dense feed-forward layer in "
                 "the place of a mixture, each feed-forward expert starts as a copy of that")
              .as_path(),
          option("noise", 0.0,
                 "added to such copies so that they differ: normal, as a multiple of each parameter's standard deviation")
              .at_least(0)};
}

TrainSettings read_train_settings(const Table& root) {
  const Options top = root.options(top_level_options(), root.keys());
  const Table table = root.child("train");
  const Options train = table.options(train_options());
  const Options eval = root.child("eval").options(eval_options());
  const Options checkpoint = root.child("checkpoint").options(checkpoint_options());
  const Options schedule = root.child("schedule").options(schedule_options());
  TrainSettings s;
  s.seed = top.integer("seed");
  s.steps = train.integer("steps");
  s.batch = train.integer("batch");
  s.micro_batches = train.integer("micro_batches");
  s.bf16 = train.text("precision") == "bf16";
  s.recompute = train.flag("recompute");
  s.clip_norm = train.real("clip_norm");
  s.log_every = train.integer("log_every");
  s.threads = train.integer("threads");
  s.objective = train.text("objective");
  s.allow_noncausal_training = train.flag("allow_noncausal_training");
  s.eval_every = eval.integer("every");
  s.eval_sequences = eval.integer("sequences");
  s.eval_prompt = eval.integer("prompt");
  s.ngram_baselines = eval.text("baseline") == "ngram";
  s.checkpoint_every = checkpoint.integer("every");
  s.keep_last = checkpoint.integer("keep_last");
  s.checkpoint_trained_only = checkpoint.text("holds") == "trained";
  const Options init = root.child("init").options(init_options());
  s.init_from = init.text("from");
  s.init_noise = init.real("noise");
  s.optimizer = read_optimizer(root.child("optimizer"));
  s.schedule = {.warmup_steps = schedule.integer("warmup_steps"),
                .decay = schedule.text("decay"),
                .final_fraction = schedule.real("final_fraction"),
                .decay_fraction = schedule.real("decay_fraction"),
                .decay_shape = schedule.text("decay_shape")};
  if (s.batch % s.micro_batches != 0)
    table.fail("micro_batches", fmt::format("batch = {} cannot be split into {} equal micro-batches", s.batch, s.micro_batches));
  return s;
}

const DatasetEntry& dataset_entry(const Table& root) {
  const Table table = root.child("data");
  const std::string name = table.options(data_options({}), table.keys()).text("name");
  try {
    return Registry<DatasetEntry>::instance().find(name);
  } catch (const Error& error) {
    table.fail("name", error.what());
  }
}

std::shared_ptr<const Dataset> read_dataset(const Table& root, int64_t context, const std::string& tokenizer) {
  const Table table = root.child("data");
  const DatasetEntry& entry = dataset_entry(root);
  const Options options = table.options(data_options(entry.options));
  try {
    return make_dataset(entry.name, {context, options, tokenizer});
  } catch (const Error& error) {
    const std::string place = place_of_complaint(table, error.what(), table.has("path") ? "path" : "name");
    throw Error(error.code(), fmt::format("{}: {}", place, error.what()));
  }
}

void check_top_level(const Table& root) {
  root.options(top_level_options(), {"extends", "model", "moe", "attention", "adapters", "layer", "loss", "data", "train",
                                     "objective", "optimizer", "schedule", "eval", "checkpoint", "init", "route"});
}

void read_objective(const Table& root, TrainSettings& settings) {
  const Table table = root.child("objective"), train = root.child("train");
  settings.objective = table.options(objective_options(settings.objective, {}), table.keys()).text("name");
  if (table.has("name") && train.has("objective") && settings.objective != train.options(train_options()).text("objective"))
    table.fail("name", "[train] objective names another one; say it in one place");
  try {
    const ObjectiveEntry& entry = Registry<ObjectiveEntry>::instance().find(settings.objective);
    settings.objective_options = table.options(objective_options(settings.objective, entry.options));
  } catch (const Error& error) {
    if (Registry<ObjectiveEntry>::instance().contains(settings.objective)) throw;
    table.has("name") ? table.fail("name", error.what()) : train.fail("objective", error.what());
  }
}

double learning_rate(double peak, const ScheduleSettings& schedule, int64_t step, int64_t total_steps) {
  if (step < schedule.warmup_steps) return peak * static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps);
  if (schedule.decay == "constant") return peak;
  const double left = share_left(schedule, decay_progress(schedule, step, total_steps));
  return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left);
}

}  // namespace moelab
