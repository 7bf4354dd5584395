// Ranks as threads of one process: what each operation does with the calls of all ranks, and the Comm that makes the calls.
#include "core/comm.h"

#include "core/comm_checks.h"
#include "core/comm_thread_group.h"
#include "core/error.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace moelab {
namespace {

Tensor reduce_in_rank_order(const ThreadCalls& calls, Reduce op) {
  Tensor total = calls[0].tensor.clone();
  for (size_t r = 1; r < calls.size(); ++r) {
    if (op == Reduce::kSum) total.add_(calls[r].tensor);
    if (op == Reduce::kMax) total = at::maximum(total, calls[r].tensor);
    if (op == Reduce::kMin) total = at::minimum(total, calls[r].tensor);
  }
  return total;
}

void threads_all_reduce(ThreadCalls& calls, Reduce op) {
  const Tensor total = reduce_in_rank_order(calls, op);
  for (ThreadCall& call : calls) call.tensor.copy_(total);
}

void threads_reduce_scatter(ThreadCalls& calls) {
  const auto blocks = reduce_in_rank_order(calls, Reduce::kSum).chunk(static_cast<int64_t>(calls.size()));
  for (size_t r = 0; r < calls.size(); ++r) calls[r].result = blocks[r].clone();
}

void threads_all_gather(ThreadCalls& calls) {
  std::vector<Tensor> blocks;
  for (const ThreadCall& call : calls) blocks.push_back(call.tensor);
  for (ThreadCall& call : calls) call.result = at::cat(blocks);
}

void threads_broadcast(ThreadCalls& calls, int root) {
  for (ThreadCall& call : calls) call.tensor.copy_(calls[root].tensor);
}

void check_receive_counts(const ThreadCalls& calls) {
  for (size_t from = 0; from < calls.size(); ++from) {
    for (size_t to = 0; to < calls.size(); ++to) {
      const int64_t sent = calls[from].send[to], expected = calls[to].receive[from];
      check_invariant(sent == expected, fmt::format("rank {} sends {} rows to rank {}, which expects {}", from, sent, to,
                                                    expected));
    }
  }
}

void threads_all_to_all(ThreadCalls& calls) {
  check_receive_counts(calls);
  std::vector<std::vector<Tensor>> parts;  // [from][to]
  for (const ThreadCall& call : calls) parts.push_back(call.tensor.split_with_sizes(call.send));
  for (size_t to = 0; to < calls.size(); ++to) {
    std::vector<Tensor> received;
    for (const std::vector<Tensor>& from : parts) received.push_back(from[to]);
    calls[to].result = at::cat(received);
  }
}

std::string describe_call(const std::string& operation, const Tensor& tensor, at::IntArrayRef shape) {
  return fmt::format("{} of {} [{}]", operation, c10::toString(tensor.scalar_type()), fmt::join(shape, ", "));
}

// The rows may differ in number, so only what a row is has to agree.
std::string describe_rows(const std::string& operation, const Tensor& tensor) {
  return describe_call(operation + " rows", tensor, tensor.sizes().slice(1));
}

const char* reduce_name(Reduce op) { return op == Reduce::kSum ? "sum" : op == Reduce::kMax ? "max" : "min"; }

class ThreadWork final : public Work {
 public:
  ThreadWork(std::shared_ptr<ThreadGroup> group, std::shared_ptr<ThreadRound> round, int rank,
             std::chrono::milliseconds deadline)
      : group_(std::move(group)), round_(std::move(round)), rank_(rank), deadline_(deadline) {}
  void wait() override { group_->wait(rank_, *round_, deadline_); }

 private:
  std::shared_ptr<ThreadGroup> group_;
  std::shared_ptr<ThreadRound> round_;
  int rank_;
  std::chrono::milliseconds deadline_;
};

class ThreadComm final : public Comm {
 public:
  ThreadComm(std::shared_ptr<ThreadGroup> group, int rank, std::chrono::milliseconds deadline)
      : group_(std::move(group)), rank_(rank), deadline_(deadline) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  std::shared_ptr<Comm> split(int color, int key) override;
  std::unique_ptr<Work> all_reduce_async(Tensor tensor, Reduce op) override;
  Tensor reduce_scatter(const Tensor& input) override;
  Tensor all_gather(const Tensor& input) override;
  Tensor all_to_all(const Tensor& input, const std::vector<int64_t>& send, const std::vector<int64_t>& receive) override;
  void broadcast(Tensor tensor, int root) override;
  void barrier() override;

  void set_deadline(std::chrono::milliseconds deadline) override { deadline_ = deadline; }
  void abort(const std::string& reason) override { group_->fail(ExitCode::kPeerLost, "aborted: " + reason); }

 private:
  // A call that is wrong in itself ends the group at once: the others would wait for it in vain.
  void admit(const std::string& problem) {
    if (problem.empty()) return;
    const std::string message = fmt::format("rank {}: {}", rank_, problem);
    group_->fail(ExitCode::kBug, message);
    check_invariant(false, message);
  }
  ThreadCall run(ThreadCall call, const ThreadOperation& operation) {
    const auto round = group_->post(rank_, std::move(call), operation);
    group_->wait(rank_, *round, deadline_);
    return std::move(round->calls[rank_]);
  }

  std::shared_ptr<ThreadGroup> group_;
  int rank_;
  std::chrono::milliseconds deadline_;
};

std::shared_ptr<Comm> ThreadComm::split(int color, int key) {
  const ThreadCall call = run({.signature = "split", .color = color, .key = key},
                              [this](ThreadCalls& calls) { group_->make_subgroups(calls); });
  return std::make_shared<ThreadComm>(call.subgroup, call.subrank, deadline_);
}

std::unique_ptr<Work> ThreadComm::all_reduce_async(Tensor tensor, Reduce op) {
  admit(all_reduce_problem(tensor, op));
  const std::string name = fmt::format("all_reduce({})", reduce_name(op));
  auto round = group_->post(rank_, {.signature = describe_call(name, tensor, tensor.sizes()), .tensor = tensor.detach()},
                            [op](ThreadCalls& calls) { threads_all_reduce(calls, op); });
  return std::make_unique<ThreadWork>(group_, std::move(round), rank_, deadline_);
}

Tensor ThreadComm::reduce_scatter(const Tensor& input) {
  admit(reduce_scatter_problem(input, size()));
  return run({.signature = describe_call("reduce_scatter", input, input.sizes()), .tensor = input.detach().contiguous()},
             threads_reduce_scatter).result;
}

Tensor ThreadComm::all_gather(const Tensor& input) {
  admit(all_gather_problem(input));
  return run({.signature = describe_rows("all_gather", input), .tensor = input.detach().contiguous()},
             threads_all_gather).result;
}

Tensor ThreadComm::all_to_all(const Tensor& input, const std::vector<int64_t>& send, const std::vector<int64_t>& receive) {
  admit(all_to_all_problem(input, send, receive, size()));
  return run({.signature = describe_rows("all_to_all", input), .tensor = input.detach().contiguous(), .send = send,
              .receive = receive},
             threads_all_to_all).result;
}

void ThreadComm::broadcast(Tensor tensor, int root) {
  admit(broadcast_problem(tensor, root, size()));
  const std::string name = fmt::format("broadcast from rank {}", root);
  run({.signature = describe_call(name, tensor, tensor.sizes()), .tensor = tensor.detach()},
      [root](ThreadCalls& calls) { threads_broadcast(calls, root); });
}

void ThreadComm::barrier() {
  run({.signature = "barrier"}, [](ThreadCalls&) {});
}

constexpr std::chrono::milliseconds kDefaultDeadline = std::chrono::seconds(60);

// Keeps the first exception; later ones are its echo from the ranks that were woken.
class FirstException {
 public:
  void keep_current() {
    const std::lock_guard lock(mutex_);
    if (!first_) first_ = std::current_exception();
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

}  // namespace

void run_on_threads(int ranks, const std::function<void(std::shared_ptr<Comm>)>& body) {
  check_invariant(ranks > 0, fmt::format("run_on_threads with {} ranks", ranks));
  const auto group = std::make_shared<ThreadGroup>("world", ranks);
  FirstException first;
  const auto run_rank = [&](int rank) {
    try {
      body(std::make_shared<ThreadComm>(group, rank, kDefaultDeadline));
    } catch (const std::exception& error) {
      first.keep_current();
      group->fail(ExitCode::kPeerLost, fmt::format("aborted: rank {} failed: {}", rank, one_line_message(error)));
    } catch (...) {
      first.keep_current();
      group->fail(ExitCode::kPeerLost, fmt::format("aborted: rank {} failed", rank));
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(run_rank, rank);
  }
  first.rethrow();
}

}  // namespace moelab
