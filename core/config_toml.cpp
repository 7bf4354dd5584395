// TOML text to ConfigNode. The only file that knows toml++, whose nodes forget their places when copied.
#include "core/config_node.h"

#include <toml++/toml.h>

#include <algorithm>

namespace moelab {
namespace {

constexpr int kMaxConfigDepth = 64;  // of brackets, of dots in one key, and of the tree
constexpr const char* kConfigTooDeep = "nested more than 64 deep";
constexpr const char* kConfigNotAscii = "only quotes and comments may hold letters outside ASCII";

struct TomlFlaw {
  size_t at;         // offset in the text
  const char* what;  // nullptr: there is none
};

// Stops what toml++ 3.3 does not survive: trees so deep that freeing them overflows the stack (it bounds brackets, but not
// dotted keys), and letters outside ASCII where a key or value is expected (its tables take them for unreachable). The walk
// only has to agree with TOML up to the first syntax error, where parsing ends anyway.
class TomlGuard {
 public:
  explicit TomlGuard(const std::string& text) : text_(text) {}

  TomlFlaw find() {
    if (text_.compare(0, 3, "\xEF\xBB\xBF") == 0) at_ = 3;  // the byte order mark
    while (at_ < text_.size()) {
      if (text_[at_] == '"' || text_[at_] == '\'') at_ = after_string(text_[at_]);
      else if (text_[at_] == '#') at_ = std::min(text_.find('\n', at_), text_.size());
      else if (static_cast<unsigned char>(text_[at_]) >= 0x80) return {at_, kConfigNotAscii};
      else if (too_deep(text_[at_++])) return {at_ - 1, kConfigTooDeep};
    }
    return {at_, nullptr};
  }

 private:
  bool too_deep(char c) {
    if (c == '[' || c == '{') ++brackets_;
    if (c == ']' || c == '}') --brackets_;
    if (c == '.') ++dots_;
    if (std::string_view("=[]{},\n").find(c) != std::string_view::npos) dots_ = 0;
    return dots_ >= kMaxConfigDepth || brackets_ > kMaxConfigDepth;
  }

  size_t after_string(char quote) const {
    const bool triple = text_.compare(at_, 3, std::string(3, quote)) == 0;
    const std::string closing(triple ? 3 : 1, quote);
    size_t end = at_ + closing.size();
    while (end < text_.size() && text_.compare(end, closing.size(), closing) != 0) {
      if (text_[end] == '\n' && !triple) return end;  // unterminated
      end += text_[end] == '\\' && quote == '"' ? 2 : 1;
    }
    end += closing.size();
    while (triple && end < text_.size() && text_[end] == quote) ++end;  // """a"""" ends in a quote of its own
    return end;
  }

  const std::string& text_;
  size_t at_ = 0;
  int brackets_ = 0, dots_ = 0;
};

ConfigPlace toml_place(const std::string& text, const std::string& name, size_t at) {
  const size_t last_break = text.rfind('\n', at);  // npos + 1 == 0
  const auto line = static_cast<uint32_t>(std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(at), '\n') + 1);
  return {name, line, static_cast<uint32_t>(at - (last_break + 1) + 1)};
}

// Builds our nodes from those of toml++.
class TomlConverter {
 public:
  TomlConverter(const std::string& name, bool numbered) : name_(name), numbered_(numbered) {}

  ConfigNodePtr convert(const toml::node& node, const ConfigPlace& place, int depth = 0) const {
    if (depth > kMaxConfigDepth) config_fail(place, kConfigTooDeep);
    ConfigNode made{place, {}};
    if (const auto* table = node.as_table()) made.value = convert_table(*table, depth);
    else if (const auto* array = node.as_array()) made.value = convert_array(*array, depth);
    else if (const auto* flag = node.as_boolean()) made.value = flag->get();
    else if (const auto* integer = node.as_integer()) made.value = integer->get();
    else if (const auto* real = node.as_floating_point()) made.value = real->get();
    else if (const auto* text = node.as_string()) made.value = text->get();
    else config_fail(place, "a date or a time is no value here; a string has quotes");
    return std::make_shared<ConfigNode>(std::move(made));
  }

  ConfigPlace place(const toml::source_region& source) const {
    return numbered_ ? ConfigPlace{name_, source.begin.line, source.begin.column} : ConfigPlace{name_};
  }

 private:
  ConfigMap convert_table(const toml::table& table, int depth) const {
    ConfigMap made;
    for (const auto& [key, node] : table)
      made[std::string(key.str())] =
          convert(node, place(node.is_table() || node.is_array_of_tables() ? node.source() : key.source()), depth + 1);
    return made;
  }

  ConfigList convert_array(const toml::array& array, int depth) const {
    ConfigList made;
    for (const toml::node& element : array) made.push_back(convert(element, place(element.source()), depth + 1));
    return made;
  }

  std::string name_;
  bool numbered_;
};

// "Error while parsing key-value pair: cannot redefine ..." -> "cannot redefine ...".
std::string toml_message(std::string text) {
  if (text.rfind("Error while parsing ", 0) == 0) text.erase(0, text.find(": ") + 2);
  if (text.rfind("Encountered", 0) == 0) text[0] = 'e';
  return text;
}

}  // namespace

ConfigNodePtr parse_toml(const std::string& text, const std::string& name, bool numbered) {
  if (text.size() > kMaxConfigBytes) config_fail({name}, "larger than 1 MiB, the limit of an experiment file");
  const TomlFlaw flaw = TomlGuard(text).find();
  if (flaw.what) config_fail(numbered ? toml_place(text, name, flaw.at) : ConfigPlace{name}, flaw.what);
  const TomlConverter converter(name, numbered);
  try {
    const toml::table root = toml::parse(std::string_view(text));
    return converter.convert(root, converter.place(root.source()));
  } catch (const toml::parse_error& error) {
    config_fail(converter.place(error.source()), toml_message(error.what()));
  }
}

bool is_toml_line(const std::string& text) {
  if (text.find('\n') != std::string::npos) return false;
  try {
    static_cast<void>(toml::parse(std::string_view("#" + text)));
  } catch (const toml::parse_error&) {
    return false;
  }
  return true;
}

}  // namespace moelab
