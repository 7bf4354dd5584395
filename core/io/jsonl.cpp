#include "core/io/jsonl.h"

#include "core/error.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

namespace moelab {
namespace {

using nlohmann::json;

std::string non_finite_word(double number) {
  if (std::isnan(number)) return "nan";
  return number > 0 ? "inf" : "-inf";
}

void name_non_finite(json& value) {
  if (value.is_structured()) {
    for (json& element : value) name_non_finite(element);
  } else if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    value = non_finite_word(value.get<double>());
  }
}

bool is_after(const json& record, int64_t step) {
  const auto found = record.find("step");
  return found != record.end() && found->is_number_integer() && found->get<int64_t>() > step;
}

// Splits off the first line, without its end.
std::string_view take_line(std::string_view& text) {
  const size_t end = text.find('\n');
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return line;
}

}  // namespace

std::string json_text(const json& value) {
  json named = value;
  name_non_finite(named);
  return named.dump(-1, ' ', false, json::error_handler_t::replace);
}

double json_number(const json& value) {
  if (value.is_number()) return value.get<double>();
  if (value == "nan") return std::numeric_limits<double>::quiet_NaN();
  if (value == "inf") return std::numeric_limits<double>::infinity();
  if (value == "-inf") return -std::numeric_limits<double>::infinity();
  data_error(fmt::format("{} is not a number", json_text(value)));
}

JsonlWriter::JsonlWriter(const std::string& path) : file_(path, File::Mode::kAppend) {}

void JsonlWriter::append(const json& record) {
  const int64_t size_before = file_.size();
  try {
    file_.write(json_text(record) + '\n');
  } catch (const Error&) {
    // Takes a half-written record back, as far as the file allows (a device does not): the write's error is the one to tell.
    [[maybe_unused]] const int ignored = ftruncate(file_.descriptor(), size_before);
    throw;
  }
}

void truncate_after_step(const std::string& path, int64_t step) {
  std::error_code unknown;
  if (!std::filesystem::exists(path, unknown)) return;
  const std::string text = read_file(path);
  std::string kept;
  int64_t line_number = 0;
  for (std::string_view rest = text; !rest.empty();) {
    const std::string_view line = take_line(rest);
    const json record = json::parse(line, nullptr, false);
    ++line_number;
    if (!record.is_object() && rest.empty()) break;
    if (!record.is_object())
      data_error(fmt::format("'{}', line {}: not a JSON object; delete this line, then resume again", path, line_number));
    if (!is_after(record, step)) kept.append(line).push_back('\n');
  }
  if (kept != text) write_file_atomically(path, kept);
}

}  // namespace moelab
