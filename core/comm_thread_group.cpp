#include "core/comm_thread_group.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

namespace moelab {
namespace {

void check_same_signature(const ThreadCalls& calls) {
  for (size_t r = 1; r < calls.size(); ++r) {
    check_invariant(calls[r].signature == calls[0].signature,
                    fmt::format("ranks disagree: rank 0 calls {}, rank {} calls {}", calls[0].signature, r,
                                calls[r].signature));
  }
}

}  // namespace

std::string one_line_message(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string text = from_torch ? from_torch->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

ThreadGroup::ThreadGroup(std::string name, int size) : name_(std::move(name)), next_round_(size, 0) {}

std::shared_ptr<ThreadRound> ThreadGroup::post(int rank, ThreadCall call, const ThreadOperation& operation) {
  const std::lock_guard lock(mutex_);
  if (failure_) throw_failure(rank, call.signature);
  const uint64_t number = next_round_[rank]++;
  std::shared_ptr<ThreadRound>& slot = open_rounds_[number];
  if (!slot) slot = std::make_shared<ThreadRound>(size());
  const std::shared_ptr<ThreadRound> round = slot;
  round->calls[rank] = std::move(call);
  round->arrived[rank] = true;
  if (std::find(round->arrived.begin(), round->arrived.end(), false) == round->arrived.end()) {
    open_rounds_.erase(number);
    complete(*round, operation);
  }
  return round;
}

void ThreadGroup::complete(ThreadRound& round, const ThreadOperation& operation) {
  const at::NoGradGuard no_grad;
  try {
    check_same_signature(round.calls);
    operation(round.calls);
    round.done = true;
    changed_.notify_all();
  } catch (const Error& error) {
    fail_locked(error.code(), error.what());
  } catch (const std::exception& error) {
    fail_locked(ExitCode::kBug, one_line_message(error));
  }
}

void ThreadGroup::wait(int rank, const ThreadRound& round, std::chrono::milliseconds deadline) {
  std::unique_lock lock(mutex_);
  const bool woken = changed_.wait_for(lock, deadline, [&] { return round.done || failure_.has_value(); });
  if (round.done) return;
  if (!woken) fail_locked(ExitCode::kPeerLost, describe_missing(round, deadline));
  throw_failure(rank, round.calls[rank].signature);
}

void ThreadGroup::fail(ExitCode code, const std::string& message) {
  const std::lock_guard lock(mutex_);
  fail_locked(code, message);
}

// Locks of subgroups are taken inside the lock of their parent, never the other way.
void ThreadGroup::fail_locked(ExitCode code, const std::string& message) {
  if (!failure_) failure_ = ThreadFailure{code, message};
  changed_.notify_all();
  for (const std::weak_ptr<ThreadGroup>& weak : subgroups_) {
    if (const auto subgroup = weak.lock()) subgroup->fail(failure_->code, failure_->message);
  }
}

void ThreadGroup::throw_failure(int rank, const std::string& signature) const {
  throw Error(failure_->code, fmt::format("rank {} of {} in group '{}', {}: {}", rank, size(), name_, signature,
                                          failure_->message));
}

std::string ThreadGroup::describe_missing(const ThreadRound& round, std::chrono::milliseconds deadline) const {
  std::vector<size_t> missing;
  for (size_t r = 0; r < round.arrived.size(); ++r) {
    if (!round.arrived[r]) missing.push_back(r);
  }
  return fmt::format("rank{} {} did not come within {} ms", missing.size() == 1 ? "" : "s", fmt::join(missing, ", "),
                     deadline.count());
}

void ThreadGroup::make_subgroups(ThreadCalls& calls) {
  std::map<int, std::vector<std::pair<int, int>>> members;  // colour -> (key, old rank)
  for (int r = 0; r < size(); ++r) members[calls[r].color].emplace_back(calls[r].key, r);
  for (auto& [color, ranks] : members) {
    std::sort(ranks.begin(), ranks.end());
    const auto subgroup = std::make_shared<ThreadGroup>(fmt::format("{}/{}", name_, color), static_cast<int>(ranks.size()));
    subgroups_.push_back(subgroup);
    for (size_t r = 0; r < ranks.size(); ++r) {
      calls[ranks[r].second].subgroup = subgroup;
      calls[ranks[r].second].subrank = static_cast<int>(r);
    }
  }
}

}  // namespace moelab
