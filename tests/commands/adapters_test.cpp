// A dense model is trained, frozen, and adapted: the base keeps its bits, checkpoints may leave it out, and runs go on bitwise.
#include "tests/commands/commands_support.h"

#include "core/io/checkpoint.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

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
  CHECK(moelab_in(folder.path(), {"check", "adapt.toml", "--set", "init.from=nowhere"}).code == 0);  // it trains nothing
}

}  // namespace
}  // namespace moelab::test
