// Files: what they extend, what cannot be read, and what is no TOML.
#include "config_support.h"

#include <catch2/catch_test_macros.hpp>

#include <unistd.h>

using namespace moelab;

namespace {

std::string load_complaint(const std::string& path) {
  return complaint([&] { load_config(path); });
}

Options file_options(const Table& root) {
  return root.options({{"a", int64_t{0}, ""}, {"b", int64_t{0}, ""}, {"c", int64_t{0}, ""}, {"d", int64_t{0}, ""}},
                      {"moe", "loss"});
}

std::string repeated(const std::string& part, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += part;
  return text;
}

}  // namespace

TEST_CASE("a file extends another, relative to itself, and holds only what differs") {
  const ConfigFolder folder;
  const std::string base = folder.write("base/small.toml", "a = 1\nb = 1\n[moe]\nexperts = 8\n[[loss]]\n[[loss]]\n");
  const std::string middle = folder.write("papers/middle.toml", "extends = \"../base/small.toml\"\nb = 2\n[[loss]]\n");
  const Table root = load_config(folder.write("exp.toml", "extends = 'papers/middle.toml'\nc = 3\n"));
  const Options options = file_options(root);
  CHECK(options.integer("a") == 1);
  CHECK(options.integer("b") == 2);
  CHECK(options.integer("c") == 3);
  CHECK_FALSE(root.has("extends"));
  CHECK(root.place_of("a") == base + ":1:1");
  CHECK(root.place_of("b") == middle + ":2:1");
  CHECK(root.array("loss").size() == 1);
  CHECK(root.child("moe").has("experts"));
}

TEST_CASE("of several bases the later one wins, and the file itself wins over all") {
  const ConfigFolder folder;
  folder.write("x.toml", "a = 1\nb = 1\nc = 1\n");
  folder.write("y.toml", "b = 2\nc = 2\n");
  const Options options = file_options(load_config(folder.write("exp.toml", "extends = ['x.toml', 'y.toml']\nc = 3\n")));
  CHECK(options.integer("a") == 1);
  CHECK(options.integer("b") == 2);
  CHECK(options.integer("c") == 3);
}

TEST_CASE("a path starts at the file that says it, or at the working folder if it is only there, and is written whole") {
  const ConfigFolder folder;
  const std::string here = std::filesystem::current_path().string();
  const std::string far = std::filesystem::directory_iterator(here)->path().filename().string();
  folder.write("texts/a.txt", "a");
  folder.write("base/b.toml", "[data]\nnear = '../texts/a.txt'\nfar = '" + far + "'\nnowhere = '../no/such/file'\n" +
                                  "several = '../texts, " + far + ", x.so'\n");
  const OptionSpecs specs{option("near", "", "").as_path(), option("far", "", "").as_path(), option("nowhere", "", "").as_path(),
                          option("several", "", "").as_paths(), option("unset", "", "").as_path()};
  const Table root = load_config(folder.write("exp.toml", "extends = 'base/b.toml'\n"));
  const Options options = root.child("data").options(specs);
  CHECK(options.text("near") == folder.at("texts/a.txt"));
  CHECK(options.text("far") == here + "/" + far);
  CHECK(options.text("nowhere") == folder.at("no/such/file"));
  CHECK(options.text("several") == folder.at("texts") + ", " + here + "/" + far + ", " + folder.at("base/x.so"));
  CHECK(options.text("unset").empty());
  CHECK(resolved_text(root).find("near = \"" + folder.at("texts/a.txt") + "\"") != std::string::npos);

  const Table overridden = load_config(folder.at("exp.toml"), {"data.near=texts/a.txt"});
  CHECK(overridden.child("data").options(specs).text("near") == here + "/texts/a.txt");
}

TEST_CASE("a diamond of extends is no loop") {
  const ConfigFolder folder;
  folder.write("root.toml", "a = 1\nb = 1\n");
  folder.write("left.toml", "extends = 'root.toml'\nb = 2\n");
  folder.write("right.toml", "extends = 'root.toml'\nc = 3\n");
  const Table table = load_config(folder.write("exp.toml", "extends = ['right.toml', 'left.toml']\n"));
  CHECK(file_options(table).integer("b") == 2);
  CHECK(file_options(table).integer("c") == 3);
}

TEST_CASE("a loop of extends is refused with the chain of files") {
  const ConfigFolder folder;
  const std::string a = folder.write("a.toml", "x = 1\nextends = 'b.toml'\n");
  const std::string b = folder.write("b.toml", "extends = ['./sub/../a.toml']\n");
  CHECK(load_complaint(a) == "2|" + b + ":1:12: 'extends' runs in a loop: " + a + " -> " + b + " -> " + a);
  const std::string own = folder.write("own.toml", "extends = 'own.toml'\n");
  CHECK(load_complaint(own) == "2|" + own + ":1:1: 'extends' runs in a loop: " + own + " -> " + own);
}

TEST_CASE("endless and doubling chains of extends end") {
  const ConfigFolder folder;
  for (int i = 0; i < 40; ++i)
    folder.write("deep" + std::to_string(i) + ".toml", "extends = 'deep" + std::to_string(i + 1) + ".toml'\n");
  CHECK(load_complaint(folder.at("deep0.toml")) ==
        "2|" + folder.at("deep31.toml") + ":1:1: 'extends' is more than 32 files deep");
  for (int i = 0; i < 20; ++i) {
    const std::string next = "'twice" + std::to_string(i + 1) + ".toml'";
    folder.write("twice" + std::to_string(i) + ".toml", "extends = [" + next + ", " + next + "]\n");
  }
  folder.write("twice20.toml", "");
  CHECK(load_complaint(folder.at("twice0.toml")).find("'extends' reads more than 256 files") != std::string::npos);
}

TEST_CASE("a missing file is exit 5, with the place that asked for it and the nearest name") {
  const ConfigFolder folder;
  folder.write("base.toml", "");
  CHECK(load_complaint(folder.at("bsae.toml")) ==
        "5|" + folder.at("bsae.toml") + ": no such file, did you mean '" + folder.at("base.toml") + "'?");
  const std::string exp = folder.write("other.toml", "\nextends = 'quite/elsewhere.toml'\n");
  CHECK(load_complaint(exp) ==
        "5|" + exp + ":2:1: cannot read " + folder.at("quite/elsewhere.toml") + ": no such file");
  CHECK(load_complaint(folder.at("base.toml/x")).substr(0, 2) == "5|");
  CHECK(load_complaint("").substr(0, 2) == "5|");
}

TEST_CASE("extends that is no file name is refused") {
  CHECK(parse_complaint("extends = 1\n") == "2|exp.toml:1:1: 'extends' holds an integer, but must hold file names");
  CHECK(parse_complaint("extends = ['a', {}]\n") == "2|exp.toml:1:17: 'extends' holds a table, but must hold file names");
  CHECK(parse_complaint("extends = [{}]\n") == "2|exp.toml:1:12: 'extends' holds a table, but must hold file names");
  CHECK(parse_complaint("[extends]\n") == "2|exp.toml:1:1: 'extends' holds a table, but must hold file names");
}

TEST_CASE("a directory, an unreadable file and a huge file are one clear line each") {
  const ConfigFolder folder;
  folder.write("sub/x.toml", "");
  CHECK(load_complaint(folder.at("sub")) == "2|" + folder.at("sub") + ": is a directory, not a TOML file");
  std::filesystem::create_symlink("loop.toml", folder.at("loop.toml"));
  CHECK(load_complaint(folder.at("loop.toml")) ==
        "2|" + folder.at("loop.toml") + ": cannot be opened: Too many levels of symbolic links");
  const std::string huge = folder.write("huge.toml", std::string(20'000'000, '#'));
  CHECK(load_complaint(huge) == "2|" + huge + ": larger than 1 MiB, the limit of an experiment file");
  CHECK(load_complaint(folder.write("full.toml", std::string(1 << 20, '#'))) == "nothing");
  if (geteuid() == 0) return;  // root reads everything
  const std::string locked = folder.write("locked.toml", "");
  std::filesystem::permissions(locked, std::filesystem::perms::none);
  CHECK(load_complaint(locked) == "2|" + locked + ": cannot be opened: Permission denied");
}

TEST_CASE("a byte order mark and Windows line ends are accepted") {
  const Table root = parse_config("\xEF\xBB\xBF" "a = 1\r\nb = 2\r\n", "exp.toml");
  CHECK(file_options(root).integer("b") == 2);
  CHECK(root.place_of("a") == "exp.toml:1:1");
  CHECK(root.place_of("b") == "exp.toml:2:1");
}

TEST_CASE("an empty file is an empty table") {
  CHECK(parse_config("", "exp.toml").present());
  CHECK(parse_config("", "exp.toml").keys().empty());
  CHECK(parse_config("", "exp.toml").place() == "exp.toml:1:1");
}

TEST_CASE("text that is no UTF-8 is refused at its place") {
  CHECK(parse_complaint("a = 1\nb = \"\xff\"\n") == "2|exp.toml:2:5: encountered invalid utf-8 sequence");
  CHECK(parse_complaint("# caf\xe9\n").substr(0, 13) == "2|exp.toml:1:");
  CHECK(parse_complaint("a = 1\n  größe = 2\n") ==
        "2|exp.toml:2:5: only quotes and comments may hold letters outside ASCII");
  CHECK(parse_complaint("\"größe\" = 'é' # ü\nb = \"\"\"\\\n  é\"\"\"\n") == "nothing");
  CHECK(parse_complaint(std::string("a = 1\0", 6)).substr(0, 13) == "2|exp.toml:1:");
}

TEST_CASE("a key or a table declared twice in one file is refused at the second place") {
  CHECK(parse_complaint("k = 1\nb = 2\nk = 3\n").substr(0, 13) == "2|exp.toml:3:");
  CHECK(parse_complaint("k = 1\nb = 2\nk = 3\n").find("cannot redefine existing integer 'k'") != std::string::npos);
  CHECK(parse_complaint("[moe]\n[moe]\n") == "2|exp.toml:2:1: cannot redefine existing table 'moe'");
}

TEST_CASE("broken TOML is one line with a place") {
  for (const std::string text : {"a = \n", "a = [1,\n", "a = tru\n", "[moe\n", "a = 1 b = 2\n", "k = \"abc\n", "= 1", "a"}) {
    const std::string message = parse_complaint(text);
    INFO(message);
    CHECK(message.substr(0, 11) == "2|exp.toml:");
    CHECK(message.find('\n') == std::string::npos);
    CHECK(message.find("while parsing") == std::string::npos);
  }
}

TEST_CASE("dates are no values") {
  CHECK(parse_complaint("a = 2020-01-01\n") ==
        "2|exp.toml:1:1: a date or a time is no value here; a string has quotes");
}

TEST_CASE("nesting without end is refused before it can exhaust the stack") {
  const std::string too_deep = "nested more than 64 deep";
  CHECK(parse_complaint("a = " + std::string(10'000, '[')) == "2|exp.toml:1:69: " + too_deep);
  CHECK(parse_complaint("a = " + repeated("{a=", 10'000)) == "2|exp.toml:1:197: " + too_deep);
  CHECK(parse_complaint("b = 1\n" + repeated("a.", 400'000) + "a = 1") == "2|exp.toml:2:128: " + too_deep);
  CHECK(parse_complaint("[" + repeated("\"a\".", 100'000) + "a]") == "2|exp.toml:1:257: " + too_deep);
  CHECK(parse_complaint("x = [\"\"\"a\"\"\"\", {" + repeated("a.", 400'000) + "a = 1}]").find(too_deep) !=
        std::string::npos);
  CHECK(parse_complaint(repeated("[[a]]\n", 10) + "[" + repeated("a.", 60) + "a]\n[" + repeated("a.", 60) + "a." +
                        repeated("b.", 3) + "b]\n") == "2|exp.toml:12:129: " + too_deep);
}

TEST_CASE("a header and its values nest together") {
  CHECK(parse_complaint("[" + repeated("a.", 40) + "a]\nx = " + repeated("[", 22) + repeated("]", 22)) == "nothing");
  CHECK(parse_complaint("[" + repeated("a.", 40) + "a]\nx = " + repeated("[", 30) + repeated("]", 30)) ==
        "2|exp.toml:2:28: nested more than 64 deep");
}

TEST_CASE("dots and brackets in strings and comments nest nothing") {
  const std::string dots(100, '.'), brackets(100, '[');
  CHECK(parse_complaint("a = \"" + dots + "\\\"" + brackets + "\" # " + dots + brackets + "\nb = '" + brackets + "'\n") ==
        "nothing");
  CHECK(parse_complaint("a = \"\"\"" + dots + "\n\"" + brackets + "\n\"\"\"\nb = '''\n" + brackets + "'''\n") == "nothing");
  CHECK(parse_complaint(repeated("x = 1.5\n", 1) + "y = [" + repeated("1.5, ", 1000) + "]\n") == "nothing");
}
