// The resolved tree, written back as TOML with the place of every value.
#include "core/config_node.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

namespace moelab {
namespace {

std::string toml_key(const std::string& key) {
  const auto bare = [](unsigned char c) { return (c < 0x80 && std::isalnum(c)) || c == '_' || c == '-'; };
  return !key.empty() && std::all_of(key.begin(), key.end(), bare) ? key : to_text(OptionValue(key));
}

std::string toml_value(const ConfigNode& node);

std::string toml_inline(const ConfigList& list) {
  std::string text;
  for (const ConfigNodePtr& element : list) text += (text.empty() ? "" : ", ") + toml_value(*element);
  return "[" + text + "]";
}

std::string toml_inline(const ConfigMap& map) {
  std::string text;
  for (const auto& [key, node] : map)
    text += fmt::format("{}{} = {}", text.empty() ? " " : ", ", toml_key(key), toml_value(*node));
  return "{" + text + " }";
}

std::string toml_value(const ConfigNode& node) {
  if (const auto* flag = std::get_if<bool>(&node.value)) return to_text(OptionValue(*flag));
  if (const auto* integer = std::get_if<int64_t>(&node.value)) return to_text(OptionValue(*integer));
  if (const auto* real = std::get_if<double>(&node.value)) return to_text(OptionValue(*real));
  if (const auto* text = std::get_if<std::string>(&node.value))
    return to_text(OptionValue(node.whole_paths.empty() ? *text : node.whole_paths));
  return node.list() ? toml_inline(*node.list()) : toml_inline(*node.map());
}

// A file name may hold bytes that a TOML comment may not.
std::string toml_comment(std::string text) {
  if (!is_toml_line(text))
    std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c > 0x7e; }, '?');
  return text;
}

bool has_header(const ConfigNode& node) { return node.map() || (node.is_array_of_tables() && !node.list()->empty()); }

// A table's own values come first: below a header, a key belongs to that header.
std::string toml_table(const ConfigMap& map, const std::string& path) {
  std::string text;
  for (const auto& [key, node] : map)
    if (!has_header(*node) && !node->ignored)
      text += fmt::format("{} = {}  # from {}\n", toml_key(key), toml_value(*node), toml_comment(node->place.file_line()));
  for (const auto& [key, node] : map) {
    if (!has_header(*node)) continue;
    const std::string name = config_path(path, toml_key(key));
    if (node->map()) text += fmt::format("\n[{}]\n{}", name, toml_table(*node->map(), name));
    else for (const ConfigNodePtr& element : *node->list())
      text += fmt::format("\n[[{}]]\n{}", name, toml_table(*element->map(), name));
  }
  return text;
}

}  // namespace

std::string resolved_text(const Table& root) {
  return root.present() ? toml_table(*root.node_->tree->map(), "") : "";
}

}  // namespace moelab
