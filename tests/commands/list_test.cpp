// `list` and `describe`.
#include "tests/commands/commands_support.h"

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <set>

namespace moelab::test {
namespace {

const std::set<std::string> kEntryKeys{"name", "title", "citation", "facts", "options"};
const std::set<std::string> kOptionKeys{"name", "type", "default", "min", "max", "choices", "doc"};

std::set<std::string> keys_of(const nlohmann::json& object) {
  std::set<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.insert(key);
  return keys;
}

nlohmann::json entry_named(const nlohmann::json& entries, const std::string& name) {
  for (const nlohmann::json& entry : entries)
    if (entry.at("name") == name) return entry;
  return nullptr;
}

TEST_CASE("every list is an array of objects with the documented keys") {
  const std::string kind = GENERATE("routers", "experts", "losses", "objectives", "datasets", "models", "metrics");
  const ProgramResult result = moelab_run({"list", kind, "--json"});
  REQUIRE(result.code == 0);
  const nlohmann::json entries = json_of(result);
  REQUIRE(entries.is_array());
  REQUIRE(!entries.empty());
  for (const nlohmann::json& entry : entries) {
    CHECK(keys_of(entry) == kEntryKeys);
    CHECK(entry.at("facts").is_object());
    for (const nlohmann::json& option : entry.at("options")) CHECK(keys_of(option) == kOptionKeys);
  }
}

TEST_CASE("lists are sorted by name, and the text has one line for each") {
  const std::string kind = GENERATE("routers", "losses", "metrics");
  const nlohmann::json entries = json_of(moelab_run({"list", kind, "--json"}));
  const std::string text = moelab_run({"list", kind}).out;
  CHECK(static_cast<size_t>(std::count(text.begin(), text.end(), '\n')) == entries.size());
  for (size_t i = 1; i < entries.size(); ++i)
    CHECK(entries[i - 1].at("name").get<std::string>() < entries[i].at("name").get<std::string>());
}

TEST_CASE("the options of a router say type, default, range and choices") {
  const nlohmann::json router = entry_named(json_of(moelab_run({"list", "routers", "--json"})), "softmax_topk");
  const nlohmann::json k = entry_named(router.at("options"), "k");
  CHECK(k.at("type") == "integer");
  CHECK(k.at("default") == 2);
  CHECK(k.at("min") == 1);
  CHECK(k.at("max").is_null());
  const std::vector<std::string> choices = entry_named(router.at("options"), "softmax").at("choices");
  CHECK(choices == std::vector<std::string>({"before", "after"}));
  CHECK(router.at("facts").at("plan") == "sparse");
}

// Switch: E·Σ f·P over 8 experts at k = 1 reads 1 at balance and 8 when all rows take one expert.
TEST_CASE("describe gives the paper's losses with their values at balance and at collapse") {
  const nlohmann::json entry = json_of(moelab_run({"describe", "routers", "switch", "--json"}));
  const nlohmann::json loss = entry.at("paper_losses").at(0);
  CHECK(loss.at("name") == "balance");
  CHECK(loss.at("coefficient").get<double>() == Catch::Approx(0.01));
  CHECK(loss.at("at_balance") == 1);
  CHECK(loss.at("at_collapse") == 8);
  CHECK(entry.at("noise") == "uniform(0,1) [T,D]");
}

TEST_CASE("describe says where a router is causal and why") {
  const nlohmann::json rows = json_of(moelab_run({"describe", "routers", "softmax_topk", "--json"})).at("causality");
  REQUIRE(rows.size() == 2);
  for (const nlohmann::json& row : rows) {
    CHECK(row.at("causal") == true);
    CHECK(row.at("reason") == "each row decides for itself");
  }
}

TEST_CASE("everything that is listed can be described, as text and as JSON") {
  const std::string kind = GENERATE("routers", "experts", "losses", "objectives", "datasets", "models", "metrics");
  for (const nlohmann::json& entry : json_of(moelab_run({"list", kind, "--json"}))) {
    const std::string name = entry.at("name");
    CAPTURE(kind, name);
    const ProgramResult text = moelab_run({"describe", kind, name});
    CHECK(text.code == 0);
    CHECK(text.out.starts_with(name + ": "));
    CHECK(contains(text.out, "\noptions\n"));
    CHECK(json_of(moelab_run({"describe", kind, name, "--json"})).at("name") == name);
  }
}

TEST_CASE("list without a kind tells which kinds there are, and a kind may be named in the singular") {
  const ProgramResult kinds = moelab_run({"list"});
  CHECK(kinds.code == 0);
  for (const char* kind : {"routers", "experts", "losses", "objectives", "datasets", "models", "metrics"})
    CHECK(contains(kinds.out, kind));
  CHECK(moelab_run({"describe", "router", "switch"}).out == moelab_run({"describe", "routers", "switch"}).out);
}

TEST_CASE("describe refuses an unknown name with the nearest one") {
  const ProgramResult result = moelab_run({"describe", "routers", "swich"});
  CHECK(result.code == 2);
  CHECK(result.err.starts_with("moelab: 'swich' is none of the routers, did you mean 'switch'? there are "));
}

}  // namespace
}  // namespace moelab::test
