// Work in blocks that several threads share, with sums in one order.
#pragma once

#include "core/gemm.h"
#include "core/parallel.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace moelab {

// Flags that blocks raise in turn. A thread takes blocks in ascending order, and waits for lower ones only: the lowest unfinished
// block never waits, so whoever holds it goes on.
class BlockTurns {
 public:
  explicit BlockTurns(int64_t blocks) : done_(new std::atomic<bool>[static_cast<size_t>(blocks)]()) {}
  bool done(int64_t block) const { return block < 0 || done_[static_cast<size_t>(block)].load(std::memory_order_acquire); }
  void wait_for(int64_t block) const {
    while (!done(block)) std::this_thread::yield();
  }
  void finish(int64_t block) { done_[static_cast<size_t>(block)].store(true, std::memory_order_release); }

 private:
  std::unique_ptr<std::atomic<bool>[]> done_;
};

// Calls body(block, thread) for every block, and end(thread) when none is left for a thread; neither may throw. Inside them the
// library's products use one thread.
template <class Body, class End>
void for_ordered_blocks(int64_t blocks, int64_t threads, Body body, End end_of) {
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const OneThreadProducts one_thread;
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t block = next++; block < blocks; block = next++) body(block, thread);
      end_of(thread);
    }
  });
}

template <class Body>
void for_ordered_blocks(int64_t blocks, int64_t threads, Body body) {
  for_ordered_blocks(blocks, threads, body, [](int64_t) {});
}

}  // namespace moelab
