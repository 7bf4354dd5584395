// Capacity of an expert and who is served first when it is full (`[moe.capacity]`).
#pragma once

#include "core/params.h"
#include "core/plan.h"

namespace moelab {

struct RouteInput;

struct CapacityPolicy {
  enum class Mode { kNone, kFactor, kAbsolute, kTokenFraction };
  enum class Round { kCeil, kRound, kFloor };
  enum class Scope { kSequence, kMicro, kGlobal };
  enum class Priority { kPosition, kBatch, kScore, kRandom };
  enum class Order { kChoiceMajor, kTokenMajor };

  Mode mode = Mode::kNone;
  double factor = 1;
  int64_t value = 0;
  bool times_k = false;
  Round round = Round::kCeil;
  int64_t min = 0;
  int64_t multiple_of = 1;
  Scope scope = Scope::kSequence;
  Priority priority = Priority::kPosition;
  Order order = Order::kChoiceMajor;

  // Places that one expert has among `rows` rows of one scope; `rows` for kNone.
  int64_t places(int64_t rows, int64_t experts, int64_t k) const;

  // Whether a later row of the same sequence can take the place of an earlier one, at k choices per row.
  bool lets_the_future_in(int64_t k) const;
};

// The keys of `[moe.capacity]`. "paper" is resolved to `paper` (the router's own policy).
OptionSpecs capacity_options();
CapacityPolicy capacity_policy(const Options& options, const CapacityPolicy& paper);

// Marks the pairs that fit. `allowed_TK` are those that compete; the result is allowed ∧ fits, bool [T,K].
Tensor served(const CapacityPolicy& policy, const RouteInput& in, const Tensor& choice_TK, const Tensor& allowed_TK,
              const Tensor& priority_TK, int64_t experts, int64_t k);

// Σ over scopes and experts of places(): the denominator of capacity utilisation. Where all ranks share one scope, its places
// are counted once, on rank 0, so that ranks can be summed.
int64_t total_places(const CapacityPolicy& policy, const RouteInput& in, int64_t experts, int64_t k);

}  // namespace moelab
