// Parallel loops are parallel: without this, "the same bits on two threads" could be true of loops that never leave the first.
#include "core/ordered_blocks.h"

#include <ATen/Parallel.h>
#include <catch2/catch_test_macros.hpp>

#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

using namespace moelab;

namespace {

// Restores the number of threads that the other tests run with.
struct WithThreads {
  explicit WithThreads(int threads) : before(at::get_num_threads()) { at::set_num_threads(threads); }
  ~WithThreads() { at::set_num_threads(before); }
  int before;
};

struct Seen {
  std::set<std::thread::id> threads;
  std::set<std::pair<int64_t, int64_t>> pieces;
};

Seen seen_by_loop(int64_t begin, int64_t end, int64_t grain) {
  Seen seen;
  std::mutex mutex;
  parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const std::lock_guard<std::mutex> lock(mutex);
    seen.threads.insert(std::this_thread::get_id());
    seen.pieces.insert({first, last});
  });
  return seen;
}

}  // namespace

TEST_CASE("a parallel loop runs on as many threads as are set, each with a piece of its own") {
  for (const int threads : {1, 2, 3}) {
    const WithThreads with(threads);
    const Seen seen = seen_by_loop(5, 105, 1);
    CHECK(static_cast<int>(seen.threads.size()) == threads);
    int64_t next = 5;
    for (const auto& [first, last] : seen.pieces) CHECK(std::exchange(next, last) == first);
    CHECK(next == 105);
  }
}

TEST_CASE("a parallel loop of one grain, or of nothing, stays on the calling thread") {
  const WithThreads with(2);
  CHECK(seen_by_loop(0, 100, 100).threads == std::set<std::thread::id>{std::this_thread::get_id()});
  CHECK(seen_by_loop(7, 7, 1).pieces.empty());
}

TEST_CASE("a parallel loop inside another stays on the thread that it is called from") {
  const WithThreads with(2);
  parallel_for(0, 2, 1, [](int64_t, int64_t) {
    const std::thread::id own = std::this_thread::get_id();
    parallel_for(0, 8, 1, [&](int64_t, int64_t) {
      if (std::this_thread::get_id() != own) throw std::runtime_error("the inner loop left its thread");
    });
  });
}

TEST_CASE("what a body throws on another thread reaches the caller") {
  const WithThreads with(2);
  const std::thread::id caller = std::this_thread::get_id();
  CHECK_THROWS_AS(parallel_for(0, 2, 1,
                               [&](int64_t, int64_t) {
                                 if (std::this_thread::get_id() != caller) throw std::out_of_range("from the second thread");
                               }),
                  std::out_of_range);
}

TEST_CASE("ordered blocks are each done once, and a block sees those that it waits for") {
  const WithThreads with(3);
  constexpr int64_t kBlocks = 200;
  std::vector<int64_t> done(kBlocks, 0);  // done[b] = 1 + done[b-1], written once block b-1 has finished
  std::vector<int64_t> times(kBlocks, 0);
  BlockTurns turns(kBlocks);
  for_ordered_blocks(kBlocks, 3, [&](int64_t block, int64_t) {
    ++times[static_cast<size_t>(block)];
    std::this_thread::yield();
    turns.wait_for(block - 1);
    done[static_cast<size_t>(block)] = block == 0 ? 1 : done[static_cast<size_t>(block - 1)] + 1;
    turns.finish(block);
  });
  CHECK(times == std::vector<int64_t>(kBlocks, 1));
  CHECK(done.back() == kBlocks);
}
