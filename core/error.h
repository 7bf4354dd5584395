// Errors that end in a documented exit code. A bug of ours is any other exception (exit code 1).
#pragma once

#include <stdexcept>
#include <string>

namespace moelab {

enum class ExitCode : int {
  kDone = 0,
  kBug = 1,          // a broken invariant of ours
  kUsage = 2,        // bad command line, config, or tensor shape
  kDiverged = 3,     // a non-finite loss, gradient or input
  kCollapsed = 4,    // collapse verdict with on_collapse = "stop"
  kData = 5,         // data or checkpoint missing, damaged, or not writable
  kPeerLost = 6,     // another rank died, or a deadline passed
  kInterrupted = 130,
  kTerminated = 143,
};

// One line for a person: what, where, and what to do.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message);
  ~Error() override;
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

[[noreturn]] void usage_error(const std::string& message);     // exit 2
[[noreturn]] void diverged_error(const std::string& message);  // exit 3
[[noreturn]] void data_error(const std::string& message);      // exit 5

// Up to the first line break: what a foreign library says before its backtrace.
std::string first_line(const std::string& text);

// A broken invariant: a bug of moelab or of a plugin, never of the user's input.
void check_invariant(bool holds, const std::string& message);

// The candidate nearest to `word` by edit distance, or "" when none is near enough to be a likely slip.
template <class Range>
std::string nearest_name(const std::string& word, const Range& candidates);
int edit_distance(const std::string& a, const std::string& b);

template <class Range>
std::string nearest_name(const std::string& word, const Range& candidates) {
  std::string best;
  int best_distance = static_cast<int>(word.size()) / 3 + 2;
  for (const std::string& candidate : candidates) {
    const int distance = edit_distance(word, candidate);
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

// ", did you mean 'x'?" or "".
template <class Range>
std::string did_you_mean(const std::string& word, const Range& candidates) {
  const std::string near = nearest_name(word, candidates);
  return near.empty() ? "" : ", did you mean '" + near + "'?";
}

}  // namespace moelab
