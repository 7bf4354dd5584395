// Runs another program and waits for it. No shell reads the arguments.
#pragma once

#include <string>
#include <vector>

namespace moelab {

struct ProcessResult {
  int status = 0;      // exit status; 127 = no such program, 128 + n = killed by signal n
  std::string output;  // standard output
  std::string errors;  // standard error
};

// `command[0]` is looked up in PATH. The program runs in `folder` with nothing to read on its standard input.
ProcessResult run_process(const std::vector<std::string>& command, const std::string& folder = ".");

// The line to show of a program's standard error: the last one, or "exit status n" when it said nothing.
std::string last_words(const ProcessResult& result);

}  // namespace moelab
