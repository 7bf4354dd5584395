// The tree behind core/config.h: values that remember their place. Private to the config_*.cpp files.
#pragma once

#include "core/config.h"

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <variant>
#include <vector>

namespace moelab {

// Where something was written. An override ("--set k=2") is a file without lines.
struct ConfigPlace {
  std::string file;
  uint32_t line = 0;
  uint32_t column = 0;

  std::string text() const;       // "file:line:col"
  std::string file_line() const;  // "file:line"
};

[[noreturn]] void config_fail(const ConfigPlace& place, const std::string& message);       // exit 2, always one line
[[noreturn]] void config_data_fail(const std::string& where, const std::string& message);  // exit 5, the same

struct ConfigNode;
using ConfigNodePtr = std::shared_ptr<const ConfigNode>;  // trees share what they do not change
using ConfigList = std::vector<ConfigNodePtr>;
using ConfigMap = std::map<std::string, ConfigNodePtr>;

struct ConfigNode {
  ConfigPlace place;  // of the key for a value, of the header for a table
  std::variant<bool, int64_t, double, std::string, ConfigList, ConfigMap> value;
  std::set<std::string> older_than = {};  // keys of its table that were given another value after it was written: it may have
                                          // been the old plugin's option, or read with the old value alone
  mutable bool ignored = false;           // and it was: no part of the resolved config
  mutable std::string whole_paths = {};  // what a reader made of relative paths; the resolved config says it instead

  const ConfigMap* map() const { return std::get_if<ConfigMap>(&value); }
  const ConfigList* list() const { return std::get_if<ConfigList>(&value); }
  bool is_array_of_tables() const;  // the empty array counts
};

// What a Table points to. An absent table has no tree, and the place of the nearest table around it.
struct Table::Node {
  std::string path;
  ConfigNodePtr tree;
  ConfigPlace place;
  bool lenient = false;  // values that nobody reads are told, not refused
};

std::string config_kind(const ConfigNode& node);                            // "a table", "an integer"
std::string config_path(const std::string& table, const std::string& key);  // "moe" "router" -> "moe.router"

// `over` on top of `base`: tables are merged, anything else is replaced whole. Where a key of a table below the root gets
// another value, the base's own values there become older than it: those that nobody reads now are dropped when read.
ConfigNodePtr config_overlay(const ConfigNodePtr& base, const ConfigNodePtr& over, bool root = true);

// Marks the values of a table whose `key` is about to become `value`.
void config_supersede(ConfigMap& table, const std::string& key, const ConfigNode& value);

// The root table of a TOML text. With `numbered` false the places have no lines.
ConfigNodePtr parse_toml(const std::string& text, const std::string& name, bool numbered = true);
bool is_toml_line(const std::string& text);  // valid UTF-8 without control characters

// `text`, the argument of one --set, laid on top of `root`.
ConfigNodePtr config_override(const ConfigNodePtr& root, const std::string& text);

constexpr size_t kMaxConfigBytes = size_t{1} << 20;

}  // namespace moelab
