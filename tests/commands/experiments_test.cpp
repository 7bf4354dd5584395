// Every experiment of this repository can be checked, and those whose data are at hand can be trained.
#include "tests/commands/commands_support.h"

#include "core/router.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>

#include <fmt/format.h>

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

using Arguments = std::vector<std::string>;

Arguments joined(Arguments first, const Arguments& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// For experiments on the Bible where it is not at hand: settings that put other text of several documents in its place.
Arguments other_text(const ScratchFolder& folder) {
  for (int document = 0; document < 40; ++document) {
    std::string text;
    for (int line = 100 * document; line < 100 * (document + 1); ++line)
      text += fmt::format("line {} of {} words and {}\n", line % 97, line * line % 31, line * 7 % 113);
    folder.put(fmt::format("text/{:02}.txt", document), text);
  }
  return {"--set", "data.name=bytes", "--set", "data.path=" + (folder / "text")};
}

// That text has too few words for as many pieces as the Bible's.
const Arguments kFewPieces{"--set", "data.vocabulary_size=300"};

TEST_CASE("every experiment checks and trains, or says which data to prepare") {
  const std::string file = GENERATE(from_range(experiment_files()));
  CAPTURE(file);
  const ScratchFolder folder;
  // What an experiment starts from is another one's result, which is not at hand.
  Arguments settings{"--set", "init.from=\"\""};
  ProgramResult checked = moelab_run(joined({"check", file, "--json"}, settings));
  if (checked.code == 5 && contains(checked.err, "run `moelab data prepare kjv`")) {
    settings = joined(settings, other_text(folder));
    checked = moelab_run(joined({"check", file, "--json"}, joined(settings, kFewPieces)));
    if (contains(checked.err, "'vocabulary_size' is not read")) checked = moelab_run(joined({"check", file, "--json"}, settings));
    else settings = joined(settings, kFewPieces);
  }
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
  const Arguments run_it{"run", file, "--out", "run", "--quiet", "--set", "train.steps=2", "--set", "train.batch=4"};
  const ProgramResult run = moelab_in(folder.path(), joined(run_it, settings));
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  CHECK(contains(run.out, "verdict: "));
  for (const nlohmann::json& layer : report.at("layers")) CHECK(contains(run.out, layer.at("router").get<std::string>()));
}

// Labels of the text's source are known of generated text alone, which `domain` routes by.
TEST_CASE("experiments of routers train on the Bible or on Fashion-MNIST") {
  for (const auto& entry : fs::directory_iterator(MOELAB_SOURCE_DIR "/experiments/routers")) {
    const std::string text = text_of(entry.path().string()), router = entry.path().stem().string();
    CAPTURE(router);
    const bool real = contains(text, "\"../base/lm_text.toml\"") || contains(text, "\"../base/images_tiny.toml\"");
    CHECK(real == !Registry<RouterEntry>::instance().find(router).facts.needs_domain);
  }
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
