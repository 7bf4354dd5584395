#include "datasets/process.h"

#include "core/error.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace moelab {
namespace {

// Unnamed files rather than pipes: two pipes read one after the other can block the program for ever.
class ProcessCapture {
 public:
  ProcessCapture() : file_(std::tmpfile()) {
    if (file_ == nullptr) data_error(std::string("cannot make a temporary file: ") + std::strerror(errno));
    fcntl(descriptor(), F_SETFD, FD_CLOEXEC);
  }
  ProcessCapture(const ProcessCapture&) = delete;
  ProcessCapture& operator=(const ProcessCapture&) = delete;
  ~ProcessCapture() { std::fclose(file_); }

  int descriptor() const { return fileno(file_); }

  std::string text() const {
    std::string text;
    char buffer[1 << 16];
    std::rewind(file_);
    while (const size_t count = std::fread(buffer, 1, sizeof buffer, file_)) text.append(buffer, count);
    return text;
  }

 private:
  std::FILE* file_;
};

class SpawnActions {
 public:
  SpawnActions() { posix_spawn_file_actions_init(&actions_); }
  SpawnActions(const SpawnActions&) = delete;
  SpawnActions& operator=(const SpawnActions&) = delete;
  ~SpawnActions() { posix_spawn_file_actions_destroy(&actions_); }
  posix_spawn_file_actions_t* get() { return &actions_; }

 private:
  posix_spawn_file_actions_t actions_;
};

int wait_for_process(pid_t process) {
  int status = 0;
  while (waitpid(process, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

ProcessResult run_process(const std::vector<std::string>& command, const std::string& folder) {
  const ProcessCapture output, errors;
  SpawnActions actions;
  posix_spawn_file_actions_addopen(actions.get(), STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(actions.get(), output.descriptor(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(actions.get(), errors.descriptor(), STDERR_FILENO);
  posix_spawn_file_actions_addchdir_np(actions.get(), folder.c_str());
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  pid_t process = 0;
  const int failure = posix_spawnp(&process, arguments[0], actions.get(), nullptr, arguments.data(), environ);
  if (failure != 0) return {.status = 127, .output = "", .errors = command[0] + ": " + std::strerror(failure)};
  const int status = wait_for_process(process);
  return {.status = status, .output = output.text(), .errors = errors.text()};
}

std::string last_words(const ProcessResult& result) {
  const size_t end = result.errors.find_last_not_of(" \n");
  if (end == std::string::npos) return "exit status " + std::to_string(result.status);
  const size_t line_end = result.errors.find_last_of('\n', end);
  const size_t begin = line_end == std::string::npos ? 0 : line_end + 1;
  return result.errors.substr(begin, end + 1 - begin);
}

}  // namespace moelab
