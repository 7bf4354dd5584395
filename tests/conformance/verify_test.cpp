// The conformance kit on routers that it has to find wanting, and on honest ones like them. (Every registered router has a test
// of its own, `verify.<name>`.)
#include "experiments/verify_case.h"
#include "tests/conformance/mutants.h"
#include "tests/support/leaky_router.h"
#include "tests/support/program.h"

#include <catch2/catch_test_macros.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>

namespace moelab {
namespace {

const Registration<RouterEntry> leaky_registration = test::registered_leaky_router();

const RouterEntry& entry_of(const std::string& name) { return Registry<RouterEntry>::instance().find(name); }

bool is_of_this_test(const std::string& name) {
  return name.starts_with("mutant_") || name.starts_with("control_") || name.starts_with("leaky_");
}

void require_all_held(const std::string& name) {
  const std::vector<Finding> findings = verify_router(entry_of(name), {.cases = 5, .defaults_only = true});
  CHECK(findings.size() == router_properties().size());
  for (const Finding& finding : findings) {
    INFO(finding.name << " " << finding.property << ": " << finding.reason);
    CHECK(finding.verdict != Verdict::kFail);
    CHECK((finding.verdict == Verdict::kPass) == finding.reason.empty());
  }
}

TEST_CASE("honest routers that do what mutants only pretend to do hold every property") {
  for (const std::string& name : controls()) require_all_held(name);
}

bool may_fail(const Mutant& mutant, const std::string& property) {
  return std::any_of(mutant.also.begin(), mutant.also.end(),
                     [&](const std::string& also) { return also == property || also == kAnyProperty; });
}

// The kill has to be specific: the property fails that the mutant was made for, and none beside it that it is not listed with.
void require_killed(const Mutant& mutant, const RouterEntry& entry) {
  const std::vector<Finding> deadly = verify_router(entry, {.cases = 5, .only = {mutant.property}});
  REQUIRE(deadly.size() == 1);
  INFO(mutant.name << " " << mutant.property << ": " << deadly.front().reason);
  CHECK(deadly.front().verdict == Verdict::kFail);
  CHECK(deadly.front().reason.find("seed") != std::string::npos);
  for (const Finding& finding : verify_router(entry, {.cases = 5, .defaults_only = true})) {
    if (finding.verdict != Verdict::kFail || finding.property == mutant.property) continue;
    INFO(finding.property << ": " << finding.reason);
    CHECK(may_fail(mutant, finding.property));
  }
}

TEST_CASE("every mutant is killed by the property made for it, with a reason that names the case, and by no unrelated one") {
  for (const Mutant& mutant : mutants()) require_killed(mutant, entry_of(mutant.name));
}

TEST_CASE("every lying loss is found on an honest router, and an honest loss like them is not") {
  for (const Mutant& mutant : loss_mutants()) {
    loss_on_trial() = mutant.name;
    require_killed(mutant, entry_of("control_plain"));
  }
  loss_on_trial() = "control_loss";
  require_all_held("control_plain");
  loss_on_trial().clear();
}

TEST_CASE("every mutant of the test binary is in the list of those that must die, and there are enough of them") {
  std::set<std::string> listed;
  for (const Mutant& mutant : mutants()) listed.insert(mutant.name);
  for (const Mutant& mutant : loss_mutants()) listed.insert(mutant.name);
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all())
    if (entry.name.starts_with("mutant_")) CHECK(listed.count(entry.name) == 1);
  for (const LossEntry& entry : Registry<LossEntry>::instance().all())
    if (entry.name.starts_with("mutant_")) CHECK(listed.count(entry.name) == 1);
  CHECK(listed.size() >= 25);
}

TEST_CASE("every property of the kit kills some mutant, or says here why none can be made") {
  std::set<std::string> deadly;
  for (const auto& list : {mutants(), loss_mutants()})
    for (const Mutant& mutant : list) deadly.insert(mutant.property);
  // These look for mistakes of executors, of experts and of the model's handling of padding, which a router cannot make.
  for (const char* of_others : {"executors", "unused_expert", "padding"}) deadly.insert(of_others);
  for (const Property& property : router_properties()) {
    INFO(property.name);
    CHECK(deadly.count(property.name) == 1);
  }
}

TEST_CASE("a router that looks at the next token and denies it is caught by the leak probe, in training and in evaluation") {
  const RouterEntry& leaky = entry_of(test::kLeakyRouter);
  const std::vector<Finding> findings = verify_router(leaky, {.only = {"causality"}, .defaults_only = true});
  CHECK(findings.front().verdict == Verdict::kFail);
  CHECK(findings.front().reason.find("changes earlier rows of its sequence") != std::string::npos);
  const RouterEntry& honest = entry_of("hash");
  const Variant future{.label = "kind = \"future\"", .options = {{"kind", std::string("future")}}};
  const Subject subject{honest, future, kit_router(honest, future, {})->facts()};
  CHECK(subject.facts.looks_ahead);
  for (const Property& property : router_properties())
    if (property.name == "causality") CHECK_NOTHROW(property.check(subject));  // it says so, and the probe sees it
}

// The capacity that is known to leak is seen to do so, and only that one.
TEST_CASE("the leak probe sees later rows take places where all first choices are served first, and not row by row") {
  const RouterEntry& entry = entry_of("softmax_topk");
  const Subject subject{entry, {}, entry.facts};
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    double by_choice = 0, by_row = 0;
    for (int64_t seed = 0; seed < 5; ++seed) {
      KitCase at{.capacity = {.mode = CapacityPolicy::Mode::kFactor, .order = CapacityPolicy::Order::kChoiceMajor},
                 .mode = mode, .seed = seed};
      CHECK_FALSE(causality(entry.facts, at.capacity, mode, 2).causal);
      by_choice = std::max(by_choice, probe_leaks(subject, at).worst);
      at.capacity.order = CapacityPolicy::Order::kTokenMajor;
      CHECK(causality(entry.facts, at.capacity, mode, 2).causal);
      by_row = std::max(by_row, probe_leaks(subject, at).worst);
    }
    CHECK(by_choice > 1e-3);
    CHECK(by_row < 1e-12);
  }
}

bool tells_of(const std::string& name, Event::Kind kind, int64_t room = 0) {
  const RouterEntry& entry = entry_of(name);
  const Variant variant{.label = "", .room = room};
  for (int64_t seed = 0; seed < 3; ++seed) {
    Subject subject{entry, variant, kit_router(entry, variant, {})->facts()};
    subject.seed = seed;
    for (const StageEvent& stage : stages_of(subject))
      if (stage.event.kind == kind) return true;
  }
  return false;
}

TEST_CASE("the kit finds the stages at which it saves and loads: what end_step() tells of, stages shortened by their options") {
  using Kind = Event::Kind;
  CHECK(tells_of("stablemoe", Kind::kStageChanged));
  CHECK(tells_of("stablemoe", Kind::kFreeze));
  CHECK(tells_of("lory", Kind::kStageChanged));
  CHECK(tells_of("lory", Kind::kExpertAdded));
  CHECK(tells_of("dynmoe", Kind::kExpertRemoved, 2));
  CHECK(tells_of("dynmoe", Kind::kExpertAdded, 2));
  CHECK_FALSE(tells_of("softmax_topk", Kind::kStageChanged));
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
                                           "renormalise = \"after_drop\"", "noise = none", "noise = normal", "noise = jitter",
                                           "max_experts above experts"});
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
  const std::string kNothingNamed =
      "moelab: verify: name routers or experts, or say --all (every router), --experts (every expert) or both\n";
  const auto refusal = [](const std::vector<std::string>& arguments) {
    const test::ProgramResult result = test::run_moelab(arguments);
    CHECK(result.code == 2);
    CHECK(result.out.empty());
    return result.err;
  };
  CHECK(refusal({"verify", "swtich"}).find("switch") != std::string::npos);
  CHECK(refusal({"verify", "switch", "--property", "tie"}) ==
        "moelab: verify: there is no property 'tie', did you mean 'ties'?\n");
  CHECK(refusal({"verify"}) == kNothingNamed);
  CHECK(refusal({"verify", "switch", "--all"}) == kNothingNamed);
}

}  // namespace
}  // namespace moelab
