// Runs the real program, as a user would.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace moelab::test {

struct ProgramResult {
  int code = -1;  // exit status; 128 + signal where one ended it
  std::string out;
  std::string err;
};

// MOELAB_PROGRAM with these arguments, in `folder` ("" = the current one).
ProgramResult run_program(const std::string& program, const std::vector<std::string>& arguments, const std::string& folder = "");

// A folder that goes away.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::string put(const std::string& name, const std::string& text) const;  // writes, makes folders, returns the path
  std::vector<std::string> files() const;                                    // all files below, relative, sorted

 private:
  std::string path_;
};

std::string text_of(const std::string& path);

}  // namespace moelab::test
