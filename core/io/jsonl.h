// Append-only logs of one JSON object a line, and JSON text in which no number is lost.
#pragma once

#include "core/io/files.h"

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>

namespace moelab {

// One line. JSON has no word for non-finite numbers: they become the strings "nan", "inf" and "-inf".
std::string json_text(const nlohmann::json& value);

// The number that json_text() wrote, whether as a number or as one of its three strings. Anything else is Error(kData).
double json_number(const nlohmann::json& value);

class JsonlWriter {
 public:
  explicit JsonlWriter(const std::string& path);

  // One write to the kernel per record: a killed process leaves whole lines. A record that does not fit is taken back.
  void append(const nlohmann::json& record);

  // Makes the records durable; call before a checkpoint that relies on them.
  void sync() { file_.sync(); }

 private:
  File file_;
};

// For resume: keeps the records up to `step` (and those without a step), drops later ones and a torn last line. Atomic; an
// absent file is fine. An unreadable line elsewhere is Error(kData) with its number.
void truncate_after_step(const std::string& path, int64_t step);

}  // namespace moelab
