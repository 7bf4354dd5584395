// The house rules that a compiler does not check.
#include "core/router.h"

#include <catch2/catch_test_macros.hpp>

#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <string>

using namespace moelab;

namespace {

namespace fs = std::filesystem;
const fs::path kSource = MOELAB_SOURCE_DIR;

// Every `#include "folder/…"` below `folder` must begin with one of the allowed folders.
void require_includes_only(const std::string& folder, const std::set<std::string>& allowed) {
  const std::regex include(R"re(^\s*#include\s+"([a-z_]+)/)re");
  for (const auto& entry : fs::recursive_directory_iterator(kSource / folder)) {
    if (entry.path().extension() != ".cpp" && entry.path().extension() != ".h") continue;
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);) {
      std::smatch found;
      if (!std::regex_search(line, found, include)) continue;
      CAPTURE(entry.path().string(), line);
      CHECK(allowed.contains(found[1].str()));
    }
  }
}

}  // namespace

TEST_CASE("dependencies point one way") {
  require_includes_only("core", {"core"});
  require_includes_only("routers", {"core"});  // nor each other: a router has no header
  require_includes_only("experts", {"core"});
  require_includes_only("datasets", {"core", "datasets"});
  require_includes_only("trainers", {"core", "trainers"});
  require_includes_only("experiments", {"core", "datasets", "trainers", "experiments"});
}

TEST_CASE("no source includes a torch umbrella header") {
  const std::regex umbrella(R"(#include\s*<torch/(torch|nn|optim|data)\.h>)");
  for (const char* folder : {"core", "routers", "experts", "datasets", "trainers", "experiments", "tests"}) {
    for (const auto& entry : fs::recursive_directory_iterator(kSource / folder)) {
      if (entry.path().extension() != ".cpp" && entry.path().extension() != ".h") continue;
      std::ifstream file(entry.path());
      const std::string text((std::istreambuf_iterator<char>(file)), {});
      CAPTURE(entry.path().string());
      CHECK_FALSE(std::regex_search(text, umbrella));
    }
  }
}

TEST_CASE("roll call: every router's file is registered under its stem and has its test") {
  std::set<std::string> stems, names;
  for (const auto& entry : fs::directory_iterator(kSource / "routers"))
    if (entry.path().extension() == ".cpp") stems.insert(entry.path().stem());
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all()) names.insert(entry.name);
  CHECK(stems == names);
  for (const std::string& stem : stems) {
    CAPTURE(stem);
    CHECK(fs::exists(kSource / "tests/routers" / (stem + "_test.cpp")));
  }
}
