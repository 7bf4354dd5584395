// `moelab ckpt inspect`: what a checkpoint holds, and whether it is as it was written. `moelab ckpt fold`: adapters made part of
// the dense weights that they stand on.
#include "experiments/cli.h"

#include "core/error.h"
#include "core/io/checkpoint.h"
#include "experiments/catalogue.h"
#include "experiments/fold.h"
#include "experiments/run_folder.h"
#include "experiments/text_table.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <memory>

namespace moelab {
namespace {

struct CkptArguments {
  std::string folder;
  bool json = false;
};

// A run, its folder of checkpoints, or one checkpoint: the first two mean the newest.
std::string checkpoint_folder(const std::string& given) {
  require_checkpoint(given);
  const std::string root = std::filesystem::is_directory(given + "/ckpt") ? given + "/ckpt" : given;
  if (!std::filesystem::is_directory(root)) data_error(fmt::format("'{}' is no folder", given));
  const std::vector<int64_t> steps = checkpoint_steps(root);
  return steps.empty() ? root : fmt::format("{}/step-{}", root, steps.front());
}

Json tensors_json(const CheckpointFile& file) {
  Json tensors = Json::array();
  for (const TensorEntry& t : file.tensors) tensors.push_back({{"name", t.name}, {"dtype", t.dtype}, {"shape", t.shape}});
  return tensors;
}

Json checkpoint_json(const std::string& folder, const CheckpointSummary& summary) {
  Json files = Json::array();
  for (const CheckpointFile& file : summary.files)
    files.push_back({{"name", file.name},
                     {"size", file.digest.size},
                     {"xxh3", file.digest.xxh3},
                     {"state", file.damage.empty() ? "ok" : "damaged"},
                     {"damage", file.damage},
                     {"tensors", tensors_json(file)}});
  return {{"folder", folder}, {"step", summary.step}, {"files", files}};
}

std::string checkpoint_text(const std::string& folder, const CheckpointSummary& summary) {
  std::string text = fmt::format("{}: step {}\n", folder, summary.step);
  TextRows files, tensors;
  for (const CheckpointFile& file : summary.files) {
    files.push_back(
        {file.name, fmt::format("{} bytes", file.digest.size), file.digest.xxh3, file.damage.empty() ? "ok" : "DAMAGED"});
    for (const TensorEntry& t : file.tensors) tensors.push_back({t.name, t.dtype, fmt::format("[{}]", fmt::join(t.shape, ", "))});
  }
  return text + aligned_text(files, 2) + "\n" + aligned_text(tensors, 2);
}

void refuse_damage(const CheckpointSummary& summary) {
  for (const CheckpointFile& file : summary.files)
    if (!file.damage.empty()) data_error(file.damage);
}

void run_inspect(const CkptArguments& arguments) {
  const std::string folder = checkpoint_folder(arguments.folder);
  const CheckpointSummary summary = inspect_checkpoint(folder);
  fmt::print("{}", arguments.json ? checkpoint_json(folder, summary).dump(2) + "\n" : checkpoint_text(folder, summary));
  refuse_damage(summary);
}

struct FoldArguments {
  std::string run;
  std::string out;
  int64_t expert = -1;
  std::vector<double> weights;
};

void run_fold(const FoldArguments& arguments) {
  FoldedExperts experts{.weight_E = arguments.weights};
  if (arguments.weights.empty()) experts.expert = arguments.expert;
  fold_run(arguments.run, arguments.out, experts);
  fmt::print("{} is a dense run: `moelab eval {}`, or [init] from = \"{}\"\n", arguments.out, arguments.out, arguments.out);
}

void add_fold(CLI::App& ckpt) {
  const auto arguments = std::make_shared<FoldArguments>();
  CLI::App* fold = ckpt.add_subcommand("fold", "make the adapters of a run part of its dense weights, as a run of its own");
  fold->add_option("RUN", arguments->run, "a run with [adapters]; its newest checkpoint is read")->required();
  fold->add_option("--out", arguments->out, "the folder of the dense run")->required();
  CLI::Option_group* choice = fold->add_option_group("experts", "what a router would have to say of every row");
  choice->add_option("--expert", arguments->expert, "this expert alone, with weight 1")->check(CLI::NonNegativeNumber);
  choice->add_option("--weights", arguments->weights, "a weight for each expert, \"0.5,0.5\"; of linear maps alone")
      ->delimiter(',');
  choice->require_option(1);
  fold->footer("Example: moelab ckpt fold runs/adapted --expert 0 --out runs/dense");
  fold->callback([arguments] { run_fold(*arguments); });
}

}  // namespace

void add_ckpt_command(CLI::App& app) {
  const auto arguments = std::make_shared<CkptArguments>();
  CLI::App* ckpt = app.add_subcommand("ckpt", "look into checkpoints, fold adapters");
  ckpt->require_subcommand(1);
  ckpt->footer("Example: moelab ckpt inspect runs/quickstart/20260101T000000Z-1a2b3c4d-s0");
  CLI::App* inspect = ckpt->add_subcommand("inspect", "step, files, hashes and tensors; exit 5 when damaged");
  inspect->add_option("FOLDER", arguments->folder, "a checkpoint, or a run (then its newest)")->required();
  inspect->add_flag("--json", arguments->json, "print one JSON document");
  inspect->footer("Example: moelab ckpt inspect runs/quickstart/20260101T000000Z-1a2b3c4d-s0/ckpt/step-600");
  inspect->callback([arguments] { run_inspect(*arguments); });
  add_fold(*ckpt);
}

}  // namespace moelab
