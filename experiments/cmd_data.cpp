// `moelab data list|prepare|verify|tokenize`: the data sets, what they need, whether it is there, and what it is as tokens.
#include "experiments/cli.h"

#include "core/dataset.h"
#include "core/error.h"
#include "experiments/catalogue.h"
#include "experiments/text_table.h"
#include "experiments/tokenize.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace moelab {
namespace {

struct DataArguments {
  std::string name;  // of a data set, or of an experiment file
  std::string out;
  std::vector<std::string> overrides;
  bool json = false;
};

struct DataState {
  bool ready;
  std::string line;
};

DataState state_of(const DatasetEntry& entry) try {
  return {true, entry.verify ? entry.verify() : "needs no preparation"};
} catch (const Error& error) {
  return {false, error.what()};
}

Json data_list() {
  Json entries = find_kind("datasets").list();
  for (Json& entry : entries) {
    const DataState state = state_of(Registry<DatasetEntry>::instance().find(entry.at("name")));
    entry["ready"] = state.ready;
    entry["state"] = state.line;
  }
  return entries;
}

void run_data_list(bool json) {
  const Json entries = data_list();
  TextRows rows;
  for (const Json& entry : entries) {
    const char* ready = entry.at("ready").get<bool>() ? "ready" : "not ready";
    rows.push_back({entry.at("name"), ready, entry.at("title"), entry.at("state")});
  }
  fmt::print("{}", json ? entries.dump(2) + "\n" : aligned_text(rows));
}

void say_of_data(const DataArguments& arguments, const std::string& line) {
  const Json answer{{"name", arguments.name}, {"ready", true}, {"state", line}};
  fmt::print("{}\n", arguments.json ? answer.dump(2) : line);
}

void run_data_prepare(const DataArguments& arguments) {
  const DatasetEntry& entry = Registry<DatasetEntry>::instance().find(arguments.name);
  say_of_data(arguments, entry.prepare ? entry.prepare() : arguments.name + " needs no preparation");
}

void run_data_verify(const DataArguments& arguments) {
  const DatasetEntry& entry = Registry<DatasetEntry>::instance().find(arguments.name);
  say_of_data(arguments, entry.verify ? entry.verify() : arguments.name + " has nothing to verify");
}

void run_data_tokenize(const DataArguments& arguments) {
  const Json table = tokenize(load_config(arguments.name, arguments.overrides), arguments.out);
  fmt::print("{}", arguments.json ? table.dump(2) + "\n" : tokenize_text(table));
}

CLI::App* add_data_verb(CLI::App& data, const char* name, const char* what, DataArguments& arguments) {
  CLI::App* verb = data.add_subcommand(name, what);
  verb->add_flag("--json", arguments.json, "print one JSON document");
  return verb;
}

}  // namespace

void add_data_command(CLI::App& app) {
  const auto arguments = std::make_shared<DataArguments>();
  CLI::App* data = app.add_subcommand("data", "list, fetch, verify and tokenize data sets");
  data->require_subcommand(1);
  data->footer("Example: moelab data prepare kjv");
  CLI::App* list = add_data_verb(*data, "list", "the data sets, and whether each is ready", *arguments);
  list->footer("Example: moelab data list");
  list->callback([arguments] { run_data_list(arguments->json); });
  CLI::App* prepare = add_data_verb(*data, "prepare", "fetch and unpack into the cache", *arguments);
  prepare->add_option("NAME", arguments->name, "as `data list` prints it")->required();
  prepare->footer("Example: moelab data prepare kjv");
  prepare->callback([arguments] { run_data_prepare(*arguments); });
  CLI::App* verify = add_data_verb(*data, "verify", "check what was fetched against sizes and hashes", *arguments);
  verify->add_option("NAME", arguments->name, "as `data list` prints it")->required();
  verify->footer("Example: moelab data verify kjv");
  verify->callback([arguments] { run_data_verify(*arguments); });
  CLI::App* tokens = add_data_verb(*data, "tokenize", "write an experiment's data as token files, and print the table for them",
                                   *arguments);
  tokens->add_option("EXP.toml", arguments->name, "whose [data]")->required();
  tokens->add_option("--out", arguments->out, "the folder to write to")->required();
  tokens->add_option("--set", arguments->overrides, "override a value: a.b=v")->take_all();
  tokens->footer("Example: moelab data tokenize experiments/base/lm_text.toml --out tokens");
  tokens->callback([arguments] { run_data_tokenize(*arguments); });
}

}  // namespace moelab
