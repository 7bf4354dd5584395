// A plugin's options, declared once: the declaration is the schema of the config reader, the text of `describe`, and the
// rows of the generated tables.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace moelab {

// The alternatives are the option types: bool, integer, real, string, list of integers.
using OptionValue = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>>;

struct OptionSpec {
  std::string name;
  OptionValue default_value;  // its alternative is the option's type
  std::string doc;
  double min = -std::numeric_limits<double>::infinity();  // numbers only, inclusive
  double max = std::numeric_limits<double>::infinity();   // inclusive unless the next field says otherwise
  std::vector<std::string> choices = {};  // strings only; empty means any
  enum class Paths { kNone, kOne, kList } paths = Paths::kNone;  // strings only: files, the list separated by commas
  bool steps = false;  // integers only: counts optimiser steps, so a stage of the method begins or ends there
  std::string rows_of = {};  // integers only: the plugin's tensor that has so many rows; who gives the tensor need not say it
  bool max_excluded = false;

  // What has to hold of another option of the same table for this one to be read: its value is one of the words, or with
  // `except` none of them. Without readers it is always read; of several, one is enough.
  struct Reader {
    std::string option;
    std::vector<std::string> words;
    bool except = false;
  };
  std::vector<Reader> readers = {};

  OptionSpec at_least(double low) const;
  OptionSpec between(double low, double high) const;
  OptionSpec below(double high) const;  // itself excluded
  OptionSpec one_of(std::vector<std::string> words) const;
  OptionSpec as_path() const;   // relative to the folder of the file that says it, or else to the working folder if it is there
  OptionSpec as_paths() const;  // several of them
  OptionSpec in_steps() const;
  OptionSpec as_rows_of(const std::string& tensor) const;
  OptionSpec read_when(const std::string& option, std::vector<std::string> words) const;
  OptionSpec read_unless(const std::string& option, const std::string& word) const;
};

// option("k", 2, "experts per row").at_least(1)
OptionSpec option(const std::string& name, bool default_value, const std::string& doc);
OptionSpec option(const std::string& name, int default_value, const std::string& doc);
OptionSpec option(const std::string& name, double default_value, const std::string& doc);
OptionSpec option(const std::string& name, const char* default_value, const std::string& doc);
OptionSpec option(const std::string& name, std::vector<int64_t> default_value, const std::string& doc);

using OptionSpecs = std::vector<OptionSpec>;

// Values of the options that count steps which put every stage among the first `steps` ones, in the defaults' proportions.
std::map<std::string, OptionValue> stages_within(const OptionSpecs& specs, int64_t steps);

std::string type_name(const OptionValue& value);  // "bool", "integer", "real", "string", "list of integers"
std::string with_article(const std::string& noun);  // "a bool", "an integer"
std::string to_text(const OptionValue& value);    // as TOML would write it

// What the config said, or the default, for every declared option. Asking for an undeclared name is a bug of the caller.
class Options {
 public:
  Options() = default;
  explicit Options(const OptionSpecs& specs);  // all defaults

  // Checks type, range and choices; the message has no place, the config reader adds it. Throws Error(kUsage).
  void set(const OptionSpec& spec, OptionValue value);

  bool flag(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double real(const std::string& name) const;
  const std::string& text(const std::string& name) const;
  const std::vector<int64_t>& integers(const std::string& name) const;

  bool declared(const std::string& name) const { return values_.count(name) != 0; }
  bool was_set(const std::string& name) const { return set_.count(name) != 0; }  // by the user, not by the default
  const std::map<std::string, OptionValue>& all() const { return values_; }

 private:
  const OptionValue& at(const std::string& name) const;
  std::map<std::string, OptionValue> values_;
  std::map<std::string, bool> set_;
};

// Why nobody reads an option that is set to another value than its default, with the remedy; "" where somebody does.
std::string unread_reason(const OptionSpec& spec, const Options& options);

// "with mode = factor or token_fraction; unless cap_per_token = 0": when an option is read; "" = always.
std::string readers_text(const OptionSpec& spec);

}  // namespace moelab
