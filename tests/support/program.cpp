#include "tests/support/program.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
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

// In the child: only calls that are safe between fork and exec.
[[noreturn]] void become_program(const std::vector<char*>& argv, const char* folder, const char* out, const char* err) {
  if (*folder != '\0' && chdir(folder) != 0) _exit(126);
  constexpr int kNew = O_WRONLY | O_CREAT | O_TRUNC;
  if (!child_redirect(out, kNew, 1) || !child_redirect(err, kNew, 2) || !child_redirect("/dev/null", O_RDONLY, 0)) _exit(126);
  execv(argv[0], argv.data());
  _exit(127);
}

}  // namespace

ProgramResult run_program(const std::string& program, const std::vector<std::string>& arguments, const std::string& folder) {
  const ScratchFolder scratch;
  const std::string out = scratch / "out", err = scratch / "err";
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  std::fflush(nullptr);  // else the child would write our pending output once more
  const pid_t child = fork();
  if (child == 0) become_program(argv, folder.c_str(), out.c_str(), err.c_str());
  int status = 0;
  waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), text_of(out), text_of(err)};
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
