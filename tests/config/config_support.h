// Shared by the tests of this folder: throw-away files, and the message and code of an expected Error.
#pragma once

#include "core/config.h"
#include "core/error.h"

#include <filesystem>
#include <fstream>
#include <random>
#include <string>

namespace moelab {

// A folder of files that vanishes with the test.
class ConfigFolder {
 public:
  ConfigFolder() {
    path_ = std::filesystem::temp_directory_path() / ("moelab_config_" + std::to_string(std::random_device{}()));
    std::filesystem::create_directories(path_);
  }
  ~ConfigFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ConfigFolder(const ConfigFolder&) = delete;

  // Writes a file and returns its path.
  std::string write(const std::string& name, const std::string& text) const {
    const std::filesystem::path path = path_ / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }
  std::string at(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// "exit code|message" of the Error that `act` throws, "nothing" if none: one comparison checks both.
template <class Act>
std::string complaint(const Act& act) {
  try {
    act();
  } catch (const Error& error) {
    return std::to_string(static_cast<int>(error.code())) + "|" + error.what();
  }
  return "nothing";
}

inline std::string parse_complaint(const std::string& text, const std::vector<std::string>& overrides = {}) {
  return complaint([&] { parse_config(text, "exp.toml", overrides); });
}

}  // namespace moelab
