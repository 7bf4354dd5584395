// --set a.b=v, and damaged texts.
#include "config_support.h"

#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;

namespace {

Options overridden(const std::vector<std::string>& overrides, const std::string& text = "k = 1\nname = 'a'\n") {
  const OptionSpecs specs{{"k", int64_t{0}, ""},         {"name", std::string(), ""}, {"rate", 0.0, ""},
                          {"bias", false, ""}, {"blocks", std::vector<int64_t>{}, ""}};
  return parse_config(text, "exp.toml", overrides).options(specs, {"moe"});
}

std::string set_complaint_of(const std::string& override_text, const std::string& text = "k = 1\n") {
  return parse_complaint(text, {override_text});
}

const std::string config_sample = R"(# an experiment
name = "quickstart"
seed = 0x1F
[train]
steps = 1_000
rate = 3e-4
words = ["a", 'b', """c
d"""]
[moe]
experts = 8
router = { name = "noisy_topk", k = 2, noise = { std = 1.0 } }
[[loss]]
name = "balance"
coefficient = 0.01
[[loss]]
name = "z" # router z
[[layer]]
where = "odd"
[layer.moe.capacity]
factor = 1.25
)";

}  // namespace

TEST_CASE("overrides replace values, make missing tables, and the last one wins") {
  CHECK(overridden({"k=2"}).integer("k") == 2);
  CHECK(overridden({"k=2", "k=3"}).integer("k") == 3);
  const Table root = parse_config("", "exp.toml", {"moe.router.k=4"});
  CHECK(root.child("moe").child("router").options({{"k", int64_t{0}, ""}}).integer("k") == 4);
  CHECK(root.child("moe").place() == "--set moe.router.k=4");
}

TEST_CASE("override values are what TOML says, and bare words are strings") {
  CHECK(overridden({"rate=0.5"}).real("rate") == 0.5);
  CHECK(overridden({"bias=true"}).flag("bias"));
  CHECK(overridden({"blocks=[1, 2]"}).integers("blocks") == std::vector<int64_t>{1, 2});
  CHECK(overridden({"name=switch"}).text("name") == "switch");
  CHECK(overridden({"name= /data/my file.txt "}).text("name") == "/data/my file.txt");
  CHECK(overridden({"name=\"true\""}).text("name") == "true");
  CHECK(overridden({"name='a=b'"}).text("name") == "a=b");
  CHECK(overridden({"name=x=y"}).text("name") == "x=y");
  CHECK(overridden({"name=2024-01-01"}).text("name") == "2024-01-01");
  CHECK(overridden({"name=1.2.3"}).text("name") == "1.2.3");
  CHECK(overridden({"name=\"\""}).text("name").empty());
}

TEST_CASE("a table given as an override is merged") {
  const Table root = parse_config("[moe]\nk = 1\nq = 1\n", "exp.toml", {"moe={k=2}"});
  CHECK(root.child("moe").keys() == std::vector<std::string>{"k", "q"});
  CHECK(root.child("moe").place_of("k") == "--set moe={k=2}");
  CHECK(root.child("moe").place_of("q") == "exp.toml:3:1");
}

TEST_CASE("overrides reach into arrays by position") {
  const Table root = parse_config(config_sample, "exp.toml",
                                  {"loss.1.coefficient=0.1", "layer.0.where=even", "train.words.0=z"});
  CHECK(root.array("loss")[1].options({{"coefficient", 0.0, ""}}, {"name"}).real("coefficient") == 0.1);
  CHECK(root.array("loss")[0].options({{"coefficient", 0.0, ""}}, {"name"}).real("coefficient") == 0.01);
  CHECK(root.array("layer")[0].options({{"where", std::string(), ""}}, {"moe"}).text("where") == "even");
  CHECK(resolved_text(root).find("words = [\"z\", \"b\", \"c\\nd\"]") != std::string::npos);
}

TEST_CASE("an element that is not there is refused") {
  CHECK(set_complaint_of("loss.2.coefficient=1", config_sample) ==
        "2|--set loss.2.coefficient=1: 'loss' has 2 elements, counted from 0, and no '2'");
  CHECK(set_complaint_of("layer.first.where=odd", config_sample) ==
        "2|--set layer.first.where=odd: 'layer' has 1 element, counted from 0, and no 'first'");
  CHECK(set_complaint_of("loss.99999999999999999999.x=1", config_sample).substr(0, 8) == "2|--set ");
  CHECK(set_complaint_of("loss.0.coefficient=1") ==
        "2|--set loss.0.coefficient=1: 'loss' is not there, so it has no element 0");
}

TEST_CASE("an override cannot go through a plain value") {
  CHECK(set_complaint_of("k.x.y=1") == "2|--set k.x.y=1: 'k' is an integer, so nothing can be set in it");
}

TEST_CASE("malformed overrides are quoted") {
  const std::string remedy = "; write --set table.key=value";
  CHECK(set_complaint_of("k") == "2|--set k: there is no '='" + remedy);
  CHECK(set_complaint_of("") == "2|--set : there is no '='" + remedy);
  CHECK(set_complaint_of("=1") == "2|--set =1: '' is no name of a value" + remedy);
  CHECK(set_complaint_of("a..b=1") == "2|--set a..b=1: 'a..b' is no name of a value" + remedy);
  CHECK(set_complaint_of("a b=1") == "2|--set a b=1: 'a b' is no name of a value" + remedy);
  CHECK(set_complaint_of("k=") == "2|--set k=: there is no value (the empty string is \"\")" + remedy);
  CHECK(set_complaint_of("k=a\nb=2") == "2|--set k=a b=2: not one line of UTF-8 text" + remedy);
  CHECK(set_complaint_of("k=\xff").substr(0, 8) == "2|--set ");
  CHECK(set_complaint_of("k=[1,").substr(0, 15) == "2|--set k=[1,: ");
  CHECK(set_complaint_of("k=\"abc").substr(0, 16) == "2|--set k=\"abc: ");
  CHECK(set_complaint_of("k=" + std::string(10'000, '[')).find("nested more than 64 deep") != std::string::npos);
  std::string deep = "a";
  for (int i = 0; i < 1000; ++i) deep += ".a";
  CHECK(set_complaint_of(deep + "=1").find("the name has too many parts") != std::string::npos);
}

TEST_CASE("overrides win over the file, which wins over what it extends") {
  const ConfigFolder folder;
  folder.write("base.toml", "k = 1\n");
  const std::string exp = folder.write("exp.toml", "extends = 'base.toml'\nk = 2\n");
  const OptionSpecs specs{{"k", int64_t{0}, ""}};
  CHECK(load_config(exp).options(specs).integer("k") == 2);
  CHECK(load_config(exp, {"k=3"}).options(specs).integer("k") == 3);
  CHECK(load_config(exp, {"k=3"}).place_of("k") == "--set k=3");
}

TEST_CASE("a damaged file is read or refused with exit 2, never a crash, and what is read survives writing") {
  std::mt19937 random(7);
  int read = 0, refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string text = config_sample;
    for (unsigned edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % text.size();
      if (random() % 2) text[at] = static_cast<char>(random() % 256);
      else text.erase(at, 1 + random() % 8);
    }
    std::string message = "nothing";
    try {
      const Table root = parse_config(text, "exp.toml");
      parse_config(resolved_text(root), "resolved.toml");
    } catch (const Error& error) {
      message = error.what();
      CHECK(error.code() == ExitCode::kUsage);
    }
    INFO(text);
    CHECK(message.find('\n') == std::string::npos);
    CHECK((message == "nothing" || message.rfind("exp.toml:", 0) == 0));
    ++(message == "nothing" ? read : refused);
  }
  CHECK(read > 100);
  CHECK(refused > 100);
}
