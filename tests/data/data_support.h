// Shared by the tests of data sets.
#pragma once

#include "core/dataset.h"
#include "core/error.h"
#include "datasets/cache.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

namespace moelab::data_tests {

inline ScratchFolder scratch() { return ScratchFolder(std::filesystem::temp_directory_path().string()); }

inline void write_text(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

inline std::vector<int64_t> values(const Tensor& tensor) {
  const Tensor flat = tensor.contiguous();
  return {flat.data_ptr<int64_t>(), flat.data_ptr<int64_t>() + flat.numel()};
}

// The data set `name` with some options changed.
inline DatasetSpec spec_of(const std::string& name, int64_t context, const std::map<std::string, OptionValue>& set = {}) {
  const OptionSpecs& specs = Registry<DatasetEntry>::instance().find(name).options;
  DatasetSpec spec{.context = context, .options = Options(specs)};
  for (const OptionSpec& option : specs) {
    if (const auto it = set.find(option.name); it != set.end()) spec.options.set(option, it->second);
  }
  return spec;
}

inline std::shared_ptr<const Dataset> make(const std::string& name, int64_t context,
                                           const std::map<std::string, OptionValue>& set = {}) {
  return make_dataset(name, spec_of(name, context, set));
}

// Lines of made-up words, a few of them frequent, without any other line feed than at their ends.
inline std::string wordy_text(size_t bytes, uint32_t seed = 1) {
  const std::vector<std::string> syllables{"ka", "to", "mi", "ren", "sol", "du", "pa", "lin", "ve", "gor", "shi", "num"};
  std::string text;
  uint32_t state = seed;
  const auto draw = [&state](uint32_t below) { return ((state = state * 1664525u + 1013904223u) >> 16) % below; };
  while (text.size() < bytes) {
    const uint32_t word = std::min(draw(40), draw(40));
    for (uint32_t s = 0; s < 1 + word % 3; ++s) text += syllables[(word * 7 + s * 5) % syllables.size()];
    text += draw(9) == 0 ? ".\n" : draw(12) == 0 ? ", " : " ";
  }
  return text.substr(0, bytes);
}

struct Failure {
  ExitCode code = ExitCode::kDone;
  std::string message;
  bool says(const std::string& part) const { return message.find(part) != std::string::npos; }
  bool one_line() const { return !message.empty() && message.find('\n') == std::string::npos; }
};

template <class Action>
Failure failure_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return {error.code(), error.what()};
  }
  return {};
}

// An environment variable for the length of a scope.
class Environment {
 public:
  Environment(const std::string& name, const std::string& value) : name_(name) {
    if (const char* old = std::getenv(name.c_str())) old_ = old;
    setenv(name.c_str(), value.c_str(), 1);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;
  ~Environment() { old_ ? setenv(name_.c_str(), old_->c_str(), 1) : unsetenv(name_.c_str()); }

 private:
  std::string name_;
  std::optional<std::string> old_;
};

}  // namespace moelab::data_tests
