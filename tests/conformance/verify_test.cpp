// The conformance kit on every registered router, and on routers that it has to find wanting.
#include "experiments/verify_kit.h"
#include "tests/conformance/mutants.h"
#include "tests/support/program.h"

#include <catch2/catch_test_macros.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>

namespace moelab {
namespace {

const RouterEntry& entry_of(const std::string& name) { return Registry<RouterEntry>::instance().find(name); }

bool is_of_this_test(const std::string& name) { return name.starts_with("mutant_") || name.starts_with("control_"); }

void require_all_held(const std::string& name, int64_t cases) {
  const std::vector<Finding> findings = verify_router(entry_of(name), {.cases = cases});
  CHECK(findings.size() == router_properties().size());
  for (const Finding& finding : findings) {
    INFO(finding.name << " " << finding.property << ": " << finding.reason);
    CHECK(finding.verdict != Verdict::kFail);
    CHECK((finding.verdict == Verdict::kPass) == finding.reason.empty());
  }
}

TEST_CASE("every router holds every property, the executors over 200 random cases in double and in float") {
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all())
    if (!is_of_this_test(entry.name)) require_all_held(entry.name, 200);
}

TEST_CASE("honest routers of other kinds hold every property: with state, and with rows that depend on each other") {
  for (const std::string& name : controls()) require_all_held(name, 5);
}

TEST_CASE("every mutant is killed by the property made for it, with a reason that names the case") {
  for (const Mutant& mutant : mutants()) {
    const std::vector<Finding> findings = verify_router(entry_of(mutant.name), {.cases = 5, .only = {mutant.property}});
    REQUIRE(findings.size() == 1);
    INFO(mutant.name << " " << mutant.property << ": " << findings.front().reason);
    CHECK(findings.front().verdict == Verdict::kFail);
    CHECK(findings.front().reason.find("seed") != std::string::npos);
  }
}

TEST_CASE("every mutant of the test binary is in the list of those that must die") {
  std::set<std::string> listed;
  for (const Mutant& mutant : mutants()) listed.insert(mutant.name);
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all())
    if (entry.name.starts_with("mutant_")) CHECK(listed.count(entry.name) == 1);
}

TEST_CASE("a router that throws fails the property that met it, and one that cannot be built fails all") {
  RouterEntry entry = entry_of("control_plain");
  entry.make = [](RouterSpec) -> std::unique_ptr<Router> { throw std::runtime_error("no room"); };
  const std::vector<Finding> findings = verify_router(entry, {});
  CHECK(findings.size() == router_properties().size());
  for (const Finding& finding : findings) {
    CHECK(finding.verdict == Verdict::kFail);
    CHECK(finding.reason == "it cannot be built: no room");
  }
}

TEST_CASE("the variants are the defaults, then each other choice alone") {
  std::vector<std::string> labels;
  for (const Variant& variant : variants_of(entry_of("softmax_topk"))) labels.push_back(variant.label);
  CHECK(labels == std::vector<std::string>{"", "softmax = \"after\"", "renormalise = \"before_drop\"",
                                           "renormalise = \"after_drop\"", "noise = none", "noise = normal", "noise = jitter"});
}

TEST_CASE("verify --json is one array of findings, and the program knows no mutant") {
  const test::ProgramResult result = test::run_program(
      MOELAB_PROGRAM, {"verify", "--all", "--json", "--property", "ties", "--property", "non_finite"});
  REQUIRE(result.code == 0);
  const nlohmann::json findings = nlohmann::json::parse(result.out);
  std::set<std::string> names;
  for (const nlohmann::json& finding : findings) {
    CHECK(finding.at("kind") == "router");
    CHECK((finding.at("result") == "pass" || finding.at("result") == "n/a"));
    CHECK((finding.at("result") == "n/a") == (finding.at("reason") != ""));
    CHECK((finding.at("property") == "ties" || finding.at("property") == "non_finite"));
    names.insert(finding.at("name"));
  }
  CHECK(names.size() * 2 == findings.size());
  CHECK(names.count("softmax_topk") == 1);
  CHECK(std::none_of(names.begin(), names.end(), is_of_this_test));
}

TEST_CASE("verify refuses unknown names, unknown properties, and to verify nothing") {
  const auto refusal = [](const std::vector<std::string>& arguments) {
    const test::ProgramResult result = test::run_program(MOELAB_PROGRAM, arguments);
    CHECK(result.code == 2);
    CHECK(result.out.empty());
    return result.err;
  };
  CHECK(refusal({"verify", "swtich"}).find("switch") != std::string::npos);
  CHECK(refusal({"verify", "switch", "--property", "tie"}) ==
        "moelab: verify: there is no property 'tie', did you mean 'ties'?\n");
  CHECK(refusal({"verify"}) == "moelab: verify: name routers, or say --all\n");
  CHECK(refusal({"verify", "switch", "--all"}) == "moelab: verify: name routers, or say --all\n");
}

}  // namespace
}  // namespace moelab
