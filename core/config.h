// Experiment files: TOML with `extends`, `--set` overrides and per-layer overrides. Every value remembers where it was
// written, so each complaint reads `file:line:col: what is wrong, did you mean 'x'?` and is made before anything is created.
#pragma once

#include "core/params.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab {

// A view of one table of a resolved experiment file, or of an absent one (then every option has its default). Cheap to copy.
class Table {
 public:
  struct Node;  // core/config_node.h; private to the config_*.cpp files
  Table();
  explicit Table(std::shared_ptr<const Node> node);

  bool present() const;
  std::string place() const;  // "file:line:col" of the table, "" when absent
  std::string path() const;   // "moe.router"

  bool has(const std::string& key) const;
  std::vector<std::string> keys() const;

  // The sub-table `key`; absent gives an empty Table. A value that is no table is an error with its place.
  Table child(const std::string& key) const;

  // The elements of the array of tables `[[key]]`, none when absent.
  std::vector<Table> array(const std::string& key) const;

  // Reads every declared option. Keys that are neither declared nor in `subtables` are errors, with the nearest name. So are
  // wrong types, values out of range, unknown choices, and values that the other options leave unread (OptionSpec::readers).
  Options options(const OptionSpecs& specs, const std::vector<std::string>& subtables = {}) const;

  // The place of one key of this table, for complaints that only its reader can make ("k = 9 is more than experts = 8"). The
  // place of an absent key is that of the nearest table around it.
  std::string place_of(const std::string& key) const;
  [[noreturn]] void fail(const std::string& key, const std::string& message) const;  // exit 2: "place_of(key): message"

  // A key that nobody reads, for this reason: refused at its place. Where the option that decides it was given another value
  // later, by a file that extends or a --set, the key is dropped with a word instead.
  void refuse_unread(const OptionSpec& spec, const std::string& reason) const;

  // This table with `over` laid on top: its values replace ours, tables are merged, arrays of tables replaced whole.
  Table overlaid(const Table& over) const;

  friend std::string resolved_text(const Table& root);

 private:
  std::shared_ptr<const Node> node_;
};

// The place for a complaint of someone who knows no places: that of the first key of the table that it names, in `…` before bare
// words; else that of `fallback`.
std::string place_of_complaint(const Table& table, const std::string& complaint, const std::string& fallback);

// Reads the file, follows `extends` (relative to the file that says it; loops refused), lays `overrides` ("train.steps=10",
// "loss.0.coefficient=0.1"; values as TOML writes them, a bare word is a string) on top. Throws Error(kUsage), or
// Error(kData) for a missing file.
Table load_config(const std::string& path, const std::vector<std::string>& overrides = {});

// The same for text already in memory; `name` stands for the file in messages.
Table parse_config(const std::string& text, const std::string& name, const std::vector<std::string>& overrides = {});

// The resolved tree in TOML, sorted, one "key = value  # from file:line" for each value. Reads back to the same values.
std::string resolved_text(const Table& root);

}  // namespace moelab
