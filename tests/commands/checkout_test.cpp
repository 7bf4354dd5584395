// Commands that write into a source checkout: `new router` and `docs`; and `data`.
#include "tests/commands/commands_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

// The places that `new router` and `docs` look for.
void lay_out_checkout(const ScratchFolder& folder) {
  std::filesystem::create_directories(folder / "routers");
  std::filesystem::create_directories(folder / "tests/routers");
  folder.put("experiments/base/lm_tiny.toml", text_of(MOELAB_SOURCE_DIR "/experiments/base/lm_tiny.toml"));
}

const std::vector<std::string> kOnlyBase{"experiments/base/lm_tiny.toml"};

TEST_CASE("new router writes a source, a test and an experiment") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  const ProgramResult result = moelab_in(folder.path(), {"new", "router", "my_router2"});
  REQUIRE(result.code == 0);
  CHECK(folder.files() == std::vector<std::string>{"experiments/base/lm_tiny.toml", "experiments/routers/my_router2.toml",
                                                   "routers/my_router2.cpp", "tests/routers/my_router2_test.cpp"});
  CHECK(contains(text_of(folder / "routers/my_router2.cpp"), "class MyRouter2Router : public LinearRouter"));
  CHECK(contains(text_of(folder / "routers/my_router2.cpp"), "Differences from the paper:"));
  CHECK(contains(text_of(folder / "tests/routers/my_router2_test.cpp"), "fill in"));
  CHECK(!contains(text_of(folder / "tests/routers/my_router2_test.cpp"), "@"));
}

TEST_CASE("new expert writes a source, a test and an experiment, and knows the names that are taken") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  std::filesystem::create_directories(folder / "experts");
  std::filesystem::create_directories(folder / "tests/experts");
  REQUIRE(moelab_in(folder.path(), {"new", "expert", "my_expert2"}).code == 0);
  CHECK(folder.files() == std::vector<std::string>{"experiments/base/lm_tiny.toml", "experiments/experts/my_expert2.toml",
                                                   "experts/my_expert2.cpp", "tests/experts/my_expert2_test.cpp"});
  CHECK(contains(text_of(folder / "experts/my_expert2.cpp"), "class MyExpert2Bank : public ExpertBank"));
  CHECK(contains(text_of(folder / "tests/experts/my_expert2_test.cpp"), "fill in"));
  for (const std::string& file : folder.files()) CHECK(!contains(text_of(folder / file), "@"));
  CHECK(contains(moelab_run({"check", folder / "experiments/experts/my_expert2.toml"}).err, "nothing is named 'my_expert2'"));
  CHECK(moelab_in(folder.path(), {"new", "expert", "ffn"}).err ==
        "moelab: there is an expert 'ffn' already; take another name\n");
  CHECK(moelab_in(folder.path(), {"new", "expert", "My"}).code == 2);
}

TEST_CASE("the experiment of a new router is refused only because the program does not know the router yet") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  REQUIRE(moelab_in(folder.path(), {"new", "router", "brandnew"}).code == 0);
  const std::string experiment = folder / "experiments/routers/brandnew.toml";
  const ProgramResult unknown = moelab_run({"check", experiment});
  CHECK(unknown.code == 2);
  CHECK(contains(unknown.err, "nothing is named 'brandnew'"));
  CHECK(moelab_run({"check", experiment, "--set", "moe.router.name=switch"}).code == 0);
}

TEST_CASE("a router that exists is never written over") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  REQUIRE(moelab_in(folder.path(), {"new", "router", "mine"}).code == 0);
  folder.put("routers/mine.cpp", "// my work\n");
  const ProgramResult again = moelab_in(folder.path(), {"new", "router", "mine"});
  CHECK(again.code == 2);
  CHECK(again.err == "moelab: './routers/mine.cpp' exists already; take another name, or remove it\n");
  CHECK(text_of(folder / "routers/mine.cpp") == "// my work\n");
}

TEST_CASE("bad names of routers are refused, and nothing is written") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  const std::string name = GENERATE("Mine", "2mine", "my-router", "my__router", "_mine", "mine_", "../mine", "my router", "");
  const ProgramResult result = moelab_in(folder.path(), {"new", "router", name});
  CAPTURE(name, result.err);
  CHECK(result.code == 2);
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(folder.files() == kOnlyBase);
}

TEST_CASE("the name of a registered router is refused") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  const ProgramResult result = moelab_in(folder.path(), {"new", "router", "switch"});
  CHECK(result.code == 2);
  CHECK(result.err == "moelab: there is a router 'switch' already; take another name\n");
  CHECK(folder.files() == kOnlyBase);
}

TEST_CASE("outside a checkout new router says what is missing") {
  const ScratchFolder folder;
  const ProgramResult result = moelab_in(folder.path(), {"new", "router", "mine"});
  CHECK(result.code == 2);
  CHECK(result.err == "moelab: '.' is no source checkout of moelab: it has no routers; go there, or name it with --dir\n");
  CHECK(folder.files().empty());
}

TEST_CASE("docs renews marked tables and leaves the rest alone") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  folder.put("README.md", "before\n<!-- generated: routers -->\nold\n<!-- end -->\nafter\n");
  folder.put("routers/README.md", "no table\n");
  const ProgramResult stale = moelab_in(folder.path(), {"docs", "--check"});
  CHECK(stale.code == 2);
  CHECK(stale.err == "moelab: ./README.md: a generated table is stale; run `make docs`\n");
  CHECK(moelab_in(folder.path(), {"docs"}).out == "renewed ./README.md\n");
  const std::string text = text_of(folder / "README.md");
  CHECK(text.starts_with("before\n<!-- generated: routers -->\n| router | method | paper | facts |\n"));
  CHECK(contains(text, "| `switch` |"));
  CHECK(text.ends_with("|\n<!-- end -->\nafter\n"));
  CHECK(moelab_in(folder.path(), {"docs", "--check"}).code == 0);
}

TEST_CASE("docs refuses a marker without an end, and an unknown kind") {
  const ScratchFolder folder;
  lay_out_checkout(folder);
  const std::string open = "<!-- generated: routers -->\n";
  folder.put("README.md", open);
  CHECK(moelab_in(folder.path(), {"docs"}).err == "moelab: ./README.md: a '<!-- generated: …' without '<!-- end -->'\n");
  CHECK(text_of(folder / "README.md") == open);
  folder.put("README.md", "<!-- generated: ruoters -->\n<!-- end -->\n");
  CHECK(contains(moelab_in(folder.path(), {"docs"}).err, "there is no kind 'ruoters', did you mean 'routers'?"));
}

TEST_CASE("the tables of this checkout are fresh") {
  const ProgramResult result = moelab_run({"docs", "--check", "--dir", MOELAB_SOURCE_DIR});
  CAPTURE(result.err);
  CHECK(result.code == 0);
}

TEST_CASE("data list says what is ready, and a generator needs no preparation") {
  bool found = false;
  for (const nlohmann::json& entry : json_of(moelab_run({"data", "list", "--json"}))) {
    if (entry.at("name") != "markov") continue;
    found = true;
    CHECK(entry.at("ready") == true);
    CHECK(entry.at("state") == "needs no preparation");
  }
  CHECK(found);
  CHECK(moelab_run({"data", "prepare", "markov"}).out == "markov needs no preparation\n");
  CHECK(moelab_run({"data", "verify", "markov"}).out == "markov has nothing to verify\n");
  const ProgramResult unknown = moelab_run({"data", "prepare", "markof"});
  CHECK(unknown.code == 2);
  CHECK(contains(unknown.err, "did you mean 'markov'?"));
}

}  // namespace
}  // namespace moelab::test
