// What Table::options says about each key: the exact messages.
#include "config_support.h"

#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;

namespace {

const OptionSpecs router_specs{{"name", std::string("switch"), "router"},
                               {"k", int64_t{2}, "choices", 1, 8},
                               {"rate", 0.5, "rate", 0.0, 1.0},
                               {"scale", 1.0, "any"},
                               {"bias", false, "bias"},
                               {"order", std::string("k_major"), "order", -INFINITY, INFINITY, {"k_major", "token_major"}},
                               {"blocks", std::vector<int64_t>{}, "blocks"}};

Options router_options(const std::string& lines, const std::vector<std::string>& overrides = {}) {
  const Table root = parse_config("[moe.router]\n" + lines, "exp.toml", overrides);
  return root.child("moe").child("router").options(router_specs, {"gate"});
}

std::string router_complaint(const std::string& lines, const std::vector<std::string>& overrides = {}) {
  return complaint([&] { router_options(lines, overrides); });
}

}  // namespace

TEST_CASE("every option type is read") {
  const Options options = router_options("name='hash'\nk=3\nrate=0.25\nbias=true\norder='token_major'\nblocks=[1, -2]\n");
  CHECK(options.text("name") == "hash");
  CHECK(options.integer("k") == 3);
  CHECK(options.real("rate") == 0.25);
  CHECK(options.flag("bias"));
  CHECK(options.text("order") == "token_major");
  CHECK(options.integers("blocks") == std::vector<int64_t>{1, -2});
  CHECK_FALSE(options.was_set("scale"));
  CHECK(options.was_set("k"));
}

TEST_CASE("an absent table has every default") {
  const Table absent = parse_config("", "exp.toml").child("moe").child("router");
  CHECK_FALSE(absent.present());
  CHECK(absent.place().empty());
  CHECK(absent.path() == "moe.router");
  CHECK(absent.options(router_specs).integer("k") == 2);
  CHECK(absent.keys().empty());
  CHECK(Table().options(router_specs).real("scale") == 1.0);
}

TEST_CASE("integers are accepted for reals, and empty lists for lists") {
  const Options options = router_options("rate=1\nblocks=[]\n");
  CHECK(options.real("rate") == 1.0);
  CHECK(options.was_set("blocks"));
}

TEST_CASE("an unknown key names its place, its table and the nearest key") {
  CHECK(router_complaint("x = 1\n") == "2|exp.toml:2:1: unknown key 'x' in [moe.router], did you mean 'k'?");
  CHECK(router_complaint("k = 1\n  nmae = 'a'\n") ==
        "2|exp.toml:3:3: unknown key 'nmae' in [moe.router], did you mean 'name'?");
}

TEST_CASE("an unknown key may be meant for a sub-table") {
  CHECK(router_complaint("[moe.router.gaet]\n") ==
        "2|exp.toml:2:1: unknown key 'gaet' in [moe.router], did you mean 'gate'?");
  CHECK(router_complaint("[moe.router.gate]\nanything = 1\n") == "nothing");
}

TEST_CASE("an unknown key that resembles none is answered with the list") {
  CHECK(router_complaint("temperature = 1\n") ==
        "2|exp.toml:2:1: unknown key 'temperature' in [moe.router], known are bias, blocks, gate, k, name, order, rate, scale");
  const Table root = parse_config("a = 1\n", "exp.toml");
  CHECK(complaint([&] { root.options({}); }) == "2|exp.toml:1:1: unknown key 'a' at the top of the file, which takes no keys");
}

TEST_CASE("wrong types are refused for every option type") {
  CHECK(router_complaint("k = 'two'\n") == "2|exp.toml:2:1: 'k' is a string, but must be an integer");
  CHECK(router_complaint("k = 2.0\n") == "2|exp.toml:2:1: 'k' is a real, but must be an integer");
  CHECK(router_complaint("rate = true\n") == "2|exp.toml:2:1: 'rate' is a bool, but must be a real");
  CHECK(router_complaint("bias = 1\n") == "2|exp.toml:2:1: 'bias' is an integer, but must be a bool");
  CHECK(router_complaint("name = 1\n") == "2|exp.toml:2:1: 'name' is an integer, but must be a string");
  CHECK(router_complaint("blocks = 1\n") == "2|exp.toml:2:1: 'blocks' is an integer, but must be a list of integers");
  CHECK(router_complaint("k = [1]\n") == "2|exp.toml:2:1: 'k' is a list, but must be an integer");
  CHECK(router_complaint("k = {a = 1}\n") == "2|exp.toml:2:5: 'k' is a table, but must be an integer");
  CHECK(router_complaint("blocks = {}\n") == "2|exp.toml:2:10: 'blocks' is a table, but must be a list of integers");
}

TEST_CASE("a wrong element of a list is found at its own place") {
  CHECK(router_complaint("blocks = [1, 2.5]\n") ==
        "2|exp.toml:2:14: 'blocks' holds a real, but must be a list of integers");
  CHECK(router_complaint("blocks = [\n  1,\n  'a']\n") ==
        "2|exp.toml:4:3: 'blocks' holds a string, but must be a list of integers");
  CHECK(router_complaint("blocks = [[1]]\n") == "2|exp.toml:2:11: 'blocks' holds a list, but must be a list of integers");
}

TEST_CASE("values out of range are refused, NaN always") {
  CHECK(router_complaint("k = 0\n") == "2|exp.toml:2:1: 'k' is 0, but must be between 1 and 8");
  CHECK(router_complaint("k = 9\n") == "2|exp.toml:2:1: 'k' is 9, but must be between 1 and 8");
  CHECK(router_complaint("rate = 1.5\n") == "2|exp.toml:2:1: 'rate' is 1.5, but must be between 0 and 1");
  CHECK(router_complaint("rate = inf\n") == "2|exp.toml:2:1: 'rate' is inf, but must be between 0 and 1");
  CHECK(router_complaint("scale = nan\n") == "2|exp.toml:2:1: 'scale' is nan, but must be a number");
}

TEST_CASE("an unknown choice is answered with the choices and the nearest one") {
  CHECK(router_complaint("order = 'kmajor'\n") ==
        "2|exp.toml:2:1: 'order' is \"kmajor\", but must be one of k_major, token_major, did you mean 'k_major'?");
}

TEST_CASE("a wrong override is shown as it was typed") {
  CHECK(router_complaint("k = 1\n", {"moe.router.k=many"}) ==
        "2|--set moe.router.k=many: 'k' is a string, but must be an integer");
  CHECK(router_complaint("k = 1\n", {"moe.router.q=1"}) ==
        "2|--set moe.router.q=1: unknown key 'q' in [moe.router], did you mean 'k'?");
}

TEST_CASE("a reader's own complaint carries the place of the key, or of the table around a missing one") {
  const Table root = parse_config("[moe]\nexperts = 8\n[moe.router]\nk = 9\n", "exp.toml");
  const Table moe = root.child("moe");
  CHECK(moe.child("router").place_of("k") == "exp.toml:4:1");
  CHECK(complaint([&] { moe.child("router").fail("k", "k = 9 is more than experts = 8"); }) ==
        "2|exp.toml:4:1: k = 9 is more than experts = 8");
  CHECK(moe.place_of("losses") == "exp.toml:1:1");
  CHECK(moe.child("router").place_of("name") == "exp.toml:3:1");
  CHECK(moe.child("noise").place_of("std") == "exp.toml:1:1");
  CHECK(complaint([&] { Table().fail("k", "k is missing"); }) == "2|k is missing");
}
