#include "core/params.h"

#include "core/error.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

template <class... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};
template <class... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;

std::string range_text(const OptionSpec& spec) {
  const bool low = std::isfinite(spec.min), high = std::isfinite(spec.max);
  if (low && spec.max_excluded) return fmt::format("at least {} and less than {}", spec.min, spec.max);
  if (low && high) return fmt::format("between {} and {}", spec.min, spec.max);
  if (!low && !high) return "a number";
  return low ? fmt::format("at least {}", spec.min) : fmt::format("at most {}", spec.max);
}

void check_range(const OptionSpec& spec, double value) {
  if (std::isnan(value) || value < spec.min || value > spec.max || (spec.max_excluded && value == spec.max))
    usage_error(fmt::format("'{}' is {}, but must be {}", spec.name, value, range_text(spec)));
  if (std::isinf(value)) usage_error(fmt::format("'{}' is {}, but must be finite", spec.name, value));
}

void check_choice(const OptionSpec& spec, const std::string& value) {
  if (spec.choices.empty() || std::count(spec.choices.begin(), spec.choices.end(), value)) return;
  usage_error(fmt::format("'{}' is \"{}\", but must be one of {}{}", spec.name, value, fmt::join(spec.choices, ", "),
                          did_you_mean(value, spec.choices)));
}

// The shortest digits that read back to the same number; TOML tells reals from integers by a point or an exponent.
std::string real_text(double value) {
  const std::string digits = fmt::format("{}", value);
  return digits.find_first_not_of("-0123456789") == std::string::npos ? digits + ".0" : digits;
}

std::string escaped_letter(unsigned char c) {
  if (c == '"' || c == '\\') return {'\\', static_cast<char>(c)};
  if (c == '\n') return "\\n";
  if (c == '\t') return "\\t";
  return c < 0x20 || c == 0x7f ? fmt::format("\\u{:04X}", c) : std::string(1, static_cast<char>(c));
}

std::string quoted_text(const std::string& value) {
  std::string text = "\"";
  for (const char c : value) text += escaped_letter(static_cast<unsigned char>(c));
  return text + "\"";
}

// A real option accepts an integer literal; nothing else is converted.
OptionValue widened(const OptionSpec& spec, OptionValue value) {
  if (std::holds_alternative<double>(spec.default_value) && std::holds_alternative<int64_t>(value))
    return static_cast<double>(std::get<int64_t>(value));
  return value;
}

// As a reader's words have it: strings without quotes.
std::string bare_word(const OptionValue& value) {
  const auto* text = std::get_if<std::string>(&value);
  return text ? *text : to_text(value);
}

bool reads(const OptionSpec::Reader& reader, const Options& options) {
  if (!options.declared(reader.option)) return true;  // a table that has no such choice
  const std::string word = bare_word(options.all().at(reader.option));
  const bool among = std::count(reader.words.begin(), reader.words.end(), word) > 0;
  return among != reader.except;
}

std::string reader_text(const OptionSpec::Reader& reader) {
  return fmt::format("{} {} = {}", reader.except ? "unless" : "with", reader.option, fmt::join(reader.words, " or "));
}

}  // namespace

OptionSpec OptionSpec::at_least(double low) const {
  OptionSpec spec = *this;
  spec.min = low;
  return spec;
}

OptionSpec OptionSpec::between(double low, double high) const {
  OptionSpec spec = at_least(low);
  spec.max = high;
  return spec;
}

OptionSpec OptionSpec::below(double high) const {
  OptionSpec spec = *this;
  spec.max = high;
  spec.max_excluded = true;
  return spec;
}

OptionSpec OptionSpec::one_of(std::vector<std::string> words) const {
  OptionSpec spec = *this;
  spec.choices = std::move(words);
  return spec;
}

OptionSpec OptionSpec::as_path() const {
  OptionSpec spec = *this;
  spec.paths = Paths::kOne;
  return spec;
}

OptionSpec OptionSpec::as_paths() const {
  OptionSpec spec = *this;
  spec.paths = Paths::kList;
  return spec;
}

OptionSpec OptionSpec::in_steps() const {
  OptionSpec spec = *this;
  spec.steps = true;
  return spec;
}

OptionSpec OptionSpec::as_rows_of(const std::string& tensor) const {
  OptionSpec spec = *this;
  spec.rows_of = tensor;
  return spec;
}

OptionSpec OptionSpec::read_when(const std::string& option, std::vector<std::string> words) const {
  OptionSpec spec = *this;
  spec.readers.push_back({option, std::move(words)});
  return spec;
}

OptionSpec OptionSpec::read_unless(const std::string& option, const std::string& word) const {
  OptionSpec spec = *this;
  spec.readers.push_back({option, {word}, /*except=*/true});
  return spec;
}

std::map<std::string, OptionValue> stages_within(const OptionSpecs& specs, int64_t steps) {
  int64_t longest = 0;
  for (const OptionSpec& spec : specs)
    if (spec.steps) longest = std::max(longest, std::get<int64_t>(spec.default_value));
  std::map<std::string, OptionValue> values;
  for (const OptionSpec& spec : specs) {
    if (!spec.steps) continue;
    const int64_t usual = std::get<int64_t>(spec.default_value);
    values[spec.name] = longest == 0 ? steps : (usual * steps + longest - 1) / longest;  // all of them 0: a stage that is off
  }
  return values;
}

OptionSpec option(const std::string& name, bool default_value, const std::string& doc) { return {name, default_value, doc}; }
OptionSpec option(const std::string& name, int default_value, const std::string& doc) {
  return {name, int64_t{default_value}, doc};
}
OptionSpec option(const std::string& name, double default_value, const std::string& doc) { return {name, default_value, doc}; }
OptionSpec option(const std::string& name, const char* default_value, const std::string& doc) {
  return {name, std::string(default_value), doc};
}
OptionSpec option(const std::string& name, std::vector<int64_t> default_value, const std::string& doc) {
  return {name, std::move(default_value), doc};
}

std::string type_name(const OptionValue& value) {
  static const char* const names[] = {"bool", "integer", "real", "string", "list of integers"};
  return names[value.index()];
}

std::string with_article(const std::string& noun) {
  return (std::string("aeiou").find(noun[0]) == std::string::npos ? "a " : "an ") + noun;
}

std::string to_text(const OptionValue& value) {
  return std::visit(Overloaded{[](bool v) { return std::string(v ? "true" : "false"); },
                               [](int64_t v) { return fmt::format("{}", v); },
                               [](double v) { return real_text(v); },
                               [](const std::string& v) { return quoted_text(v); },
                               [](const std::vector<int64_t>& v) { return fmt::format("[{}]", fmt::join(v, ", ")); }},
                    value);
}

Options::Options(const OptionSpecs& specs) {
  for (const OptionSpec& spec : specs) values_[spec.name] = spec.default_value;
}

void Options::set(const OptionSpec& spec, OptionValue value) {
  value = widened(spec, std::move(value));
  if (value.index() != spec.default_value.index())
    usage_error(fmt::format("'{}' is {}, but must be {}", spec.name, with_article(type_name(value)),
                            with_article(type_name(spec.default_value))));
  if (const auto* number = std::get_if<int64_t>(&value)) check_range(spec, static_cast<double>(*number));
  if (const auto* number = std::get_if<double>(&value)) check_range(spec, *number);
  if (const auto* word = std::get_if<std::string>(&value)) check_choice(spec, *word);
  values_[spec.name] = std::move(value);
  set_[spec.name] = true;
}

const OptionValue& Options::at(const std::string& name) const {
  const auto found = values_.find(name);
  check_invariant(found != values_.end(), "option '" + name + "' was never declared");
  return found->second;
}

bool Options::flag(const std::string& name) const { return std::get<bool>(at(name)); }
int64_t Options::integer(const std::string& name) const { return std::get<int64_t>(at(name)); }
double Options::real(const std::string& name) const { return std::get<double>(at(name)); }
const std::string& Options::text(const std::string& name) const { return std::get<std::string>(at(name)); }
const std::vector<int64_t>& Options::integers(const std::string& name) const {
  return std::get<std::vector<int64_t>>(at(name));
}

std::string readers_text(const OptionSpec& spec) {
  std::string text;
  for (const OptionSpec::Reader& reader : spec.readers) text += (text.empty() ? "" : ", or ") + reader_text(reader);
  return text;
}

std::string unread_reason(const OptionSpec& spec, const Options& options) {
  if (spec.readers.empty() || !options.was_set(spec.name) || options.all().at(spec.name) == spec.default_value) return "";
  std::string as_it_is;
  for (const OptionSpec::Reader& reader : spec.readers) {
    if (reads(reader, options)) return "";
    as_it_is += fmt::format("{}{} = {}", as_it_is.empty() ? "" : " and ", reader.option,
                            to_text(options.all().at(reader.option)));
  }
  return fmt::format("'{}' is not read with {}; it is read {}", spec.name, as_it_is, readers_text(spec));
}

}  // namespace moelab
