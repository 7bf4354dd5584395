#include "core/config_node.h"

#include "core/error.h"

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

// Messages quote keys and values, which may hold anything; a complaint stays one line.
std::string config_one_line(std::string text) {
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return text;
}

}  // namespace

std::string ConfigPlace::text() const { return line ? fmt::format("{}:{}:{}", file, line, column) : file; }
std::string ConfigPlace::file_line() const { return line ? fmt::format("{}:{}", file, line) : file; }

void config_fail(const ConfigPlace& place, const std::string& message) {
  usage_error(config_one_line(place.file.empty() ? message : place.text() + ": " + message));
}

void config_data_fail(const std::string& where, const std::string& message) {
  data_error(config_one_line(where + ": " + message));
}

bool ConfigNode::is_array_of_tables() const {
  return list() && std::all_of(list()->begin(), list()->end(), [](const auto& element) { return element->map(); });
}

std::string config_kind(const ConfigNode& node) {
  static const char* const kinds[] = {"a bool", "an integer", "a real", "a string", "a list", "a table"};
  return kinds[node.value.index()];
}

std::string config_path(const std::string& table, const std::string& key) { return table.empty() ? key : table + "." + key; }

void config_supersede(ConfigMap& table, const std::string& key, const ConfigNode& value) {
  const auto old = table.find(key);
  if (value.map() || value.list() || (old != table.end() && old->second->value == value.value)) return;
  for (auto& [other, node] : table) {
    if (other == key || node->map() || node->list()) continue;
    ConfigNode marked = *node;
    marked.older_than.insert(key);
    node = std::make_shared<ConfigNode>(std::move(marked));
  }
}

ConfigNodePtr config_overlay(const ConfigNodePtr& base, const ConfigNodePtr& over, bool root) {
  if (!base || !base->map() || !over->map()) return over;
  ConfigMap merged = *base->map();
  if (!root)
    for (const auto& [key, node] : *over->map()) config_supersede(merged, key, *node);
  for (const auto& [key, node] : *over->map()) merged[key] = config_overlay(merged[key], node, /*root=*/false);
  return std::make_shared<ConfigNode>(ConfigNode{over->place, std::move(merged)});
}

}  // namespace moelab
