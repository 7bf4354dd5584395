// `moelab verify`: the conformance kit on registered routers, and on those of a plugin.
#include "experiments/cli.h"

#include "core/error.h"
#include "experiments/plugins.h"
#include "experiments/text_table.h"
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
  bool json = false;
  VerifySettings settings;
};

std::vector<std::string> registered_routers() {
  std::vector<std::string> names;
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all()) names.push_back(entry.name);
  return names;
}

// The routers that a shared library brings.
std::vector<std::string> routers_of_plugin(const std::string& path) {
  const std::vector<std::string> before = registered_routers();
  load_plugin(path);
  std::vector<std::string> names = registered_routers();
  std::erase_if(names, [&](const std::string& name) { return std::count(before.begin(), before.end(), name) > 0; });
  if (names.empty()) usage_error(fmt::format("verify: plugin '{}' registers no router", path));
  return names;
}

std::vector<std::string> wanted_routers(const VerifyArguments& arguments) {
  if (arguments.all != arguments.names.empty()) usage_error("verify: name routers, or say --all");
  if (arguments.all) return registered_routers();
  std::vector<std::string> names;
  for (const std::string& word : arguments.names) {
    const std::vector<std::string> more = word.ends_with(".so") ? routers_of_plugin(word) : std::vector{word};
    names.insert(names.end(), more.begin(), more.end());
  }
  for (const std::string& name : names) Registry<RouterEntry>::instance().find(name);  // before an hour of work, not after it
  return names;
}

void check_property_names(const std::vector<std::string>& wanted) {
  std::vector<std::string> known;
  for (const Property& property : router_properties()) known.push_back(property.name);
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

// One row per property, one column per router.
std::string findings_table(const std::vector<Finding>& findings) {
  TextRows rows{{"property"}};
  for (const Finding& finding : findings) {
    auto& head = rows.front();
    if (std::count(head.begin(), head.end(), finding.name) == 0) head.push_back(finding.name);
    const auto row = std::find_if(rows.begin(), rows.end(),
                                  [&](const auto& cells) { return cells.front() == finding.property; });
    if (row == rows.end()) rows.push_back({finding.property, to_string(finding.verdict)});
    else row->push_back(to_string(finding.verdict));
  }
  return aligned_text(rows);
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
  std::vector<Finding> findings;
  for (const std::string& name : wanted_routers(arguments))
    for (Finding& finding : verify_router(Registry<RouterEntry>::instance().find(name), arguments.settings))
      findings.push_back(std::move(finding));
  if (arguments.json) fmt::print("{}\n", findings_json(findings).dump(2));
  else fmt::print("{}{}{}", findings_table(findings), reasons_text(findings), summary_line(findings));
  const int64_t failed = count_of(findings, Verdict::kFail);
  if (failed > 0) throw Error(ExitCode::kBug, fmt::format("verify: {} of {} results are failures", failed, findings.size()));
}

std::string properties_footer() {
  TextRows rows;
  for (const Property& property : router_properties()) rows.push_back({property.name, property.doc});
  return "Properties:\n" + aligned_text(rows, 2) + "\nExample: moelab verify switch gshard --cases 200";
}

}  // namespace

void add_verify_command(CLI::App& app) {
  const auto arguments = std::make_shared<VerifyArguments>();
  CLI::App* verb = app.add_subcommand("verify", "check that routers hold what every router has to");
  verb->add_option("NAME", arguments->names, "routers, or shared libraries (.so) with routers of your own");
  verb->add_flag("--all", arguments->all, "every registered router");
  verb->add_option("--property", arguments->settings.only, "only this property; may be repeated")->take_all();
  verb->add_flag("--defaults", arguments->settings.defaults_only, "options at their defaults alone");
  verb->add_option("--cases", arguments->settings.cases, "random cases of the property `executors`")
      ->check(CLI::PositiveNumber);
  verb->add_option("--seed", arguments->settings.seed, "of the random cases");
  verb->add_flag("--json", arguments->json, "print one JSON document");
  verb->footer(properties_footer());
  verb->callback([arguments] { run_verify(*arguments); });
}

}  // namespace moelab
