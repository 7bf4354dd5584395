// What the tests of ranks share. Catch2 checks only from the main thread: ranks throw through `expect`, and run_on_threads
// carries it out.
#pragma once

#include "core/comm.h"
#include "core/error.h"

#include <ATen/ATen.h>

#include <array>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace moelab::test {

using CommPointer = std::shared_ptr<Comm>;

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("expectation failed: " + what);
}

inline void expect_equal(const Tensor& seen, const Tensor& wanted, const std::string& what) {
  expect(seen.scalar_type() == wanted.scalar_type() && at::equal(seen, wanted), what);
}

// A block of small integers that differs from rank to rank: exact in every type.
inline Tensor rank_block(int rank, at::IntArrayRef shape, at::ScalarType dtype) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return ((at::arange(count, at::kLong) * 7 + rank * 5).remainder(11) - 4).view(shape).to(dtype);
}

inline constexpr std::array<at::ScalarType, 3> kNumberTypes{at::kLong, at::kFloat, at::kDouble};

// What the ranks' exceptions say, rank by rank.
struct CaughtErrors {
  std::mutex mutex;
  std::map<int, std::pair<ExitCode, std::string>> by_rank;

  void run(int rank, const std::function<void()>& action) {
    try {
      action();
    } catch (const Error& error) {
      const std::lock_guard lock(mutex);
      by_rank[rank] = {error.code(), error.what()};
    }
  }
  bool all_say(size_t ranks, ExitCode code, const std::vector<std::string>& words) const {
    bool hold = by_rank.size() == ranks;
    for (const auto& [rank, error] : by_rank) {
      hold = hold && error.first == code;
      for (const std::string& word : words) hold = hold && error.second.find(word) != std::string::npos;
    }
    return hold;
  }
};

template <class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace moelab::test
