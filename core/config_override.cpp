// --set a.b=v: one value on top of the tree.
#include "core/config_node.h"

#include "core/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>

namespace moelab {
namespace {

constexpr size_t kMaxOverrideDepth = 64;

[[noreturn]] void override_malformed(const std::string& text, const std::string& what) {
  config_fail({"--set " + text}, what + "; write --set table.key=value");
}

bool is_override_key(const std::string& key) {
  const auto bare = [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-'; };
  return !key.empty() && std::all_of(key.begin(), key.end(), bare);
}

bool is_override_index(const std::string& key) {
  return std::all_of(key.begin(), key.end(), [](unsigned char c) { return std::isdigit(c); });
}

// "layer.0.where" -> {"layer", "0", "where"}.
std::vector<std::string> override_keys(const std::string& path, const std::string& text) {
  std::vector<std::string> keys(1);
  for (const char c : path) {
    if (c == '.') keys.emplace_back();
    else keys.back() += c;
  }
  for (const std::string& key : keys)
    if (!is_override_key(key)) override_malformed(text, fmt::format("'{}' is no name of a value", path));
  if (keys.size() > kMaxOverrideDepth) override_malformed(text, "the name has too many parts");
  return keys;
}

// As TOML writes it. What TOML cannot read and does not begin like a quoted or bracketed value is a string.
ConfigNodePtr override_value(const std::string& written, const std::string& text) {
  const ConfigPlace place{"--set " + text};
  const size_t first = written.find_first_not_of(" \t"), last = written.find_last_not_of(" \t");
  if (first == std::string::npos) override_malformed(text, "there is no value (the empty string is \"\")");
  const bool bare_word = std::string("\"'[{").find(written[first]) == std::string::npos;
  try {
    return parse_toml("v = " + written, place.file, false)->map()->at("v");
  } catch (const Error&) {
    if (!bare_word) throw;
    return std::make_shared<ConfigNode>(ConfigNode{place, written.substr(first, last - first + 1)});
  }
}

// Lays `value` on the place that keys[depth...] name below `node`; tables on the way are made where they are missing.
class ConfigOverrider {
 public:
  ConfigOverrider(std::vector<std::string> keys, ConfigNodePtr value) : keys_(std::move(keys)), value_(std::move(value)) {}

  ConfigNodePtr lay(const ConfigNodePtr& node, size_t depth = 0) const {
    if (depth == keys_.size()) return config_overlay(node, value_);
    if (node && node->list()) return lay_element(*node, depth);
    if (node && !node->map()) fail(depth, "is " + config_kind(*node) + ", so nothing can be set in it");
    if (!node && is_override_index(keys_[depth])) fail(depth, "is not there, so it has no element " + keys_[depth]);
    ConfigNode changed = node ? *node : ConfigNode{value_->place, ConfigMap{}};
    if (depth > 0 && depth + 1 == keys_.size()) config_supersede(std::get<ConfigMap>(changed.value), keys_[depth], *value_);
    ConfigNodePtr& child = std::get<ConfigMap>(changed.value)[keys_[depth]];
    child = lay(child, depth + 1);
    return std::make_shared<ConfigNode>(std::move(changed));
  }

 private:
  ConfigNodePtr lay_element(const ConfigNode& node, size_t depth) const {
    const std::string& key = keys_[depth];
    const size_t size = node.list()->size();
    size_t index = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), index);
    if (error != std::errc() || end != key.data() + key.size() || index >= size)
      fail(depth, fmt::format("has {} element{}, counted from 0, and no '{}'", size, size == 1 ? "" : "s", key));
    ConfigNode changed = node;
    ConfigNodePtr& element = std::get<ConfigList>(changed.value)[index];
    element = lay(element, depth + 1);
    return std::make_shared<ConfigNode>(std::move(changed));
  }

  [[noreturn]] void fail(size_t depth, const std::string& message) const {
    std::string path;
    for (size_t i = 0; i < depth; ++i) path = config_path(path, keys_[i]);
    config_fail(value_->place, fmt::format("'{}' {}", path, message));
  }

  std::vector<std::string> keys_;
  ConfigNodePtr value_;
};

}  // namespace

ConfigNodePtr config_override(const ConfigNodePtr& root, const std::string& text) {
  const size_t equals = text.find('=');
  if (!is_toml_line(text)) override_malformed(text, "not one line of UTF-8 text");
  if (equals == std::string::npos) override_malformed(text, "there is no '='");
  std::vector<std::string> keys = override_keys(text.substr(0, equals), text);
  return ConfigOverrider(std::move(keys), override_value(text.substr(equals + 1), text)).lay(root);
}

}  // namespace moelab
