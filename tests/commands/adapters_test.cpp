// A dense model is trained, frozen, and adapted: it learns other sources, the base keeps its bits, checkpoints may leave it out,
// runs go on bitwise, and adapters fold back into the dense weights.
#include "tests/commands/commands_support.h"

#include "core/io/checkpoint.h"
#include "core/model/model.h"
#include "experiments/experiment.h"
#include "tests/support/compare.h"
#include "trainers/state.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>
#include <map>

namespace moelab::test {
namespace {

const std::string kAdapterBase = R"(
[model]
layers = 2
width = 16
heads = 2
context = 8
dense_width = 16
dtype = "float64"
moe_layers = "none"
[data]
name = "markov"
validation_documents = 4
[train]
steps = 20
batch = 4
)";
const std::string kAdapterTables =
    "extends = \"base.toml\"\n[init]\nfrom = \"base\"\n[adapters]\nexperts = 3\n[adapters.router]\nk = 2\n"
    "[data]\nsource_seed = 9\n";

std::map<std::string, Tensor> model_in(const std::string& run) {
  const Checkpoint checkpoint = load_latest(run + "/ckpt");
  std::map<std::string, Tensor> tensors;
  for (const NamedTensor& entry : checkpoint.content.groups.at("model")) tensors[entry.name] = entry.tensor;
  return tensors;
}

ScratchFolder& with_base(ScratchFolder& folder) {
  folder.put("base.toml", kAdapterBase);
  folder.put("adapt.toml", kAdapterTables);
  REQUIRE(moelab_in(folder.path(), {"run", "base.toml", "--out", "base", "--quiet"}).code == 0);
  return folder;
}

ProgramResult adapt(const ScratchFolder& folder, const std::string& out, const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments{"run", "adapt.toml", "--out", out, "--quiet"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return moelab_in(folder.path(), arguments);
}

TEST_CASE("adapting leaves every tensor of the base bitwise as it was, and only adapters in the optimiser") {
  ScratchFolder folder;
  with_base(folder);
  const ProgramResult result = adapt(folder, "all");
  CAPTURE(result.err);
  REQUIRE(result.code == 0);
  const auto base = model_in(folder / "base"), adapted = model_in(folder / "all");
  for (const auto& [name, tensor] : base) {
    CAPTURE(name);
    CHECK(at::equal(adapted.at(name), tensor));
  }
  for (const auto& [name, tensor] : adapted) CHECK(base.contains(name) != contains(name, ".adapters."));
  CHECK(adapted.at("layers.0.adapters.ffn.experts.0.w_down_b").abs().max().item<double>() > 0);  // they did learn
  const Checkpoint checkpoint = load_latest(folder / "all/ckpt");
  for (const NamedTensor& moment : checkpoint.content.groups.at("optimizer"))
    CHECK(contains(moment.name, ".adapters."));
}

TEST_CASE("a checkpoint without its base is small, goes on bitwise, and refuses another base") {
  ScratchFolder folder;
  with_base(folder);
  REQUIRE(adapt(folder, "whole").code == 0);
  const std::vector<std::string> trained{"--set", "checkpoint.holds=trained", "--set", "checkpoint.every=10",
                                         "--set", "checkpoint.keep_last=3"};
  REQUIRE(adapt(folder, "part", trained).code == 0);
  const auto part = model_in(folder / "part"), whole = model_in(folder / "whole");
  for (const auto& [name, tensor] : part) {
    CHECK(contains(name, ".adapters."));
    CHECK(at::equal(whole.at(name), tensor));
  }
  std::filesystem::remove_all(folder / "part/ckpt/step-20");
  REQUIRE(moelab_in(folder.path(), {"resume", "part", "--quiet"}).code == 0);
  for (const auto& [name, tensor] : model_in(folder / "part")) CHECK(at::equal(whole.at(name), tensor));
  REQUIRE(moelab_in(folder.path(), {"run", "base.toml", "--out", "other", "--quiet", "--set", "seed=5"}).code == 0);
  std::filesystem::remove_all(folder / "base");
  std::filesystem::rename(folder / "other", folder / "base");
  const ProgramResult refused = moelab_in(folder.path(), {"eval", "part"});
  CHECK(refused.code == 5);
  CHECK(contains(refused.err, "adapters of another base"));
}

TEST_CASE("a source that is missing or fits another model is refused with its tensor") {
  ScratchFolder folder;
  with_base(folder);
  const ProgramResult missing = adapt(folder, "a", {"--set", "init.from=nowhere"});
  CHECK(missing.code == 5);
  CHECK(contains(missing.err, "nowhere' is no run folder, checkpoint or safetensors file"));
  const ProgramResult other = adapt(folder, "b", {"--set", "model.dense_width=24"});
  CHECK(other.code == 5);
  CHECK(contains(other.err, "tensor 'layers.0.dense.w_gate' has another shape"));
  const ProgramResult deeper = adapt(folder, "c", {"--set", "model.layers=3"});
  CHECK(deeper.code == 5);
  CHECK(contains(deeper.err, "has no tensor 'layers.2.norm_attention'"));
  CHECK(moelab_in(folder.path(), {"check", "adapt.toml", "--set", "init.from=nowhere"}).code == 5);
}

// Validation loss of a run that adapts to a source of its own.
double loss_of(const ScratchFolder& folder, const std::string& run) {
  return nlohmann::json::parse(text_of(folder / (run + "/summary.json"))).at("eval.loss").get<double>();
}

TEST_CASE("a base of one source learns two others: validation loss falls on both, and the base keeps its bits") {
  ScratchFolder folder;
  folder.put("base.toml", kAdapterBase);
  folder.put("adapt.toml", kAdapterTables);
  REQUIRE(moelab_in(folder.path(),
                    {"run", "base.toml", "--out", "base", "--quiet", "--set", "train.steps=150", "--set", "optimizer.lr=0.01"})
              .code == 0);
  const auto base = model_in(folder / "base");
  for (const std::string seed : {"9", "10"}) {
    const auto run = [&](const std::string& steps) {
      const std::string out = "source" + seed + "-" + steps;
      const ProgramResult result = adapt(
          folder, out, {"--set", "data.source_seed=" + seed, "--set", "train.steps=" + steps, "--set", "optimizer.lr=0.01"});
      CAPTURE(result.err);
      REQUIRE(result.code == 0);
      return out;
    };
    const std::string before = run("0"), after = run("150");
    CAPTURE(loss_of(folder, before), loss_of(folder, after));
    CHECK(loss_of(folder, after) < 0.98 * loss_of(folder, before));
    const auto adapted = model_in(folder / after);
    for (const auto& [name, tensor] : base) CHECK(at::equal(adapted.at(name), tensor));
  }
}

TEST_CASE("adapters without a base from [init] are named in `check`, in the events and in the verdict") {
  ScratchFolder folder;
  with_base(folder);
  const std::string line = "the adapters stand on a base of random weights";
  const std::vector<std::string> alone{"--set", "init.from=\"\""};
  CHECK(contains(moelab_in(folder.path(), {"check", "adapt.toml", "--set", "init.from=\"\""}).out, "warning: " + line));
  CHECK(json_of(moelab_in(folder.path(), {"check", "adapt.toml", "--json"})).at("warnings").empty());
  const ProgramResult result = adapt(folder, "alone", alone);
  REQUIRE(result.code == 0);
  CHECK(contains(result.err, line));
  CHECK(contains(text_of(folder / "alone/events.jsonl"), "untrained_base"));
  CHECK(json_of(adapt(folder, "json", {"--set", "init.from=\"\"", "--json"})).at("verdict") == "untrained base");
  REQUIRE(adapt(folder, "based").code == 0);
  CHECK_FALSE(contains(text_of(folder / "based/events.jsonl"), "untrained_base"));
}

// Of the newest checkpoint of a run, on tokens that nobody trained on.
Tensor logits_in(const std::string& run) {
  const Experiment e = load_experiment(load_config(run + "/config.resolved.toml"));
  restore_model(load_latest(run + "/ckpt"), *e.model);
  Batch batch;
  batch.tokens_BL = at::arange(24, at::kLong).mul(7).remainder(e.data->vocabulary()).view({3, 8});
  StepContext context;
  context.mode = Mode::kEval;
  const at::NoGradGuard no_grad;
  return e.model->forward(batch, context).logits_BLV;
}

double eval_loss(const ScratchFolder& folder, const std::string& run) {
  const ProgramResult result = moelab_in(folder.path(), {"eval", run, "--json"});
  CAPTURE(result.err);
  REQUIRE(result.code == 0);
  return json_of(result).at("eval.loss").get<double>();
}

TEST_CASE("folded adapters are a dense run with the logits of the adapted one, from which others start") {
  ScratchFolder folder;
  with_base(folder);
  struct Fold {
    std::string targets, decision, experts, router;
    std::vector<std::string> choice;
  };
  const std::vector<Fold> folds{{"ffn", "linear", "1", "softmax_topk", {"--expert", "0"}},
                                {"all", "linear", "1", "softmax_topk", {"--expert", "0"}},
                                {"ffn,attention.q", "linear", "1", "softmax_topk", {"--weights", "1"}},
                                {"all", "layer", "1", "softmax_topk", {"--weights", "1"}},
                                {"attention.v,dense.w_down",
                                 "linear",
                                 "3",
                                 "uniform",
                                 {"--weights", "0.3333333333333333,0.3333333333333333,0.3333333333333333"}}};
  const Tensor base = logits_in(folder / "base");
  for (size_t f = 0; f < folds.size(); ++f) {
    const Fold& fold = folds[f];
    CAPTURE(fold.targets, fold.decision);
    const std::string adapted = "adapted" + std::to_string(f), dense = "dense" + std::to_string(f);
    const ProgramResult run = adapt(
        folder, adapted,
        {"--set", "adapters.experts=" + fold.experts, "--set", "adapters.router.k=" + fold.experts, "--set",
         "adapters.router.name=" + fold.router, "--set", "adapters.expert.targets=\"" + fold.targets + "\"", "--set",
         "adapters.expert.decision=" + fold.decision});
    CAPTURE(run.err);
    REQUIRE(run.code == 0);
    std::vector<std::string> command{"ckpt", "fold", adapted, "--out", dense};
    command.insert(command.end(), fold.choice.begin(), fold.choice.end());
    const ProgramResult folded = moelab_in(folder.path(), command);
    CAPTURE(folded.err);
    REQUIRE(folded.code == 0);
    const Tensor logits = logits_in(folder / dense);
    CHECK(relative_error(logits, logits_in(folder / adapted)) < 1e-10);
    CHECK(relative_error(logits, base) > 1e-4);
    for (const auto& [name, tensor] : model_in(folder / dense)) CHECK_FALSE(contains(name, ".adapters."));
    CHECK(std::abs(eval_loss(folder, dense) / eval_loss(folder, adapted) - 1) < 1e-10);
    REQUIRE(adapt(folder, "again" + std::to_string(f), {"--set", "init.from=" + dense, "--set", "train.steps=0"}).code == 0);
    CHECK(std::abs(eval_loss(folder, "again" + std::to_string(f)) / eval_loss(folder, dense) - 1) < 1e-10);
  }
}

TEST_CASE("what cannot be folded is refused in one line, and nothing is written") {
  ScratchFolder folder;
  with_base(folder);
  REQUIRE(adapt(folder, "adapted").code == 0);
  const auto refused = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"ckpt", "fold"});
    arguments.insert(arguments.end(), {"--out", "dense"});
    const ProgramResult result = moelab_in(folder.path(), arguments);
    CHECK(result.code != 0);
    CHECK_FALSE(std::filesystem::exists(folder / "dense"));
    return result.err;
  };
  CHECK(contains(refused({"adapted", "--weights", "0.5,0.5,0"}), "a weighted sum of whole feed-forward layers"));
  CHECK(contains(refused({"adapted", "--expert", "3"}), "layers.0.adapters.ffn has the experts 0 to 2"));
  CHECK(contains(refused({"adapted", "--weights", "1"}), "layers.0.adapters.ffn has 3 experts, but 1 weights"));
  CHECK(contains(refused({"base", "--expert", "0"}), "has no adapters"));
  CHECK(contains(refused({"nowhere", "--expert", "0"}), "no run folder"));
  CHECK(contains(refused({"adapted"}), "expert"));
}

TEST_CASE("a causal model whose heads see all is refused by `check`, with the place") {
  ScratchFolder folder;
  folder.put("full.toml", kAdapterBase + "[attention.expert]\nmask = \"full\"\n");
  const ProgramResult result = moelab_in(folder.path(), {"check", "full.toml"});
  CHECK(result.code == 2);
  CHECK(contains(result.err, "full.toml:17:1: layer 0: mask = \"full\""));
}

}  // namespace
}  // namespace moelab::test
