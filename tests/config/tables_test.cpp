// Tables, arrays of tables, overlays, and the text of the resolved tree.
#include "config_support.h"

#include <catch2/catch_test_macros.hpp>

using namespace moelab;

namespace {

int64_t table_integer(const Table& table, const std::string& name) {
  std::vector<std::string> others = table.keys();
  return table.options({{name, int64_t{-1}, ""}}, others).integer(name);
}

std::string without_comments(const std::string& resolved) {
  std::string text;
  for (size_t at = 0; at < resolved.size();) {
    const size_t end = resolved.find('\n', at);
    const std::string line = resolved.substr(at, end - at);
    text += line.substr(0, line.find("  # from ")) + "\n";
    at = end + 1;
  }
  return text;
}

}  // namespace

TEST_CASE("tables know their keys, path and place") {
  const Table root = parse_config("b = 1\na = 2\n[moe.router]\nk = 1\n", "exp.toml");
  CHECK(root.keys() == std::vector<std::string>{"a", "b", "moe"});
  CHECK(root.path().empty());
  CHECK(root.place() == "exp.toml:1:1");
  CHECK(root.child("moe").child("router").path() == "moe.router");
  CHECK(root.child("moe").child("router").place() == "exp.toml:3:1");
  CHECK(root.has("moe"));
  CHECK_FALSE(root.has("route"));
}

TEST_CASE("a value where a table belongs is refused") {
  const Table root = parse_config("[moe]\nrouter = 'switch'\n", "exp.toml");
  CHECK(complaint([&] { root.child("moe").child("router"); }) ==
        "2|exp.toml:2:1: 'router' is a string, but must be a table [moe.router]");
}

TEST_CASE("the elements of an array of tables come in order, each with its place") {
  const Table root = parse_config("[[loss]]\nname='z'\n\n[[loss]]\nname='balance'\nscope.kind='step'\n", "exp.toml");
  const std::vector<Table> losses = root.array("loss");
  REQUIRE(losses.size() == 2);
  CHECK(losses[0].options({{"name", std::string(), ""}}).text("name") == "z");
  CHECK(losses[1].path() == "loss.1");
  CHECK(losses[1].place() == "exp.toml:4:1");
  CHECK(losses[1].child("scope").path() == "loss.1.scope");
  CHECK(root.array("layer").empty());
  CHECK(Table().array("layer").empty());
}

TEST_CASE("what is no array of tables is refused as one") {
  CHECK(complaint([] { parse_config("[loss]\nname='z'\n", "exp.toml").array("loss"); }) ==
        "2|exp.toml:1:1: 'loss' is a table, but must be an array of tables [[loss]]");
  CHECK(complaint([] { parse_config("loss = [1]\n", "exp.toml").array("loss"); }) ==
        "2|exp.toml:1:1: 'loss' is a list, but must be an array of tables [[loss]]");
  CHECK(parse_config("loss = []\n", "exp.toml").array("loss").empty());
  CHECK(parse_config("loss = [{name='z'}]\n", "exp.toml").array("loss").size() == 1);
}

TEST_CASE("an overlay merges tables, replaces values and whole arrays, and leaves both sides alone") {
  const Table root = parse_config(R"(
[moe]
experts = 8
blocks = [1, 2, 3]
[moe.router]
k = 2
rate = 1
[[moe.loss]]
coefficient = 1
[[moe.loss]]
coefficient = 2
[[layer]]
where = "odd"
[layer.moe]
blocks = [9]
[layer.moe.router]
k = 1
[[layer.moe.loss]]
coefficient = 5
)", "exp.toml");
  const Table moe = root.child("moe"), over = root.array("layer")[0].child("moe");
  const Table both = moe.overlaid(over);
  CHECK(both.path() == "moe");
  CHECK(table_integer(both, "experts") == 8);
  CHECK(both.options({{"blocks", std::vector<int64_t>{}, ""}}, both.keys()).integers("blocks") == std::vector<int64_t>{9});
  CHECK(table_integer(both.child("router"), "k") == 1);
  CHECK(table_integer(both.child("router"), "rate") == 1);
  CHECK(both.child("router").place_of("k") == "exp.toml:17:1");
  CHECK(both.child("router").place_of("rate") == "exp.toml:7:1");
  REQUIRE(both.array("loss").size() == 1);
  CHECK(table_integer(both.array("loss")[0], "coefficient") == 5);
  CHECK(table_integer(moe.child("router"), "k") == 2);
  CHECK(moe.array("loss").size() == 2);
}

TEST_CASE("an overlay of or with nothing is the other side, under its own path") {
  const Table root = parse_config("[moe]\nexperts = 8\n", "exp.toml");
  const Table moe = root.child("moe"), absent = root.child("layer");
  CHECK(table_integer(moe.overlaid(absent), "experts") == 8);
  CHECK(table_integer(absent.overlaid(moe), "experts") == 8);
  CHECK(absent.overlaid(moe).path() == "layer");
  CHECK_FALSE(absent.overlaid(absent).present());
}

TEST_CASE("the resolved text is sorted TOML with the place of every value") {
  const Table root = parse_config(R"(seed = 1
[moe.router]
name = "switch"
k = 2
[[loss]]
name = "z"
coefficient = 1e-3
[[loss]]
name = "balance"
[moe]
experts = 8
)", "exp.toml", {"moe.experts=16", "name=bible"});
  CHECK(resolved_text(root) == R"(name = "bible"  # from --set name=bible
seed = 1  # from exp.toml:1

[[loss]]
coefficient = 0.001  # from exp.toml:7
name = "z"  # from exp.toml:6

[[loss]]
name = "balance"  # from exp.toml:9

[moe]
experts = 16  # from --set moe.experts=16

[moe.router]
k = 2  # from exp.toml:4
name = "switch"  # from exp.toml:3
)");
  CHECK(resolved_text(Table()).empty());
}

TEST_CASE("the resolved text reads back to the same values, whatever they are") {
  const std::string text = R"("odd key" = 'back\slash "quote" # no comment'
"" = 1
real = 1.0
tiny = 4.9406564584124654e-324
third = 0.1
big = -9223372036854775808
infinite = [inf, -inf]
text = """two
lines	and a tab "# from here" \u0001"""
empty_list = []
nested = [[1], ["a"], []]
mixed = [1, {a = [true], "b c" = {}}]
[empty.table]
["dotted.name".x]
umlaut = "grüß"
[[a]]
[a.b]
c = 1
[[a.d]]
[[a]]
)";
  const Table root = parse_config(text, "exp.toml");
  const std::string once = resolved_text(root);
  const Table again = parse_config(once, "resolved.toml");
  CHECK(without_comments(resolved_text(again)) == without_comments(once));
  const OptionSpecs specs{{"odd key", std::string(), ""}, {"real", 0.0, ""},  {"tiny", 0.0, ""},
                          {"third", 0.0, ""},             {"text", std::string(), ""}, {"big", int64_t{0}, ""}};
  CHECK((again.options(specs, again.keys()).all() == root.options(specs, root.keys()).all()));
  CHECK(again.options(specs, again.keys()).text("text") == "two\nlines\tand a tab \"# from here\" \x01");
  CHECK(again.options(specs, again.keys()).text("odd key") == "back\\slash \"quote\" # no comment");
  CHECK(again.child("empty").child("table").present());
  CHECK(again.child("dotted.name").child("x").has("umlaut"));
  CHECK(again.array("a").size() == 2);
  CHECK(again.array("a")[0].array("d").size() == 1);
}

TEST_CASE("a file name that no comment can hold is softened in the resolved text") {
  const std::string text = resolved_text(parse_config("a = 1\n", "b\xff\n.toml"));
  CHECK(text == "a = 1  # from b??.toml:1\n");
  CHECK(resolved_text(parse_config("a = 1\n", "grün.toml")) == "a = 1  # from grün.toml:1\n");
}

TEST_CASE("another plugin's options are dropped where a later file or override changes the name, and only there") {
  const std::string text = "[moe.router]\nname = \"softmax_topk\"\nk = 2\n";
  const OptionSpecs switch_specs{option("name", "", "")}, noisy_specs{option("name", "", ""), option("k", 4, "")};
  const auto router = [](const Table& root) { return root.child("moe").child("router"); };

  const Table changed = parse_config(text, "e.toml", {"moe.router.name=switch"});
  CHECK(router(changed).options(switch_specs).text("name") == "switch");
  CHECK(resolved_text(changed).find("k = 2") == std::string::npos);

  const Table kept = parse_config(text, "e.toml", {"moe.router.name=noisy_topk"});
  CHECK(router(kept).options(noisy_specs).integer("k") == 2);
  CHECK(resolved_text(kept).find("k = 2") != std::string::npos);

  CHECK_THROWS(router(parse_config(text, "e.toml")).options(switch_specs));                                // nothing was changed
  CHECK_THROWS(
      router(parse_config(text, "e.toml", {"moe.router.name=switch", "moe.router.k=3"})).options(switch_specs));  // written later

  const Table layer = parse_config("[moe.router]\nname = \"switch\"\n", "l.toml");
  CHECK(router(parse_config(text, "e.toml").overlaid(layer)).options(switch_specs).text("name") == "switch");
}
