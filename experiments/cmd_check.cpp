// `moelab check`: everything that can be said of an experiment without training it.
#include "experiments/cli.h"

#include "core/error.h"
#include "experiments/check_report.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace moelab {
namespace {

struct CheckArguments {
  std::string path;
  std::vector<std::string> overrides;
  bool json = false;
};

void print_refusal(const Error& error) {
  const Json refusal{{"refusals", {error.what()}}};
  fmt::print("{}\n", refusal.dump(2));
}

void run_check(const CheckArguments& arguments) try {
  const Json report = check_report(load_experiment(load_config(arguments.path, arguments.overrides)));
  fmt::print("{}", arguments.json ? report.dump(2) + "\n" : check_text(report));
} catch (const Error& error) {
  if (arguments.json) print_refusal(error);
  throw;
}

}  // namespace

void add_check_command(CLI::App& app) {
  const auto arguments = std::make_shared<CheckArguments>();
  CLI::App* verb = app.add_subcommand("check", "say what an experiment would do, without training");
  verb->add_option("EXP.toml", arguments->path, "the experiment")->required();
  verb->add_option("--set", arguments->overrides, "override a value: a.b=v")->take_all();
  verb->add_flag("--json", arguments->json, "print one JSON document");
  verb->footer("Example: moelab check experiments/quickstart.toml --set moe.experts=16");
  verb->callback([arguments] { run_check(*arguments); });
}

}  // namespace moelab
