// `moelab run`, `resume` and `eval`.
#include "experiments/cli.h"

#include "core/error.h"
#include "experiments/experiment.h"
#include "experiments/run_folder.h"
#include "experiments/status_line.h"
#include "experiments/summary.h"
#include "trainers/signals.h"
#include "trainers/state.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <exception>
#include <filesystem>
#include <memory>

namespace moelab {
namespace {

constexpr int64_t kSampleBytes = 200;

struct RunArguments {
  std::string path;
  std::vector<std::string> overrides;
  std::string out;
  bool json = false;
  bool quiet = false;
};

const char* outcome_word(Outcome outcome) {
  switch (outcome) {
    case Outcome::kDone: return "done";
    case Outcome::kStoppedByObserver: return "stopped";
    case Outcome::kInterrupted: return "interrupted";
    case Outcome::kTerminated: return "terminated";
  }
  return "?";
}

void write_summary(const RunFolder& folder, const nlohmann::json& summary) {
  write_file_atomically(folder.file("summary.json"), summary.dump(2) + "\n");
}

// An interrupted run ends with its documented exit code; nothing is wrong, so the message says how to go on.
void end_interrupted(Outcome outcome, const RunFolder& folder, int64_t step) {
  const ExitCode code = outcome == Outcome::kTerminated ? ExitCode::kTerminated : ExitCode::kInterrupted;
  throw Error(code, fmt::format("{} after step {}, checkpoint saved; go on with `moelab resume {}`", outcome_word(outcome), step,
                                folder.path()));
}

// The error itself goes on to the user, also where a full disk takes no word of it.
void record_failure(RunFolder& folder, RecordWriter& records, const Experiment& experiment, const Trainer& trainer,
                    const std::exception& failure) {
  const auto* known = dynamic_cast<const Error*>(&failure);
  const char* outcome = known && known->code() == ExitCode::kDiverged ? "diverged" : "failed";
  try {
    const std::string line = first_line(failure.what());  // LibTorch appends a backtrace with the machine's paths
    records.event(trainer.step(), outcome, {{"message", line}});
    folder.set_status(fmt::format("failed: {}", line));
    write_summary(folder, summarise(experiment, trainer, outcome, records.seconds(), {}, line));
  } catch (const Error&) {
  }
}

bool is_full_disk(const std::exception& error) {
  const auto* known = dynamic_cast<const Error*>(&error);
  return known && known->code() == ExitCode::kData && std::string(error.what()).starts_with("cannot write ");
}

// Trains from where `checkpoint` left off (null: from the start), and reports.
void train(Experiment& experiment, RunFolder& folder, const Checkpoint* checkpoint, const RunArguments& arguments) {
  folder.keep_tokenizer(experiment.data->tokenizer());
  RecordWriter records(folder);
  StatusLine status(experiment.data->shape().kind);
  std::vector<Observer*> observers{&records};
  if (!arguments.quiet) observers.push_back(&status);
  Trainer trainer(experiment.train, experiment.model, experiment.data, single_comm(), folder.checkpoints(), observers);
  if (checkpoint) {
    trainer.resume(*checkpoint);
    records.continue_from(trainer.tokens());
    for (const std::string& warning : checkpoint->warnings) fmt::print(stderr, "moelab: {}\n", warning);
    records.event(trainer.step(), "resumed", {{"folder", std::filesystem::path(checkpoint->folder).filename().string()}});
  }
  for (const std::string& label : experiment.model->training_sees_future())
    fmt::print(stderr, "moelab: {}: its training loss sees the future; compare evaluations only\n", label);
  if (const std::string line = untrained_base(experiment); !line.empty()) {
    fmt::print(stderr, "moelab: {}\n", line);
    if (!checkpoint) records.event(0, "untrained_base", {{"message", line}});
  }
  folder.set_status("running");
  catch_signals();
  Outcome outcome = Outcome::kDone;
  try {
    within_memory(experiment.root, [&] { outcome = trainer.run(); });
  } catch (const std::exception& error) {
    record_failure(folder, records, experiment, trainer, error);
    if (is_full_disk(error)) data_error(fmt::format("{}; free some space, then `moelab resume {}`", error.what(), folder.path()));
    throw;
  }
  const bool done = outcome == Outcome::kDone;
  const nlohmann::json summary = summarise(experiment, trainer, outcome_word(outcome), records.seconds(),
                                           done ? ngram_baselines(experiment) : std::vector<double>{});
  write_summary(folder, summary);
  folder.set_status(outcome_word(outcome));
  if (!done) end_interrupted(outcome, folder, trainer.step());
  if (arguments.json) fmt::print("{}\n", summary.dump(2));
  else fmt::print("{}", final_text(experiment, summary, sample_text(experiment, kSampleBytes, trainer.step()), folder.path()));
}

void run(const RunArguments& arguments) {
  const Table root = load_config(arguments.path, arguments.overrides);
  prepare_process(read_train_settings(root));
  Experiment experiment = start_experiment(root);
  const auto folder = RunFolder::create(arguments.out, experiment.name, experiment.config_id, experiment.train.seed,
                                        arguments.path, resolved_text(root));
  train(experiment, *folder, nullptr, arguments);
}

void resume(const RunArguments& arguments) {
  const auto folder = RunFolder::open(arguments.path);
  folder->lock();
  const Table root = load_config(folder->resolved_config());
  prepare_process(read_train_settings(root));
  Experiment experiment = start_experiment(root, folder->tokenizer());
  // A run that was killed before its first checkpoint starts again: the same draws, the same result.
  if (!std::filesystem::exists(folder->checkpoints()) || checkpoint_steps(folder->checkpoints()).empty()) {
    folder->drop_records_after(-1);
    return train(experiment, *folder, nullptr, arguments);
  }
  const Checkpoint checkpoint = load_latest(folder->checkpoints());
  folder->drop_records_after(checkpoint.step);
  train(experiment, *folder, &checkpoint, arguments);
}

void eval(const RunArguments& arguments) {
  const auto folder = RunFolder::open(arguments.path);
  const Table root = load_config(folder->resolved_config());
  prepare_process(read_train_settings(root));
  require_checkpoint(folder->path());
  Experiment experiment = start_experiment(root, folder->tokenizer());
  const Checkpoint checkpoint = load_latest(folder->checkpoints());
  for (const std::string& warning : checkpoint.warnings) fmt::print(stderr, "moelab: {}\n", warning);
  require_same_data(checkpoint, *experiment.data);
  restore_model(checkpoint, *experiment.model);
  const std::shared_ptr<Comm> comm = single_comm();
  const TrainSettings& train = experiment.train;
  const EvalSettings settings{0, train.batch, train.seed, checkpoint.step, train.steps, train.eval_prompt};
  Evaluation evaluation;
  within_memory(root, [&] { evaluation = evaluate(*experiment.model, *experiment.data, settings, *comm); });
  nlohmann::json out{{"step", checkpoint.step}};
  for (const auto& [name, value] : evaluation_metrics(evaluation)) out[name] = value;
  if (arguments.json) fmt::print("{}\n", out.dump(2));
  else
    for (const auto& [name, value] : out.items()) fmt::print("{:<44} {}\n", name, value.dump());
}

CLI::App* add_verb(CLI::App& app, const char* name, const char* what, RunArguments& arguments, const char* path,
                   const char* example) {
  CLI::App* verb = app.add_subcommand(name, what);
  verb->add_option(path, arguments.path, "what to work on")->required();
  verb->add_flag("--json", arguments.json, "print the result as one JSON document");
  verb->add_flag("--quiet", arguments.quiet, "no progress on stderr");
  verb->footer(fmt::format("Example: {}", example));
  return verb;
}

}  // namespace

void add_run_command(CLI::App& app) {
  const auto arguments = std::make_shared<RunArguments>();
  CLI::App* run_verb = add_verb(app, "run", "train as an experiment file says", *arguments, "EXP.toml",
                                "moelab run experiments/quickstart.toml --set train.steps=20");
  run_verb->add_option("--set", arguments->overrides, "override a value: a.b=v")->take_all();
  run_verb->add_option("--out", arguments->out, "the run's folder (default: runs/<name>/<time>-<config id>-s<seed>)");
  run_verb->callback([arguments] { run(*arguments); });
  add_verb(app, "resume", "go on with a run that was stopped or killed", *arguments, "RUN",
           "moelab resume runs/quickstart/20260101T000000Z-1a2b3c4d-s0")
      ->callback([arguments] { resume(*arguments); });
  add_verb(app, "eval", "evaluate a run's newest checkpoint", *arguments, "RUN",
           "moelab eval runs/quickstart/20260101T000000Z-1a2b3c4d-s0 --json")
      ->callback([arguments] { eval(*arguments); });
}

}  // namespace moelab
