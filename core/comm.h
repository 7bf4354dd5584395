// Communication between ranks. Backends: `single` (one rank), `threads` (the ranks are threads of one process; started by
// tests only). Every rank calls the same operations in the same order, with tensors of equal dtype. What is changed in place
// is contiguous. Results are new tensors outside the autograd graph. A call that is wrong in itself or does not fit those of
// the other ranks is a bug of the caller: Error(kBug) on every rank, and the group is unusable from then on.
#pragma once

#include "core/tensor.h"

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

namespace moelab {

enum class Reduce { kSum, kMax, kMin };

// An operation under way. wait() blocks until the result is in place; it throws Error(kPeerLost) after the deadline.
class Work {
 public:
  virtual ~Work();
  virtual void wait() = 0;
};

class Comm {
 public:
  virtual ~Comm();

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Ranks of equal colour form a new group, ordered by (key, old rank).
  virtual std::shared_ptr<Comm> split(int color, int key) = 0;

  // In place, every rank ends with the reduction over all. Sums run in rank order: bitwise the same on every rank.
  virtual std::unique_ptr<Work> all_reduce_async(Tensor tensor, Reduce op) = 0;
  void all_reduce(Tensor tensor, Reduce op = Reduce::kSum) { all_reduce_async(tensor, op)->wait(); }

  // `input` [size·n, ...]; the result [n, ...] is this rank's block of the sum.
  virtual Tensor reduce_scatter(const Tensor& input) = 0;
  // Blocks of all ranks stacked in rank order along dimension 0; the blocks may differ in length.
  virtual Tensor all_gather(const Tensor& input) = 0;
  // Rows of `input` [Σ send, ...] go to ranks in order, send[r] rows to rank r. Returns [Σ receive, ...].
  virtual Tensor all_to_all(const Tensor& input, const std::vector<int64_t>& send, const std::vector<int64_t>& receive) = 0;
  virtual void broadcast(Tensor tensor, int root) = 0;
  virtual void barrier() = 0;

  virtual void set_deadline(std::chrono::milliseconds deadline) = 0;
  // Wakes every rank that waits in this group, with Error(kPeerLost) carrying `reason`; later calls fail at once.
  virtual void abort(const std::string& reason) = 0;
};

std::shared_ptr<Comm> single_comm();

// Runs `body(comm)` on `ranks` threads and joins them. The first exception of any rank aborts the others, also in groups made
// by split, and is rethrown. A thread starts with LibTorch's defaults (gradients on), not with the caller's guards.
void run_on_threads(int ranks, const std::function<void(std::shared_ptr<Comm>)>& body);

// all_to_all on the autograd graph: its backward sends the gradients back the way the rows came. The backward is a collective
// too: on every rank `input` must require grad, and the loss must depend on the result even where it has no row.
Tensor all_to_all_differentiable(const std::shared_ptr<Comm>& comm, const Tensor& input, const std::vector<int64_t>& send,
                                 const std::vector<int64_t>& receive);

}  // namespace moelab
