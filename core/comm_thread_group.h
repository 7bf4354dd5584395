// The meeting place of thread ranks (internal to the threads backend). Every rank brings its call to a round; the rank that
// comes last does the work of all under the lock of the group, in rank order, and wakes the others. So a result cannot depend
// on timing, and an operation needs nobody's help once all have come: handles may be waited for in any order.
#pragma once

#include "core/error.h"
#include "core/tensor.h"

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

namespace moelab {

class ThreadGroup;

// What one rank brings, and what it takes away.
struct ThreadCall {
  std::string signature;  // operation, dtype, shape: equal on all ranks
  Tensor tensor{};
  std::vector<int64_t> send{}, receive{};
  int color = 0, key = 0;

  Tensor result{};
  std::shared_ptr<ThreadGroup> subgroup{};
  int subrank = 0;
};
using ThreadCalls = std::vector<ThreadCall>;
using ThreadOperation = std::function<void(ThreadCalls&)>;

struct ThreadRound {
  explicit ThreadRound(int size) : calls(size), arrived(size, false) {}
  ThreadCalls calls;
  std::vector<bool> arrived;
  bool done = false;
};

struct ThreadFailure {
  ExitCode code;
  std::string message;
};

class ThreadGroup {
 public:
  ThreadGroup(std::string name, int size);

  int size() const { return static_cast<int>(next_round_.size()); }
  std::shared_ptr<ThreadRound> post(int rank, ThreadCall call, const ThreadOperation& operation);
  void wait(int rank, const ThreadRound& round, std::chrono::milliseconds deadline);
  // The first failure stands; it ends every wait and every later call, in subgroups too.
  void fail(ExitCode code, const std::string& message);
  // The operation of split(), so it runs under the lock.
  void make_subgroups(ThreadCalls& calls);

 private:
  void fail_locked(ExitCode code, const std::string& message);
  void complete(ThreadRound& round, const ThreadOperation& operation);
  [[noreturn]] void throw_failure(int rank, const std::string& signature) const;
  std::string describe_missing(const ThreadRound& round, std::chrono::milliseconds deadline) const;

  const std::string name_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint64_t> next_round_;  // of each rank
  std::map<uint64_t, std::shared_ptr<ThreadRound>> open_rounds_;
  std::optional<ThreadFailure> failure_;
  std::vector<std::weak_ptr<ThreadGroup>> subgroups_;
};

// One line, also for LibTorch's exceptions, whose what() carries a stack.
std::string one_line_message(const std::exception& error);

}  // namespace moelab
