#include "core/capacity.h"

#include "core/error.h"
#include "core/router.h"
#include "core/select.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moelab {
namespace {

using Mode_ = CapacityPolicy::Mode;

// Halves go to even, as in the languages of the reference codes; std::round would not.
double rounded(double value, CapacityPolicy::Round how) {
  switch (how) {
    case CapacityPolicy::Round::kCeil: return std::ceil(value);
    case CapacityPolicy::Round::kRound: return std::nearbyint(value);
    case CapacityPolicy::Round::kFloor: return std::floor(value);
  }
  return value;
}

// Rows per scope: one entry per sequence, or one for the micro-batch.
std::vector<int64_t> rows_per_scope(const CapacityPolicy& policy, const RouteInput& in) {
  if (policy.scope != CapacityPolicy::Scope::kSequence) return {in.rows()};
  std::vector<int64_t> rows(in.sequences, 0);
  const auto* sequence = in.sequence_T.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < in.rows(); ++t) ++rows[sequence[t]];
  return rows;
}

// One competing pair and what decides its turn. Smaller goes first; later fields break ties.
struct Contender {
  int64_t rank_first;  // the choice's rank where the order is choice-major, else 0
  double urgency;      // larger is served first
  int64_t row;
  int64_t rank;
  int64_t pair;        // position in [T,K]
  bool operator<(const Contender& o) const {
    if (rank_first != o.rank_first) return rank_first < o.rank_first;
    if (urgency != o.urgency) return urgency > o.urgency;
    if (row != o.row) return row < o.row;
    return rank < o.rank;
  }
};

// Per pair, larger first. Position order needs none: rows break the tie.
Tensor urgencies(const CapacityPolicy& policy, const RouteInput& in, const Tensor& choice_TK, const Tensor& priority_TK,
                 int64_t experts) {
  switch (policy.priority) {
    case CapacityPolicy::Priority::kPosition: return at::zeros_like(choice_TK, at::kDouble);
    case CapacityPolicy::Priority::kScore: return priority_TK.detach().to(at::kDouble);
    case CapacityPolicy::Priority::kBatch:
      return priority_TK.detach().to(at::kDouble).amax(1, /*keepdim=*/true).expand_as(choice_TK);
    case CapacityPolicy::Priority::kRandom: break;
  }
  Tensor draw_TE = in.capacity_noise_TE;
  if (!draw_TE.defined())
    draw_TE = uniform_rows(in.random.with("capacity"), in.sequence_key_T, in.position_T, experts, at::kDouble);
  return draw_TE.to(at::kDouble).gather(1, choice_TK.clamp_min(0));
}

std::vector<Contender> contenders(const CapacityPolicy& policy, const Tensor& allowed_TK, const Tensor& urgency_TK) {
  const int64_t k = allowed_TK.size(1), pairs = allowed_TK.numel();
  const auto* allowed = allowed_TK.const_data_ptr<bool>();
  const auto* urgency = urgency_TK.const_data_ptr<double>();
  const bool by_rank = policy.order == CapacityPolicy::Order::kChoiceMajor && policy.priority != CapacityPolicy::Priority::kScore;
  std::vector<Contender> list;
  list.reserve(pairs);
  for (int64_t i = 0; i < pairs; ++i)
    if (allowed[i]) list.push_back({by_rank ? i % k : 0, urgency[i], i / k, i % k, i});
  std::sort(list.begin(), list.end());
  return list;
}

// The pairs that compete, and the scope each row belongs to.
struct Queue {
  Tensor choice_TK;
  Tensor allowed_TK;
  Tensor urgency_TK;
  Tensor scope_T;
};

// Free places of (scope, expert), scope-major.
std::vector<int64_t> places_left(const CapacityPolicy& policy, const std::vector<int64_t>& rows, int64_t experts, int64_t k) {
  std::vector<int64_t> left;
  left.reserve(rows.size() * static_cast<size_t>(experts));
  for (const int64_t scope_rows : rows) left.insert(left.end(), experts, policy.places(scope_rows, experts, k));
  return left;
}

Tensor serve(const Queue& queue, std::vector<int64_t> left, const CapacityPolicy& policy, int64_t experts) {
  const Tensor choice_TK = queue.choice_TK.contiguous();
  Tensor served_TK = at::zeros_like(queue.allowed_TK);
  auto* is_served = served_TK.mutable_data_ptr<bool>();
  const auto* choice = choice_TK.const_data_ptr<int64_t>();
  const auto* scope = queue.scope_T.const_data_ptr<int64_t>();
  for (const Contender& c : contenders(policy, queue.allowed_TK, queue.urgency_TK)) {
    int64_t& places = left[scope[c.row] * experts + choice[c.pair]];
    if (places == 0) continue;
    --places;
    is_served[c.pair] = true;
  }
  return served_TK;
}

bool spans_ranks(const CapacityPolicy& policy, const RouteInput& in) {
  return policy.scope == CapacityPolicy::Scope::kGlobal && in.comm != nullptr && in.comm->size() > 1;
}

// Each in the order of its enumeration; "paper" is the router's own policy.
const std::vector<std::string> kModeWords{"none", "factor", "absolute", "token_fraction", "paper"};
const std::vector<std::string> kRoundWords{"ceil", "round", "floor"};
const std::vector<std::string> kScopeWords{"sequence", "micro", "global"};
const std::vector<std::string> kPriorityWords{"position", "batch", "score", "random"};
const std::vector<std::string> kOrderWords{"k_major", "token_major"};

template <class Enum>
Enum named(const std::vector<std::string>& words, const std::string& word) {
  const auto found = std::find(words.begin(), words.end(), word);
  check_invariant(found != words.end(), "'" + word + "' names no choice of [moe.capacity]");
  return static_cast<Enum>(found - words.begin());
}

}  // namespace

int64_t CapacityPolicy::places(int64_t rows, int64_t experts, int64_t k) const {
  if (mode == Mode::kNone) return rows;
  if (mode == Mode::kAbsolute) return std::min(value, rows);
  double load = static_cast<double>(rows) * factor;  // the division comes last: 49 · (1/49) is not 1
  if (mode == Mode::kFactor) load = load * static_cast<double>(times_k ? k : 1) / static_cast<double>(experts);
  int64_t count = std::max(min, static_cast<int64_t>(rounded(load, round)));
  count = (count + multiple_of - 1) / multiple_of * multiple_of;
  return std::min(count, rows);
}

bool CapacityPolicy::lets_the_future_in(int64_t k) const {
  if (mode == Mode::kNone) return false;
  if (priority != Priority::kPosition) return true;
  // The number of places depends on the whole scope's length too, but that is known before the first token is read.
  return order == Order::kChoiceMajor && k != 1;
}

OptionSpecs capacity_options() {
  const std::vector<std::string> shares{"factor", "token_fraction"}, any{"factor", "absolute", "token_fraction"};
  return {
      option("mode", "none", "rows an expert takes: all, a factor of n/E, a number, a share of the rows, or the paper's rule")
          .one_of(kModeWords),
      option("factor", 1.0, "capacity factor; with token_fraction the share of the rows").at_least(0).read_when("mode", shares),
      option("value", 0, "places per expert with mode = absolute").at_least(0).read_when("mode", {"absolute"}),
      option("times_k", false, "the factor multiplies n·k/E instead of n/E").read_when("mode", {"factor"}),
      option("round", "ceil", "how the number is rounded (halves to even)").one_of(kRoundWords).read_when("mode", shares),
      option("min", 0, "at least this many places").at_least(0).read_when("mode", shares),
      option("multiple_of", 1, "rounded up to a multiple of this").at_least(1).read_when("mode", shares),
      option("scope", "sequence", "rows that share the places").one_of(kScopeWords).read_when("mode", any),
      option("priority", "position", "who is served first").one_of(kPriorityWords).read_when("mode", any),
      option("order", "k_major", "all first choices before all second ones, or row by row")
          .one_of(kOrderWords)
          .read_when("mode", any),
  };
}

CapacityPolicy capacity_policy(const Options& options, const CapacityPolicy& paper) {
  if (options.text("mode") == "paper") return paper;
  CapacityPolicy policy;
  policy.mode = named<Mode_>(kModeWords, options.text("mode"));
  policy.factor = options.real("factor");
  policy.value = options.integer("value");
  policy.times_k = options.flag("times_k");
  policy.round = named<CapacityPolicy::Round>(kRoundWords, options.text("round"));
  policy.min = options.integer("min");
  policy.multiple_of = options.integer("multiple_of");
  policy.scope = named<CapacityPolicy::Scope>(kScopeWords, options.text("scope"));
  policy.priority = named<CapacityPolicy::Priority>(kPriorityWords, options.text("priority"));
  policy.order = named<CapacityPolicy::Order>(kOrderWords, options.text("order"));
  return policy;
}

Tensor served(const CapacityPolicy& policy, const RouteInput& in, const Tensor& choice_TK, const Tensor& allowed_TK,
              const Tensor& priority_TK, int64_t experts, int64_t k) {
  if (policy.mode == Mode_::kNone) return allowed_TK;
  const Tensor urgency_TK = urgencies(policy, in, choice_TK, priority_TK, experts).contiguous();
  if (!spans_ranks(policy, in)) {
    const std::vector<int64_t> rows = rows_per_scope(policy, in);
    const Tensor scope_T = rows.size() == 1 ? at::zeros_like(in.sequence_T) : in.sequence_T;
    return serve({choice_TK, allowed_TK, urgency_TK, scope_T}, places_left(policy, rows, experts, k), policy, experts);
  }
  // All ranks' pairs, in rank order, so that every rank sees the same queue and keeps its own part of the outcome.
  Comm& comm = *in.comm;
  Tensor rows_R = at::zeros({comm.size()}, at::kLong);
  rows_R[comm.rank()] = in.rows();
  comm.all_reduce(rows_R);
  const Tensor all_choice = comm.all_gather(choice_TK.contiguous());
  const Queue all{all_choice, comm.all_gather(allowed_TK.to(at::kByte)).to(at::kBool), comm.all_gather(urgency_TK),
                  at::zeros({all_choice.size(0)}, at::kLong)};
  const Tensor outcome = serve(all, places_left(policy, {all_choice.size(0)}, experts, k), policy, experts);
  const int64_t before = rows_R.slice(0, 0, comm.rank()).sum().item<int64_t>();
  return outcome.slice(0, before, before + in.rows()).contiguous();
}

int64_t total_places(const CapacityPolicy& policy, const RouteInput& in, int64_t experts, int64_t k) {
  if (policy.mode == Mode_::kNone) return 0;
  if (spans_ranks(policy, in)) {
    const Tensor rows = at::full({1}, in.rows(), at::kLong);
    in.comm->all_reduce(rows);
    return in.comm->rank() == 0 ? policy.places(rows.item<int64_t>(), experts, k) * experts : 0;
  }
  int64_t total = 0;
  for (const int64_t rows : rows_per_scope(policy, in)) total += policy.places(rows, experts, k) * experts;
  return total;
}

}  // namespace moelab
