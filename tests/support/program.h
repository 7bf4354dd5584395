// Runs the program and its commands, as a user would.
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

// A program with these arguments, in `folder` ("" = the current one).
ProgramResult run_program(const std::string& program, const std::vector<std::string>& arguments, const std::string& folder = "");

// moelab with these arguments: its command line from the first word to the exit status, in a child that has the library loaded
// already. A started program would spend half a second on that, which is most of what the tests of the commands would take.
ProgramResult run_moelab(const std::vector<std::string>& arguments, const std::string& folder = "");

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
