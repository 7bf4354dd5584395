#include "core/comm.h"

#include "core/comm_checks.h"
#include "core/error.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <optional>

namespace moelab {

Work::~Work() = default;
Comm::~Comm() = default;

namespace {

std::string in_place_problem(const char* operation, const Tensor& tensor) {
  if (!tensor.defined()) return fmt::format("{} got an undefined tensor", operation);
  if (!tensor.is_contiguous()) return fmt::format("{} works in place and needs a contiguous tensor", operation);
  return "";
}

std::string rows_problem(const char* operation, const Tensor& input) {
  if (input.defined() && input.dim() > 0) return "";
  return fmt::format("{} needs a tensor with rows", operation);
}

}  // namespace

std::string all_reduce_problem(const Tensor& tensor, Reduce op) {
  const std::string problem = in_place_problem("all_reduce", tensor);
  if (problem.empty() && op == Reduce::kSum && tensor.scalar_type() == at::kBool) {
    return "all_reduce(sum) of bool has no meaning: take max for any, min for all";
  }
  return problem;
}

std::string broadcast_problem(const Tensor& tensor, int root, int size) {
  if (root < 0 || root >= size) return fmt::format("broadcast from rank {}, but there are {} ranks", root, size);
  return in_place_problem("broadcast", tensor);
}

std::string reduce_scatter_problem(const Tensor& input, int size) {
  const std::string problem = rows_problem("reduce_scatter", input);
  if (!problem.empty()) return problem;
  if (input.scalar_type() == at::kBool) return "reduce_scatter of bool has no meaning";
  if (input.size(0) % size == 0) return "";
  return fmt::format("reduce_scatter of {} rows does not divide among {} ranks", input.size(0), size);
}

std::string all_gather_problem(const Tensor& input) { return rows_problem("all_gather", input); }

std::string all_to_all_problem(const Tensor& input, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                               int size) {
  const std::string problem = rows_problem("all_to_all", input);
  if (!problem.empty()) return problem;
  for (const std::vector<int64_t>& counts : {send, receive}) {
    const bool negative = std::any_of(counts.begin(), counts.end(), [](int64_t count) { return count < 0; });
    if (static_cast<int>(counts.size()) == size && !negative) continue;
    return fmt::format("all_to_all needs {} counts of 0 or more, not [{}]", size, fmt::join(counts, ", "));
  }
  const int64_t rows = std::accumulate(send.begin(), send.end(), int64_t{0});
  if (rows == input.size(0)) return "";
  return fmt::format("all_to_all sends [{}], {} rows in all, but its input has {}", fmt::join(send, ", "), rows,
                     input.size(0));
}

namespace {

class FinishedWork final : public Work {
 public:
  void wait() override {}
};

// One rank: nothing to send and nobody to wait for, but the same demands on the caller.
class SingleComm final : public Comm {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }

  std::shared_ptr<Comm> split(int, int) override {
    admit("");
    return single_comm();
  }
  std::unique_ptr<Work> all_reduce_async(Tensor tensor, Reduce op) override {
    admit(all_reduce_problem(tensor, op));
    return std::make_unique<FinishedWork>();
  }
  Tensor reduce_scatter(const Tensor& input) override {
    admit(reduce_scatter_problem(input, 1));
    return copy_of(input);
  }
  Tensor all_gather(const Tensor& input) override {
    admit(all_gather_problem(input));
    return copy_of(input);
  }
  Tensor all_to_all(const Tensor& input, const std::vector<int64_t>& send, const std::vector<int64_t>& receive) override {
    admit(all_to_all_problem(input, send, receive, 1));
    if (send != receive) admit(fmt::format("all_to_all: rank 0 sends {} rows to itself and expects {}", send[0], receive[0]));
    return copy_of(input);
  }
  void broadcast(Tensor tensor, int root) override { admit(broadcast_problem(tensor, root, 1)); }
  void barrier() override { admit(""); }

  void set_deadline(std::chrono::milliseconds) override {}
  void abort(const std::string& reason) override { aborted_ = reason; }

 private:
  void admit(const std::string& problem) const {
    if (aborted_) throw Error(ExitCode::kPeerLost, "communication was aborted: " + *aborted_);
    check_invariant(problem.empty(), problem);
  }
  // Outside the graph, as on many ranks.
  static Tensor copy_of(const Tensor& input) { return input.detach().clone(at::MemoryFormat::Contiguous); }

  std::optional<std::string> aborted_;
};

}  // namespace

std::shared_ptr<Comm> single_comm() { return std::make_shared<SingleComm>(); }

}  // namespace moelab
