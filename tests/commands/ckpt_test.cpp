// `ckpt inspect` on good and damaged checkpoints.
#include "tests/commands/commands_support.h"

#include "core/io/checkpoint.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>

#include <catch2/catch_test_macros.hpp>

namespace moelab::test {
namespace {

// Steps 5 and 9 below `root`.
void write_two_checkpoints(const std::string& root) {
  CheckpointContent content;
  content.groups["model"] = {{"layers.0.moe.router.weight", at::ones({4, 2}, at::kFloat)}, {"prices", at::arange(3, at::kLong)}};
  content.state["step"] = 5;
  write_checkpoint(root, 5, content, 2);
  write_checkpoint(root, 9, content, 2);
}

void flip_last_byte(const ScratchFolder& folder, const std::string& name) {
  std::string bytes = text_of(folder / name);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  folder.put(name, bytes);
}

TEST_CASE("inspect lists files with sizes and hashes, and tensors with types and shapes") {
  const ScratchFolder folder;
  write_two_checkpoints(folder / "ckpt");
  const ProgramResult result = moelab_run({"ckpt", "inspect", folder / "ckpt/step-5", "--json"});
  REQUIRE(result.code == 0);
  const nlohmann::json report = json_of(result);
  CHECK(report.at("step") == 5);
  REQUIRE(report.at("files").size() == 2);
  const nlohmann::json& model = report.at("files").at(0);
  CHECK(model.at("name") == "model.safetensors");
  CHECK(model.at("state") == "ok");
  CHECK(model.at("size") == text_of(folder / "ckpt/step-5/model.safetensors").size());
  CHECK(model.at("xxh3").get<std::string>().size() == 32);
  const nlohmann::json expected = nlohmann::json::parse(R"([
      {"name": "layers.0.moe.router.weight", "dtype": "F32", "shape": [4, 2]},
      {"name": "prices", "dtype": "I64", "shape": [3]}])");
  CHECK(model.at("tensors") == expected);
}

TEST_CASE("a run's folder means its newest checkpoint") {
  const ScratchFolder folder;
  write_two_checkpoints(folder / "ckpt");
  CHECK(json_of(moelab_run({"ckpt", "inspect", folder.path(), "--json"})).at("step") == 9);
  CHECK(contains(moelab_run({"ckpt", "inspect", folder / "ckpt"}).out, "step 9\n"));
}

TEST_CASE("a damaged file is named, and the program ends with 5") {
  const ScratchFolder folder;
  write_two_checkpoints(folder / "ckpt");
  flip_last_byte(folder, "ckpt/step-9/model.safetensors");
  const ProgramResult result = moelab_run({"ckpt", "inspect", folder.path(), "--json"});
  CHECK(result.code == 5);
  CHECK(contains(result.err, "model.safetensors"));
  const nlohmann::json files = json_of(result).at("files");
  CHECK(files.at(0).at("state") == "damaged");
  CHECK(files.at(1).at("state") == "ok");
}

TEST_CASE("a damaged manifest, a missing one and a missing folder end with 5 and one line") {
  const ScratchFolder folder;
  write_two_checkpoints(folder / "ckpt");
  flip_last_byte(folder, "ckpt/step-9/manifest.json");
  std::filesystem::remove(folder / "ckpt/step-5/manifest.json");
  for (const char* name : {"ckpt/step-9", "ckpt/step-5", "nowhere"}) {
    CAPTURE(name);
    const ProgramResult result = moelab_run({"ckpt", "inspect", folder / name});
    CHECK(result.code == 5);
    CHECK(result.out.empty());
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  }
}

}  // namespace
}  // namespace moelab::test
