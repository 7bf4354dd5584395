// Shared libraries from outside the tree: loaded when they fit, refused with a reason before any of their code runs.
#include "tests/commands/commands_support.h"

#include <catch2/catch_test_macros.hpp>

#include <set>

namespace moelab::test {
namespace {

const std::string kPlugin = MOELAB_PLUGIN_FOLDER "/libfirst_expert.so";

// A copy that claims another build, or none: the bytes that moelab reads, changed in place.
std::string altered(const ScratchFolder& folder, const std::string& what, const std::string& with) {
  std::string bytes = text_of(kPlugin);
  const size_t at = bytes.find(what);
  REQUIRE(at != std::string::npos);
  return folder.put("altered.so", bytes.replace(at, what.size(), with));
}

TEST_CASE("a router of a plugin is listed, described and usable in an experiment") {
  const ProgramResult listed = moelab_run({"list", "routers", "--plugin", kPlugin, "--json"});
  REQUIRE(listed.code == 0);
  CHECK(contains(listed.out, "\"name\": \"first_expert\""));
  const ScratchFolder folder;
  const std::string experiment = folder.put("exp.toml", "plugins = \"" + kPlugin + "\"\n" + kTinyExperiment);
  const ProgramResult checked = moelab_run({"check", experiment, "--set", "moe.router.name=first_expert"});
  CAPTURE(checked.err);
  CHECK(checked.code == 0);
  CHECK(contains(checked.out, "first_expert, 4 ffn experts"));
}

TEST_CASE("a relative path starts at the file that names the plugin") {
  const ScratchFolder folder;
  folder.put("sub/copy.so", text_of(kPlugin));
  const std::string experiment = folder.put("sub/exp.toml", std::string("plugins = \"copy.so\"\n") + kTinyExperiment);
  CHECK(moelab_in(folder.path(), {"check", experiment, "--set", "moe.router.name=first_expert"}).code == 0);
}

TEST_CASE("a plugin built against another version is refused with both versions") {
  const ScratchFolder folder;
  const std::string path = altered(folder, "{moelab " MOELAB_VERSION, "{moelab 9.9.9");
  const ProgramResult result = moelab_run({"list", "routers", "--plugin", path});
  CHECK(result.code == 2);
  CHECK(result.err == "moelab: plugin '" + path +
                          "' was built with moelab 9.9.9, this program with moelab " MOELAB_VERSION "; build it again\n");
}

TEST_CASE("so is one built against another LibTorch") {
  const ScratchFolder folder;
  const std::string path = altered(folder, ";LibTorch 2", ";LibTorch 1");
  const ProgramResult result = moelab_run({"list", "routers", "--plugin", path});
  CHECK(result.code == 2);
  CHECK(contains(result.err, "was built with LibTorch 1."));
}

TEST_CASE("a library that does not say how it was built, and a file that is none, are refused") {
  const ScratchFolder folder;
  const std::string silent = altered(folder, "moelab-plugin{", "moelab-nothing");
  CHECK(contains(moelab_run({"list", "routers", "--plugin", silent}).err, "does not say how it was built"));
  const std::string whole = text_of(kPlugin);  // torn right behind its line: the data segment is gone
  const std::string torn = folder.put("torn.so", whole.substr(0, whole.find('}', whole.find("moelab-plugin{")) + 1));
  CHECK(moelab_run({"list", "routers", "--plugin", torn}).code == 2);
  CHECK(moelab_run({"list", "routers", "--plugin", folder / "nowhere.so"}).code == 5);
}

TEST_CASE("verify holds the routers of a plugin to every property, and says why where one does not apply") {
  const ProgramResult result = moelab_run({"verify", kPlugin, "--json", "--cases", "3"});
  CAPTURE(result.err);
  REQUIRE(result.code == 0);
  std::set<std::string> properties;
  for (const nlohmann::json& finding : json_of(result)) {
    CHECK(finding.at("name") == "first_expert");
    CHECK((finding.at("result") == "pass" || finding.at("reason") != ""));
    properties.insert(finding.at("property"));
  }
  CHECK(properties.size() >= 25);
}

TEST_CASE("a plugin named twice registers once") {
  CHECK(moelab_run({"list", "routers", "--plugin", kPlugin, "--plugin", kPlugin}).code == 0);
}

}  // namespace
}  // namespace moelab::test
