// `moelab list KIND` and `moelab describe KIND NAME`.
#include "experiments/cli.h"

#include "experiments/catalogue.h"
#include "experiments/plugins.h"
#include "experiments/text_table.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <memory>

namespace moelab {
namespace {

struct ListArguments {
  std::string kind;
  std::string name;
  std::vector<std::string> plugins;
  bool json = false;
};

std::string list_text(const Json& entries) {
  TextRows rows;
  for (const Json& entry : entries) rows.push_back({entry.at("name"), entry.at("title"), entry.at("citation")});
  return aligned_text(rows);
}

// A cell of a detail: texts as they are, numbers short, what is unknown a dash.
std::string cell_text(const Json& value) {
  if (value.is_string()) return value;
  if (value.is_null()) return "-";
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  return value.is_number_float() ? fmt::format("{:.4g}", value.get<double>()) : value.dump();
}

std::string objects_text(const Json& objects) {
  TextRows rows(1);
  for (const auto& [key, value] : objects.front().items()) rows[0].push_back(key);
  for (const Json& object : objects) {
    rows.emplace_back();
    for (const auto& [key, value] : object.items()) rows.back().push_back(cell_text(value));
  }
  return aligned_text(rows, 2);
}

std::string detail_text(const Json& value) {
  if (!value.is_array()) return "  " + cell_text(value) + "\n";
  if (value.empty()) return "  none\n";
  if (value.front().is_object()) return objects_text(value);
  std::string text;
  for (const Json& line : value) text += "  " + cell_text(line) + "\n";
  return text;
}

std::string options_text(const Json& options) {
  TextRows rows;
  for (const Json& o : options)
    rows.push_back({o.at("name"), o.at("type"), o.at("default").dump(), option_range(o), o.at("doc")});
  return rows.empty() ? "  none\n" : aligned_text(rows, 2);
}

std::string facts_text(const Kind& kind, const Json& facts) {
  if (kind.name == "routers") return detail_text(router_facts_in_words(facts));
  TextRows rows;
  for (const auto& [key, value] : facts.items()) rows.push_back({key, cell_text(value)});
  return aligned_text(rows, 2);
}

std::string heading(std::string key) {
  for (char& c : key)
    if (c == '_') c = ' ';
  return key;
}

std::string description_text(const Kind& kind, const Json& entry) {
  std::string text = fmt::format("{}: {}\n", entry.at("name").get<std::string>(), entry.at("title").get<std::string>());
  if (entry.at("citation") != "") text += fmt::format("{}\n", entry.at("citation").get<std::string>());
  text += "\nfacts\n" + facts_text(kind, entry.at("facts"));
  text += "\noptions\n" + options_text(entry.at("options"));
  for (const auto& [key, value] : entry.items()) {
    const bool told = key == "name" || key == "title" || key == "citation" || key == "facts" || key == "options";
    if (!told) text += fmt::format("\n{}\n{}", heading(key), detail_text(value));
  }
  return text;
}

std::string kinds_text() {
  TextRows rows;
  for (const Kind& kind : catalogue()) rows.push_back({kind.name, fmt::format("{} of them", kind.list().size())});
  return aligned_text(rows);
}

void run_list(const ListArguments& arguments) {
  for (const std::string& path : arguments.plugins) load_plugin(path);
  if (arguments.kind.empty()) {
    fmt::print("{}", kinds_text());
    return;
  }
  const Json entries = find_kind(arguments.kind).list();
  fmt::print("{}", arguments.json ? entries.dump(2) + "\n" : list_text(entries));
}

void run_describe(const ListArguments& arguments) {
  for (const std::string& path : arguments.plugins) load_plugin(path);
  const Kind& kind = find_kind(arguments.kind);
  const Json entry = describe(kind, arguments.name);
  fmt::print("{}", arguments.json ? entry.dump(2) + "\n" : description_text(kind, entry));
}

CLI::App* add_kind_verb(CLI::App& app, const char* name, const char* what, ListArguments& arguments) {
  CLI::App* verb = app.add_subcommand(name, what);
  verb->add_option("KIND", arguments.kind, "routers, experts, losses, objectives, datasets, models or metrics");
  verb->add_option("--plugin", arguments.plugins, "a shared library with plugins of your own, loaded first");
  verb->add_flag("--json", arguments.json, "print one JSON document");
  return verb;
}

}  // namespace

void add_list_command(CLI::App& app) {
  const auto arguments = std::make_shared<ListArguments>();
  CLI::App* list = add_kind_verb(app, "list", "list what there is of a kind", *arguments);
  list->footer("Example: moelab list routers");
  list->callback([arguments] { run_list(*arguments); });
  CLI::App* described = add_kind_verb(app, "describe", "equation, options, paper and facts of one of them", *arguments);
  described->get_option("KIND")->required();
  described->add_option("NAME", arguments->name, "as `list` prints it")->required();
  described->footer("Example: moelab describe routers switch");
  described->callback([arguments] { run_describe(*arguments); });
}

}  // namespace moelab
