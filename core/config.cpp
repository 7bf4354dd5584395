#include "core/config.h"

#include "core/config_node.h"
#include "core/error.h"

#include <CLI/StringTools.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cctype>
#include <filesystem>

namespace moelab {
namespace {

std::string config_table_name(const std::string& path) {
  return path.empty() ? "at the top of the file" : "in [" + path + "]";
}

void check_known_key(const Table::Node& table, const std::string& key, const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), key) != known.end()) return;
  const ConfigNode& node = *table.tree->map()->at(key);
  if (node.older_than.contains("name")) {
    if (!node.ignored)
      spdlog::info("{}: '{}' was an option of another plugin than [{}] now names; it is dropped", node.place.text(), key,
                   table.path);
    node.ignored = true;
    return;
  }
  std::string hint = did_you_mean(key, known);
  if (hint.empty()) hint = known.empty() ? ", which takes no keys" : fmt::format(", known are {}", fmt::join(known, ", "));
  config_fail(table.tree->map()->at(key)->place,
              fmt::format("unknown key '{}' {}{}", key, config_table_name(table.path), hint));
}

std::vector<int64_t> config_integers(const std::string& name, const ConfigList& list) {
  std::vector<int64_t> integers;
  for (const ConfigNodePtr& element : list) {
    const auto* integer = std::get_if<int64_t>(&element->value);
    if (!integer)
      config_fail(element->place, fmt::format("'{}' holds {}, but must be a list of integers", name, config_kind(*element)));
    integers.push_back(*integer);
  }
  return integers;
}

OptionValue config_option_value(const OptionSpec& spec, const ConfigNode& node) {
  if (const auto* flag = std::get_if<bool>(&node.value)) return *flag;
  if (const auto* integer = std::get_if<int64_t>(&node.value)) return *integer;
  if (const auto* real = std::get_if<double>(&node.value)) return *real;
  if (const auto* text = std::get_if<std::string>(&node.value)) return *text;
  const bool wants_list = std::holds_alternative<std::vector<int64_t>>(spec.default_value);
  if (node.list() && wants_list) return config_integers(spec.name, *node.list());
  config_fail(node.place, fmt::format("'{}' is {}, but must be {}", spec.name, config_kind(node),
                                      with_article(type_name(spec.default_value))));
}

// The resolved config lies in another folder, so it needs whole paths. What is nowhere is missed beside the file that says it.
std::string whole_path(const std::string& written, const ConfigPlace& place) {
  namespace fs = std::filesystem;
  const fs::path beside = fs::path(place.file).parent_path() / written;
  const bool from_file = place.line > 0 && (fs::exists(beside) || !fs::exists(written));
  return fs::absolute(from_file ? beside : fs::path(written)).lexically_normal().string();
}

std::string whole_paths(const OptionSpec& spec, const std::string& written, const ConfigPlace& place) {
  if (spec.paths == OptionSpec::Paths::kOne) return written.empty() ? written : whole_path(written, place);
  std::string whole;
  for (const std::string& word : CLI::detail::split(written, ',')) {
    const std::string path = CLI::detail::trim_copy(word);
    if (!path.empty()) whole += (whole.empty() ? "" : ", ") + whole_path(path, place);
  }
  return whole;
}

void set_config_option(Options& options, const OptionSpec& spec, const ConfigNode& node) {
  OptionValue value = config_option_value(spec, node);
  if (spec.paths != OptionSpec::Paths::kNone && std::holds_alternative<std::string>(value))
    value = node.whole_paths = whole_paths(spec, std::get<std::string>(value), node.place);
  try {
    options.set(spec, std::move(value));
  } catch (const Error& error) {
    config_fail(node.place, error.what());
  }
}

ConfigNodePtr find_config_key(const Table::Node& table, const std::string& key) {
  if (!table.tree) return nullptr;
  const auto found = table.tree->map()->find(key);
  return found == table.tree->map()->end() ? nullptr : found->second;
}

Table make_config_table(const std::string& path, const ConfigNodePtr& tree, const ConfigPlace& place, bool lenient) {
  return Table(std::make_shared<Table::Node>(Table::Node{path, tree, place, lenient}));
}

std::vector<std::string> quoted_words(const std::string& text) {
  std::vector<std::string> words;
  for (size_t open = text.find('`'); open != std::string::npos;) {
    const size_t close = text.find('`', open + 1);
    if (close == std::string::npos) break;
    words.push_back(text.substr(open + 1, close - open - 1));
    open = text.find('`', close + 1);
  }
  return words;
}

std::vector<std::string> bare_words(const std::string& text) {
  std::vector<std::string> words(1);
  for (const char c : text) {
    if (std::isalnum(static_cast<unsigned char>(c)) || c == '_') words.back() += c;
    else if (!words.back().empty()) words.emplace_back();
  }
  return words;
}

}  // namespace

Table::Table() : node_(std::make_shared<Node>()) {}
Table::Table(std::shared_ptr<const Node> node) : node_(std::move(node)) {}

bool Table::present() const { return node_->tree != nullptr; }
std::string Table::place() const { return present() ? node_->place.text() : ""; }
std::string Table::path() const { return node_->path; }
bool Table::has(const std::string& key) const { return find_config_key(*node_, key) != nullptr; }

std::vector<std::string> Table::keys() const {
  std::vector<std::string> names;
  if (present())
    for (const auto& entry : *node_->tree->map()) names.push_back(entry.first);
  return names;
}

Table Table::child(const std::string& key) const {
  const std::string path = config_path(node_->path, key);
  const ConfigNodePtr found = find_config_key(*node_, key);
  if (!found) return make_config_table(path, nullptr, node_->place, node_->lenient);
  if (!found->map()) fail(key, fmt::format("'{}' is {}, but must be a table [{}]", key, config_kind(*found), path));
  return make_config_table(path, found, found->place, node_->lenient);
}

std::vector<Table> Table::array(const std::string& key) const {
  const std::string path = config_path(node_->path, key);
  const ConfigNodePtr found = find_config_key(*node_, key);
  std::vector<Table> tables;
  if (!found) return tables;
  if (!found->is_array_of_tables())
    fail(key, fmt::format("'{}' is {}, but must be an array of tables [[{}]]", key, config_kind(*found), path));
  for (const ConfigNodePtr& element : *found->list())
    tables.push_back(
        make_config_table(config_path(path, std::to_string(tables.size())), element, element->place, node_->lenient));
  return tables;
}

Options Table::options(const OptionSpecs& specs, const std::vector<std::string>& subtables) const {
  std::vector<std::string> known = subtables;
  for (const OptionSpec& spec : specs) known.push_back(spec.name);
  std::sort(known.begin(), known.end());
  for (const std::string& key : keys()) check_known_key(*node_, key, known);

  Options options(specs);
  for (const OptionSpec& spec : specs)
    if (const ConfigNodePtr found = find_config_key(*node_, spec.name)) set_config_option(options, spec, *found);
  for (const OptionSpec& spec : specs)
    if (const std::string reason = unread_reason(spec, options); !reason.empty()) refuse_unread(spec, reason);
  return options;
}

void Table::refuse_unread(const OptionSpec& spec, const std::string& reason) const {
  const ConfigNodePtr found = find_config_key(*node_, spec.name);
  const auto later = [&](const OptionSpec::Reader& reader) { return found && found->older_than.contains(reader.option); };
  const bool told = node_->lenient && found;
  if (!told && std::none_of(spec.readers.begin(), spec.readers.end(), later)) fail(spec.name, reason);
  if (!found->ignored) spdlog::info("{}: {}; it is dropped", found->place.text(), reason);
  found->ignored = true;
}

std::string Table::place_of(const std::string& key) const {
  const ConfigNodePtr found = find_config_key(*node_, key);
  return (found ? found->place : node_->place).text();
}

void Table::fail(const std::string& key, const std::string& message) const {
  const ConfigNodePtr found = find_config_key(*node_, key);
  config_fail(found ? found->place : node_->place, message);
}

std::string place_of_complaint(const Table& table, const std::string& complaint, const std::string& fallback) {
  for (const auto& words : {quoted_words(complaint), bare_words(complaint)})
    for (const std::string& word : words)
      if (table.has(word)) return table.place_of(word);
  return table.place_of(fallback);
}

Table Table::overlaid(const Table& over) const {
  if (!over.present()) return *this;
  return make_config_table(node_->path, config_overlay(node_->tree, over.node_->tree), over.node_->place, node_->lenient);
}

}  // namespace moelab
