// `moelab verify`: the conformance kit on registered routers and experts, and on those of a plugin.
#include "experiments/cli.h"

#include "core/error.h"
#include "experiments/plugins.h"
#include "experiments/text_table.h"
#include "experiments/verify_expert.h"
#include "experiments/verify_kit.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <memory>

namespace moelab {
namespace {

struct VerifyArguments {
  std::vector<std::string> names;
  bool all = false;
  bool experts = false;
  bool json = false;
  VerifySettings settings;
};

// What to verify, by name.
struct Wanted {
  std::vector<std::string> routers, experts;
};

template <class Entry>
std::vector<std::string> registered_names() {
  std::vector<std::string> names;
  for (const Entry& entry : Registry<Entry>::instance().all()) names.push_back(entry.name);
  return names;
}

template <class Entry>
void append_new(std::vector<std::string>& to, const std::vector<std::string>& before) {
  for (const std::string& name : registered_names<Entry>())
    if (std::count(before.begin(), before.end(), name) == 0) to.push_back(name);
}

// The routers and experts that a shared library brings.
void append_plugin(Wanted& wanted, const std::string& path) {
  const auto routers = registered_names<RouterEntry>(), experts = registered_names<ExpertEntry>();
  const size_t before = wanted.routers.size() + wanted.experts.size();
  load_plugin(path);
  append_new<RouterEntry>(wanted.routers, routers);
  append_new<ExpertEntry>(wanted.experts, experts);
  if (wanted.routers.size() + wanted.experts.size() == before)
    usage_error(fmt::format("verify: plugin '{}' registers no router and no expert", path));
}

// A name of both kinds means both; an unknown one is a router's, in the message too.
void append_name(Wanted& wanted, const std::string& name) {
  const bool expert = Registry<ExpertEntry>::instance().contains(name);
  if (expert) wanted.experts.push_back(name);
  if (!expert || Registry<RouterEntry>::instance().contains(name))
    wanted.routers.push_back(Registry<RouterEntry>::instance().find(name).name);
}

Wanted wanted_plugins(const VerifyArguments& arguments) {
  if (!arguments.names.empty() == (arguments.all || arguments.experts))
    usage_error("verify: name routers or experts, or say --all (every router), --experts (every expert) or both");
  Wanted wanted;
  if (arguments.all) wanted.routers = registered_names<RouterEntry>();
  if (arguments.experts) wanted.experts = registered_names<ExpertEntry>();
  for (const std::string& word : arguments.names)  // all looked up before an hour of work, not after it
    if (word.ends_with(".so")) append_plugin(wanted, word);
    else append_name(wanted, word);
  return wanted;
}

void check_property_names(const std::vector<std::string>& wanted) {
  std::vector<std::string> known;
  for (const Property& property : router_properties()) known.push_back(property.name);
  for (const ExpertProperty& property : expert_properties()) known.push_back(property.name);
  for (const std::string& name : wanted)
    if (std::count(known.begin(), known.end(), name) == 0)
      usage_error(fmt::format("verify: there is no property '{}'{}", name, did_you_mean(name, known)));
}

nlohmann::ordered_json findings_json(const std::vector<Finding>& findings) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Finding& finding : findings)
    list.push_back({{"kind", finding.kind},
                    {"name", finding.name},
                    {"property", finding.property},
                    {"result", to_string(finding.verdict)},
                    {"reason", finding.reason}});
  return list;
}

// One row per property, one column per router, or per expert.
std::string findings_table(const std::vector<Finding>& findings, const char* kind) {
  TextRows rows{{"property"}};
  for (const Finding& finding : findings) {
    if (finding.kind != kind) continue;
    auto& head = rows.front();
    if (std::count(head.begin(), head.end(), finding.name) == 0) head.push_back(finding.name);
    const auto row = std::find_if(rows.begin(), rows.end(),
                                  [&](const auto& cells) { return cells.front() == finding.property; });
    if (row == rows.end()) rows.push_back({finding.property, to_string(finding.verdict)});
    else row->push_back(to_string(finding.verdict));
  }
  return rows.size() == 1 ? "" : aligned_text(rows);
}

std::string reasons_text(const std::vector<Finding>& findings) {
  TextRows rows;
  for (const Finding& finding : findings)
    if (!finding.reason.empty()) rows.push_back({to_string(finding.verdict), finding.name, finding.property, finding.reason});
  return rows.empty() ? "" : "\n" + aligned_text(rows);
}

int64_t count_of(const std::vector<Finding>& findings, Verdict verdict) {
  return std::count_if(findings.begin(), findings.end(), [&](const Finding& finding) { return finding.verdict == verdict; });
}

std::string summary_line(const std::vector<Finding>& findings) {
  return fmt::format("\n{} passed, {} failed, {} not applicable\n", count_of(findings, Verdict::kPass),
                     count_of(findings, Verdict::kFail), count_of(findings, Verdict::kNotApplicable));
}

void run_verify(const VerifyArguments& arguments) {
  check_property_names(arguments.settings.only);
  const Wanted wanted = wanted_plugins(arguments);
  std::vector<Finding> findings;
  const auto append = [&](const std::vector<Finding>& more) { findings.insert(findings.end(), more.begin(), more.end()); };
  for (const std::string& name : wanted.routers)
    append(verify_router(Registry<RouterEntry>::instance().find(name), arguments.settings));
  for (const std::string& name : wanted.experts)
    append(verify_expert(Registry<ExpertEntry>::instance().find(name), arguments.settings));
  if (arguments.json) fmt::print("{}\n", findings_json(findings).dump(2));
  else
    fmt::print("{}{}{}{}", findings_table(findings, "router"), findings_table(findings, "expert"), reasons_text(findings),
               summary_line(findings));
  const int64_t failed = count_of(findings, Verdict::kFail);
  if (failed > 0) throw Error(ExitCode::kBug, fmt::format("verify: {} of {} results are failures", failed, findings.size()));
}

std::string properties_footer() {
  TextRows rows;
  for (const Property& property : router_properties()) rows.push_back({property.name, property.doc});
  std::string text = "Properties of routers:\n" + aligned_text(rows, 2);
  rows.clear();
  for (const ExpertProperty& property : expert_properties()) rows.push_back({property.name, property.doc});
  return text + "\nProperties of experts:\n" + aligned_text(rows, 2) + "\nExample: moelab verify switch ffn --cases 200";
}

}  // namespace

void add_verify_command(CLI::App& app) {
  const auto arguments = std::make_shared<VerifyArguments>();
  CLI::App* verb = app.add_subcommand("verify", "check that routers and experts hold what every one has to");
  verb->add_option("NAME", arguments->names, "routers or experts, or shared libraries (.so) with some of your own");
  verb->add_flag("--all", arguments->all, "every registered router");
  verb->add_flag("--experts", arguments->experts, "every registered kind of expert");
  verb->add_option("--property", arguments->settings.only, "only this property; may be repeated")->take_all();
  verb->add_flag("--defaults", arguments->settings.defaults_only, "options at their defaults alone");
  verb->add_option("--cases", arguments->settings.cases, "random cases of the properties that compare executors")
      ->check(CLI::Range(int64_t{1}, int64_t{1'000'000}));
  verb->add_option("--seed", arguments->settings.seed, "of the random cases");
  verb->add_flag("--json", arguments->json, "print one JSON document");
  verb->footer(properties_footer());
  verb->callback([arguments] { run_verify(*arguments); });
}

}  // namespace moelab
