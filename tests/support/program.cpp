#include "tests/support/program.h"

#include "experiments/cli.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <functional>
#include <fstream>
#include <iterator>

namespace moelab::test {
namespace {

namespace fs = std::filesystem;

// freopen() would write out what the parent had buffered.
bool child_redirect(const char* path, int flags, int descriptor) {
  const int file = open(path, flags, 0600);
  return file >= 0 && dup2(file, descriptor) == descriptor;
}

std::vector<char*> pointers_to(const std::string& first, const std::vector<std::string>& others) {
  std::vector<char*> argv{const_cast<char*>(first.c_str())};
  for (const std::string& other : others) argv.push_back(const_cast<char*>(other.c_str()));
  argv.push_back(nullptr);
  return argv;
}

// `body` in a child, in `folder`, with its output in files; `body` gives the exit status.
ProgramResult run_child(const std::string& folder, const std::function<int()>& body) {
  const ScratchFolder scratch;
  const std::string out = scratch / "out", err = scratch / "err";
  std::fflush(nullptr);  // else the child would write our pending output once more
  const pid_t child = fork();
  if (child == 0) {
    constexpr int kNew = O_WRONLY | O_CREAT | O_TRUNC;
    if (!folder.empty() && chdir(folder.c_str()) != 0) _exit(126);
    if (!child_redirect(out.c_str(), kNew, 1) || !child_redirect(err.c_str(), kNew, 2)) _exit(126);
    if (!child_redirect("/dev/null", O_RDONLY, 0)) _exit(126);
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), text_of(out), text_of(err)};
}

}  // namespace

ProgramResult run_program(const std::string& program, const std::vector<std::string>& arguments, const std::string& folder) {
  const std::vector<char*> argv = pointers_to(program, arguments);
  return run_child(folder, [&] { return execv(argv[0], argv.data()) == 0 ? 0 : 127; });
}

ProgramResult run_moelab(const std::vector<std::string>& arguments, const std::string& folder) {
  const std::string name = "moelab";
  std::vector<char*> argv = pointers_to(name, arguments);
  return run_child(folder, [&] {
    // The test framework's handlers would report in the child's name.
    for (const int number : {SIGINT, SIGTERM, SIGILL, SIGFPE, SIGSEGV, SIGABRT}) std::signal(number, SIG_DFL);
    const int code = moelab::run_program(static_cast<int>(arguments.size()) + 1, argv.data());
    std::fflush(nullptr);
    return code;
  });
}

ScratchFolder::ScratchFolder() {
  std::string pattern = (fs::temp_directory_path() / "moelab-test-XXXXXX").string();
  path_ = mkdtemp(pattern.data());
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::string ScratchFolder::put(const std::string& name, const std::string& text) const {
  const std::string path = path_ + "/" + name;
  fs::create_directories(fs::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

std::vector<std::string> ScratchFolder::files() const {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path_))
    if (entry.is_regular_file()) names.push_back(fs::relative(entry.path(), path_).string());
  std::sort(names.begin(), names.end());
  return names;
}

std::string text_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace moelab::test
