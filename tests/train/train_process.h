// Runs of the real program that are watched, signalled and compared.
#pragma once

#include "core/io/files.h"
#include "tests/support/program.h"

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace moelab::test {

// A started program; killed where a test ends early.
class StartedProgram {
 public:
  explicit StartedProgram(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), MOELAB_PROGRAM);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    child_ = fork();
    if (child_ != 0) return;
    const int nowhere = open("/dev/null", O_RDWR);
    if (dup2(nowhere, 0) < 0 || dup2(nowhere, 1) < 0 || dup2(nowhere, 2) < 0) _exit(126);
    execv(argv[0], argv.data());
    _exit(127);
  }
  StartedProgram(const StartedProgram&) = delete;
  StartedProgram& operator=(const StartedProgram&) = delete;
  ~StartedProgram() {
    if (child_ > 0) end_with(SIGKILL);
  }

  pid_t id() const { return child_; }
  void signal(int number) const { kill(child_, number); }

  // Exit status, or 128 + signal.
  int wait() {
    int status = 0;
    waitpid(std::exchange(child_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  int end_with(int number) {
    signal(number);
    return wait();
  }

  // Waits until `holds`, or until the program has ended by itself; false after that or after a minute.
  bool wait_until(const std::function<bool()>& holds) const {
    for (int tries = 0; tries < 60000; ++tries) {
      if (holds()) return true;
      siginfo_t info{};
      if (waitid(P_PID, static_cast<id_t>(child_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0) return holds();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

 private:
  pid_t child_ = -1;
};

inline int64_t lines_in(const std::string& path) {
  const std::string text = text_of(path);
  return std::count(text.begin(), text.end(), '\n');
}

// metrics.jsonl without what a clock wrote.
inline std::vector<std::string> timeless_metrics(const std::string& run) {
  std::istringstream text(text_of(run + "/metrics.jsonl"));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) {
    nlohmann::json record = nlohmann::json::parse(line);
    record.erase("seconds");
    record.erase("timing");
    lines.push_back(record.dump());
  }
  return lines;
}

// Size and hash of every file below ckpt/, by name.
inline std::map<std::string, std::string> checkpoint_files(const std::string& run) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(run + "/ckpt")) {
    if (!entry.is_regular_file()) continue;
    const std::string bytes = text_of(entry.path().string());
    files[std::filesystem::relative(entry.path(), run).string()] = std::to_string(bytes.size()) + " bytes, " + xxh3_hex(bytes);
  }
  return files;
}

// summary.json without the time that the last process took.
inline nlohmann::json timeless_summary(const std::string& run) {
  nlohmann::json summary = nlohmann::json::parse(text_of(run + "/summary.json"));
  summary.erase("seconds");
  return summary;
}

}  // namespace moelab::test
