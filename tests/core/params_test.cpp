#include "core/error.h"
#include "core/params.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>

#include <cmath>
#include <limits>

using namespace moelab;

namespace {

const OptionSpecs params_specs{{"flag", false, "a flag"},
                               {"k", int64_t{2}, "choices per token", 1, 64},
                               {"rate", 0.5, "a rate", 0.0},
                               {"scale", 1.0, "any number"},
                               {"mode", std::string("none"), "how", -INFINITY, INFINITY, {"none", "before_drop", "after_drop"}},
                               {"layers", std::vector<int64_t>{0, 1}, "which blocks"}};

const OptionSpec& params_spec(const std::string& name) {
  for (const OptionSpec& spec : params_specs)
    if (spec.name == name) return spec;
  throw std::logic_error(name);
}

std::string set_complaint(const std::string& name, OptionValue value) {
  Options options(params_specs);
  try {
    options.set(params_spec(name), std::move(value));
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "nothing";
}

}  // namespace

TEST_CASE("an option that nobody set has its default") {
  const Options options(params_specs);
  CHECK_FALSE(options.flag("flag"));
  CHECK(options.integer("k") == 2);
  CHECK(options.real("rate") == 0.5);
  CHECK(options.text("mode") == "none");
  CHECK(options.integers("layers") == std::vector<int64_t>{0, 1});
  CHECK_FALSE(options.was_set("k"));
  CHECK(options.declared("k"));
  CHECK_FALSE(options.declared("q"));
  CHECK(options.all().size() == params_specs.size());
}

TEST_CASE("a set option holds the value and says that it was set") {
  Options options(params_specs);
  options.set(params_spec("flag"), true);
  options.set(params_spec("k"), int64_t{64});
  options.set(params_spec("mode"), std::string("after_drop"));
  options.set(params_spec("layers"), std::vector<int64_t>{});
  CHECK(options.flag("flag"));
  CHECK(options.integer("k") == 64);
  CHECK(options.text("mode") == "after_drop");
  CHECK(options.integers("layers").empty());
  CHECK(options.was_set("k"));
  CHECK_FALSE(options.was_set("rate"));
}

TEST_CASE("a real option takes an integer, and nothing else is converted") {
  Options options(params_specs);
  options.set(params_spec("rate"), int64_t{3});
  CHECK(options.real("rate") == 3.0);
  CHECK(set_complaint("k", 2.0) == "'k' is a real, but must be an integer");
  CHECK(set_complaint("flag", int64_t{1}) == "'flag' is an integer, but must be a bool");
  CHECK(set_complaint("rate", std::string("fast")) == "'rate' is a string, but must be a real");
  CHECK(set_complaint("mode", true) == "'mode' is a bool, but must be a string");
  CHECK(set_complaint("layers", int64_t{1}) == "'layers' is an integer, but must be a list of integers");
}

TEST_CASE("ranges are inclusive, and NaN is in none") {
  CHECK(set_complaint("k", int64_t{1}) == "nothing");
  CHECK(set_complaint("k", int64_t{0}) == "'k' is 0, but must be between 1 and 64");
  CHECK(set_complaint("k", int64_t{65}) == "'k' is 65, but must be between 1 and 64");
  CHECK(set_complaint("rate", -0.5) == "'rate' is -0.5, but must be at least 0");
  CHECK(set_complaint("rate", std::nan("")) == "'rate' is nan, but must be at least 0");
  CHECK(set_complaint("scale", std::nan("")) == "'scale' is nan, but must be a number");
  CHECK(set_complaint("scale", -1e300) == "nothing");
}

TEST_CASE("a maximum may be excluded") {
  const OptionSpec beta = option("beta", 0.9, "").at_least(0).below(1);
  Options options({beta});
  CHECK_THROWS_WITH(options.set(beta, 1.0), "'beta' is 1, but must be at least 0 and less than 1");
  CHECK_NOTHROW(options.set(beta, 0.999));
  CHECK_NOTHROW(options.set(beta, 0.0));
}

// An option with two readers, of a word and of a number.
TEST_CASE("an option that no other option reads has a reason, unless its value is the default's") {
  const OptionSpec mode = option("mode", "none", "").one_of({"none", "share", "count"}), groups = option("groups", 0, "");
  const OptionSpec factor = option("factor", 1.0, "").read_when("mode", {"share"}).read_unless("groups", "0");
  Options options({mode, groups, factor});
  CHECK(unread_reason(factor, options).empty());
  options.set(factor, 1.0);
  CHECK(unread_reason(factor, options).empty());
  options.set(factor, 2.0);
  CHECK(unread_reason(factor, options) ==
        "'factor' is not read with mode = \"none\" and groups = 0; it is read with mode = share, or unless groups = 0");
  options.set(groups, int64_t{3});
  CHECK(unread_reason(factor, options).empty());
  options.set(groups, int64_t{0});
  options.set(mode, std::string("share"));
  CHECK(unread_reason(factor, options).empty());
  CHECK(unread_reason(mode, options).empty());
}

TEST_CASE("an unknown choice is answered with the choices and the nearest one") {
  CHECK(set_complaint("mode", std::string("before_drp")) ==
        "'mode' is \"before_drp\", but must be one of none, before_drop, after_drop, did you mean 'before_drop'?");
  CHECK(set_complaint("mode", std::string("zebra_crossing")) ==
        "'mode' is \"zebra_crossing\", but must be one of none, before_drop, after_drop");
}

TEST_CASE("a value that is refused leaves the option as it was") {
  Options options(params_specs);
  CHECK_THROWS_AS(options.set(params_spec("k"), int64_t{0}), Error);
  CHECK(options.integer("k") == 2);
  CHECK_FALSE(options.was_set("k"));
}

TEST_CASE("asking for an undeclared option is a bug of ours") {
  const Options options(params_specs);
  try {
    options.integer("experts");
    FAIL("no error");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kBug);
    CHECK(std::string(error.what()) == "broken invariant: option 'experts' was never declared");
  }
}

TEST_CASE("option values are written as TOML writes them") {
  CHECK(to_text(true) == "true");
  CHECK(to_text(int64_t{-3}) == "-3");
  CHECK(to_text(0.1) == "0.1");
  CHECK(to_text(1.0) == "1.0");
  CHECK(to_text(-0.0) == "-0.0");
  CHECK(to_text(1e-5) == "1e-05");
  CHECK(to_text(std::numeric_limits<double>::infinity()) == "inf");
  CHECK(to_text(std::string("a \"b\" \\ \n\t\x01 ä")) == "\"a \\\"b\\\" \\\\ \\n\\t\\u0001 ä\"");
  CHECK(to_text(std::vector<int64_t>{1, 2}) == "[1, 2]");
  CHECK(to_text(std::vector<int64_t>{}) == "[]");
}

TEST_CASE("option types have names, and names have articles") {
  CHECK(type_name(false) == "bool");
  CHECK(type_name(int64_t{1}) == "integer");
  CHECK(type_name(1.0) == "real");
  CHECK(type_name(std::string()) == "string");
  CHECK(type_name(std::vector<int64_t>{}) == "list of integers");
  CHECK(with_article("integer") == "an integer");
  CHECK(with_article("real") == "a real");
}
