// Every experiment of this repository can be checked, and those whose data are at hand can be trained.
#include "tests/commands/commands_support.h"

#include "core/router.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>

#include <set>

namespace moelab::test {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> experiment_files() {
  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(MOELAB_SOURCE_DIR "/experiments"))
    if (entry.path().extension() == ".toml") files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  return files;
}

// Data sets that `data prepare` has to fetch first.
std::set<std::string> data_to_prepare() {
  std::set<std::string> names;
  for (const nlohmann::json& entry : json_of(moelab_run({"data", "list", "--json"})))
    if (entry.at("ready") == false) names.insert(entry.at("name"));
  return names;
}

TEST_CASE("every experiment checks and trains, or says which data to prepare") {
  const std::string file = GENERATE(from_range(experiment_files()));
  CAPTURE(file);
  const ProgramResult checked = moelab_run({"check", file, "--json"});
  CAPTURE(checked.err);
  if (checked.code == 5) {
    const std::set<std::string> missing = data_to_prepare();
    const auto named = [&](const std::string& name) { return contains(checked.err, "run `moelab data prepare " + name + "`"); };
    REQUIRE(std::any_of(missing.begin(), missing.end(), named));
    SKIP(file + " was not trained: " + checked.err);
  }
  REQUIRE(checked.code == 0);
  const nlohmann::json report = json_of(checked);
  CHECK(report.at("name") == fs::path(file).stem().string());
  const ScratchFolder folder;
  // What an experiment starts from is another one's result, which is not at hand.
  const ProgramResult run = moelab_in(folder.path(), {"run", file, "--out", "run", "--quiet", "--set", "train.steps=2", "--set",
                                                      "train.batch=4", "--set", "init.from=\"\""});
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  CHECK(contains(run.out, "verdict: "));
  for (const nlohmann::json& layer : report.at("layers")) CHECK(contains(run.out, layer.at("router").get<std::string>()));
}

// base/ aside, each extends one of those and says little more than what it is about.
TEST_CASE("experiments of routers are named after theirs, extend a base, and are short") {
  for (const auto& entry : fs::directory_iterator(MOELAB_SOURCE_DIR "/experiments/routers")) {
    const std::string text = text_of(entry.path().string());
    CAPTURE(entry.path().string());
    CHECK(contains(text, "\nextends = \"../base/"));
    CHECK(contains(text, "\n[moe.router]\nname = \"" + entry.path().stem().string() + "\""));
    CHECK(std::count(text.begin(), text.end(), '\n') < 15);
    CHECK(Registry<RouterEntry>::instance().contains(entry.path().stem().string()));
  }
}

}  // namespace
}  // namespace moelab::test
