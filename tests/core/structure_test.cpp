// The house rules that a compiler does not check.
#include "core/expert.h"
#include "core/router.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>
#include <vector>

using namespace moelab;

namespace {

namespace fs = std::filesystem;
const fs::path kSource = MOELAB_SOURCE_DIR;

std::vector<std::string> lines_of(const fs::path& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

bool is_source(const fs::path& path) { return path.extension() == ".cpp" || path.extension() == ".h"; }

std::vector<fs::path> sources() {
  std::vector<fs::path> found;
  for (const char* folder : {"core", "routers", "experts", "datasets", "trainers", "experiments", "tests"})
    for (const auto& entry : fs::recursive_directory_iterator(kSource / folder))
      if (is_source(entry.path())) found.push_back(entry.path());
  return found;
}

// Characters, of which UTF-8 begins each with one byte that is no continuation.
int64_t columns(const std::string& line) {
  return std::count_if(line.begin(), line.end(), [](unsigned char byte) { return (byte & 0xC0) != 0x80; });
}

// The folder of the checkout that an `#include "…"` of the file at `path` (from the checkout's root) means; "" for any other
// line. A relative one is followed, and a bare name lies beside the file.
std::string included_folder(const fs::path& path, const std::string& line) {
  static const std::regex include(R"re(^\s*#\s*include\s*"([^"]+)")re");
  std::smatch found;
  if (!std::regex_search(line, found, include)) return "";
  const fs::path named = found[1].str();
  const bool from_root = named.has_parent_path() && *named.begin() != ".." && *named.begin() != ".";
  return (from_root ? named : (path.parent_path() / named).lexically_normal()).begin()->string();
}

void require_includes_only(const std::string& folder, const std::set<std::string>& allowed) {
  for (const auto& entry : fs::recursive_directory_iterator(kSource / folder)) {
    if (!is_source(entry.path())) continue;
    for (const std::string& line : lines_of(entry.path())) {
      const std::string included = included_folder(fs::relative(entry.path(), kSource), line);
      CAPTURE(entry.path().string(), line);
      CHECK((included.empty() || allowed.contains(included)));
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

TEST_CASE("an include is followed to its folder, a relative one too") {
  CHECK(included_folder("core/model/block.cpp", "#include \"core/plan.h\"") == "core");
  CHECK(included_folder("core/model/block.cpp", "#include \"../../routers/switch.h\"") == "routers");
  CHECK(included_folder("core/plan.cpp", "#  include \"../routers/switch.h\"") == "routers");
  CHECK(included_folder("core/plan.cpp", "#include \"./../routers/switch.h\"") == "routers");
  CHECK(included_folder("core/model/block.cpp", "#include \"rows.h\"") == "core");
  CHECK(included_folder("core/plan.cpp", "#include <string>").empty());
}

TEST_CASE("sources are at most 130 columns wide and 400 lines long") {
  for (const fs::path& path : sources()) {
    int64_t number = 0;
    for (const std::string& line : lines_of(path)) {
      ++number;
      CAPTURE(path.string(), number);
      CHECK(columns(line) <= 130);
    }
    CAPTURE(path.string());
    CHECK(number <= 400);
  }
}

TEST_CASE("no source includes a torch umbrella header") {
  const std::regex umbrella(R"(#include\s*<torch/(torch|nn|optim|data)\.h>)");
  for (const fs::path& path : sources()) {
    std::ifstream file(path);
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    CAPTURE(path.string());
    CHECK_FALSE(std::regex_search(text, umbrella));
  }
}

namespace {

using Names = std::set<std::string>;

template <class Entry>
Names registered_names() {
  Names names;
  for (const Entry& entry : Registry<Entry>::instance().all()) names.insert(entry.name);
  return names;
}

// Stems of the files in a folder that end so.
Names stems_in(const std::string& folder, const std::string& ending) {
  Names stems;
  for (const auto& entry : fs::directory_iterator(kSource / folder)) {
    const std::string name = entry.path().filename();
    if (name.ends_with(ending)) stems.insert(name.substr(0, name.size() - ending.size()));
  }
  return stems;
}

// First cells of a generated table.
Names names_in_table(const fs::path& path, const std::string& kind = "routers") {
  const std::regex row("^\\| `([a-z0-9_]+)` \\|.*");
  Names names;
  bool inside = false;
  for (const std::string& line : lines_of(path)) {
    std::smatch found;
    if (line.starts_with("<!-- ")) inside = line == "<!-- generated: " + kind + " -->";
    if (inside && std::regex_match(line, found, row)) names.insert(found[1]);
  }
  return names;
}

std::string in_words(const Names& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// What one side has and the other lacks, with what to do about it.
void require_same(const Names& found, const Names& expected, const std::string& what, const std::string& remedy) {
  Names missing, left_over;
  std::set_difference(expected.begin(), expected.end(), found.begin(), found.end(), std::inserter(missing, missing.end()));
  std::set_difference(found.begin(), found.end(), expected.begin(), expected.end(), std::inserter(left_over, left_over.end()));
  INFO(what << " lacks {" << in_words(missing) << "} and has {" << in_words(left_over) << "} too many: " << remedy);
  CHECK((missing.empty() && left_over.empty()));
}

// noisy_topk_levels_test.cpp holds more tests of noisy_topk.
bool is_part_of_another(const std::string& test, const Names& methods) {
  return !methods.contains(test) &&
         std::any_of(methods.begin(), methods.end(), [&](const std::string& method) { return test.starts_with(method + "_"); });
}

}  // namespace

TEST_CASE("roll call: the registry, the files, the tests, the table in README.md and the experiments hold the same routers") {
  const Names files = stems_in("routers", ".cpp");
  REQUIRE(files.size() >= 20);
  require_same(registered_names<RouterEntry>(), files, "the registry", "a router is registered under the stem of its file");
  Names tested;
  for (const std::string& name : stems_in("tests/routers", "_test.cpp"))
    if (name != "edges" && !is_part_of_another(name, files)) tested.insert(name);
  require_same(tested, files, "tests/routers", "a router has tests/routers/<name>_test.cpp");
  for (const char* readme : {"README.md", "routers/README.md"})
    require_same(names_in_table(kSource / readme), files, std::string("the table in ") + readme, "run `make docs`");
  require_same(stems_in("experiments/routers", ".toml"), files, "experiments/routers",
               "a router has experiments/routers/<name>.toml, which `moelab new router` writes");
}

// Tests beside those of one kind: banks of several, the table, and the two kinds that share a file with another.
TEST_CASE("roll call: the registry, the files, the tests and the table in experts/README.md hold the same experts") {
  const Names files = stems_in("experts", ".cpp");
  REQUIRE(files.size() >= 5);
  require_same(registered_names<ExpertEntry>(), files, "the registry", "experts are registered under the stem of their file");
  Names tested;
  for (const std::string& name : stems_in("tests/experts", "_test.cpp"))
    if (name == "zero_cost") tested.merge(Names{"zero", "identity", "constant"});
    else if (name != "mixed" && name != "compat" && !is_part_of_another(name, files)) tested.insert(name);
  require_same(tested, files, "tests/experts", "experts have tests/experts/<name>_test.cpp");
  require_same(names_in_table(kSource / "experts/README.md", "experts"), files, "the table in experts/README.md",
               "run `make docs`");
}

namespace {

// What the head of a file says under "Differences from the paper:", one line.
std::string differences_in_head(const fs::path& path) {
  const std::string title = "// Differences from the paper:";
  std::string text;
  bool inside = false;
  for (const std::string& line : lines_of(path)) {
    if (line.starts_with(title)) inside = true;
    else if (inside && (line.size() < 4 || !line.starts_with("// "))) break;
    if (inside) text += line.substr(text.empty() ? title.size() : 2);
  }
  return text;
}

bool says_none(const std::string& differences) {
  return differences == " none known." || differences == " none known" || differences.starts_with(" there is none");
}

template <class Entry>
void require_registered_differences(const std::string& folder) {
  for (const Entry& entry : Registry<Entry>::instance().all()) {
    const std::string head = differences_in_head(kSource / folder / (entry.name + ".cpp"));
    CAPTURE(folder, entry.name, head);
    CHECK_FALSE(head.empty());
    CHECK(entry.differences.empty() == says_none(head));
  }
}

}  // namespace

TEST_CASE("roll call: what a file's head says of differences from the paper is registered, for `describe` to print") {
  require_registered_differences<RouterEntry>("routers");
  require_registered_differences<ExpertEntry>("experts");
}

TEST_CASE("an experiment of experts extends a base, changes experts, and is under 15 lines") {
  const Names names = stems_in("experiments/experts", ".toml");
  REQUIRE(names.size() >= 5);
  for (const std::string& name : names) {
    const std::vector<std::string> lines = lines_of(kSource / "experiments/experts" / (name + ".toml"));
    CAPTURE(name);
    CHECK(lines.size() <= 15);
    const auto says = [&](const std::string& start) {
      return std::any_of(lines.begin(), lines.end(), [&](const std::string& line) { return line.starts_with(start); });
    };
    CHECK((says("extends = \"../base/") || says("extends = \"pretrained.toml\"")));
    const bool changes_experts = says("[moe.expert]") || says("[[moe.expert.group]]") || says("[moe.shared]") ||
                                 says("[attention.expert]") || says("[attention]") || says("[adapters");
    CHECK(changes_experts == (name != "pretrained"));  // which is the dense base of others
    CHECK(std::find(lines.begin(), lines.end(), "name = \"" + name + "\"") != lines.end());
  }
}

TEST_CASE("an experiment of a router extends a base, says which router it is for, and is under 15 lines") {
  for (const std::string& name : stems_in("experiments/routers", ".toml")) {
    const std::vector<std::string> lines = lines_of(kSource / "experiments/routers" / (name + ".toml"));
    CAPTURE(name);
    CHECK(lines.size() < 15);
    const auto extends_a_base = [](const std::string& line) { return line.starts_with("extends = \"../base/"); };
    CHECK(std::count_if(lines.begin(), lines.end(), extends_a_base) == 1);
    const auto table = std::find(lines.begin(), lines.end(), "[moe.router]");
    REQUIRE(table != lines.end());
    CHECK(std::find(table, lines.end(), "name = \"" + name + "\"") != lines.end());
  }
}

TEST_CASE("the roll call finds what is missing and what is left over") {
  Names rows = names_in_table(kSource / "README.md");
  CHECK(rows.count("switch") == 1);
  CHECK(rows.count("balance") == 0);  // of another table
}
