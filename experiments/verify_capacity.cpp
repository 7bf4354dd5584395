// Properties of drops: what was chosen is kept, dropped or refused, and the right pairs fit.
#include "experiments/verify_case.h"

#include <ATen/ops/equal.h>

#include <fmt/format.h>

namespace moelab {
namespace {

constexpr int kCapacityCases = 12;

// Where experts choose rows, the capacity is what they choose by.
bool chooses_by_capacity(const Subject& subject, Mode mode) {
  return subject.facts.capacity_is_choice && !decides_row_by_row(subject, mode);
}

std::string capacity_not_applicable(const Subject& subject) {
  const std::string reason = needs_choices(subject);
  if (!reason.empty() || !chooses_by_capacity(subject, Mode::kTrain) || !chooses_by_capacity(subject, Mode::kEval)) return reason;
  return "its experts choose rows, as many as the capacity says: nothing is dropped";
}

// A case with a random policy, in a mode in which the choice does not depend on the capacity, where there is one.
KitCase capacity_case(const Subject& subject, std::mt19937_64& draw) {
  KitCase at{
      .rows = pick(draw, 0, 40), .sequences = pick(draw, 1, 4), .capacity = random_capacity(draw), .seed = pick(draw, 0, 999)};
  at.mode = pick(draw, 0, 1) == 0 ? Mode::kTrain : Mode::kEval;
  if (chooses_by_capacity(subject, at.mode)) at.mode = at.mode == Mode::kTrain ? Mode::kEval : Mode::kTrain;
  if (subject.facts.plan_in(at.mode) != PlanForm::kSparse) at.mode = Mode::kTrain;
  return at;
}

std::vector<int64_t> count_pairs(const Tensor& choice_TK, const Tensor& counted_TK, int64_t experts) {
  std::vector<int64_t> counts(experts, 0);
  for (int64_t t = 0; t < choice_TK.size(0); ++t)
    for (int64_t k = 0; k < choice_TK.size(1); ++k)
      if (counted_TK[t][k].item<bool>()) ++counts[choice_TK[t][k].item<int64_t>()];
  return counts;
}

// What is dropped with a capacity is what is kept without one, and losses do not know of it.
void check_drops(const Subject& subject, const KitCase& at, const RouteInput& in, const KitLayer& layer, const RouteOutput& out) {
  KitCase free = at;
  free.capacity = {};
  const KitLayer roomy = kit_layer(subject, free);
  const RouteOutput whole = roomy.route(in);
  const Assignment &some = out.assignment, &all = whole.assignment;
  const std::vector<double> losses = loss_values(layer, in, out), expected = loss_values(roomy, in, whole);
  for (size_t i = 0; i < losses.size(); ++i)
    must(losses[i] == expected[i], fmt::format("loss {} depends on what is dropped", layer.site.losses[i].label), at);
  must(at::equal(all.choice_TK, some.choice_TK), "the capacity changes what is chosen", at);
  must(!all.dropped_TK.any().item<bool>(), "pairs are dropped without a capacity", at);
  must(at::equal(all.kept_TK, some.kept_TK.logical_or(some.dropped_TK)),
       "kept and dropped pairs are not those that are kept without a capacity", at);
}

void check_conserved_once(const Subject& subject, const KitCase& at) {
  const RouteInput in = kit_input(at);
  const KitLayer layer = kit_layer(subject, at);
  const RouteOutput out = layer.route(in);
  const Assignment& some = out.assignment;
  if (!chooses_by_capacity(subject, at.mode)) check_drops(subject, at, in, layer, out);
  must(!some.kept_TK.logical_and(some.dropped_TK).any().item<bool>(), "a pair is both kept and dropped", at);
  const RoutingRecord record = record_of(in, out, layer.max_experts());
  must(record.chosen_E == count_pairs(some.choice_TK, some.kept_TK.logical_or(some.dropped_TK), layer.max_experts()),
       "pairs per expert are not counted before the drops", at);
  must(record.accepted_E == count_pairs(some.choice_TK, some.kept_TK, layer.max_experts()),
       "accepted pairs per expert are counted wrongly", at);
  const auto& plan = std::get<SparsePlan>(out.plan);
  must(plan.token_N.numel() == some.kept_TK.sum().item<int64_t>(), "the plan holds other pairs than those kept", at);
  must(plan.dropped_token_M.numel() == some.dropped_TK.sum().item<int64_t>(), "the plan lists other drops than those made", at);
}

void check_conserved(const Subject& subject) {
  std::mt19937_64 draw(subject.seed);
  for (int i = 0; i < kCapacityCases; ++i) check_conserved_once(subject, capacity_case(subject, draw));
}

// Places left of (scope, expert), and the rule that a pair takes one while there is one.
class Places {
 public:
  Places(const KitCase& at, const RouteInput& in, int64_t experts, int64_t k)
      : in_(in), per_sequence_(at.capacity.scope == CapacityPolicy::Scope::kSequence) {
    for (int64_t scope = 0; scope < (per_sequence_ ? in.sequences : 1); ++scope) {
      const int64_t rows = per_sequence_ ? in.sequence_T.eq(scope).sum().item<int64_t>() : in.rows();
      left_.emplace_back(experts, at.capacity.places(rows, experts, k));
    }
  }
  int64_t& left(int64_t row, int64_t expert) { return left_[per_sequence_ ? in_.sequence_T[row].item<int64_t>() : 0][expert]; }
  bool take(int64_t row, int64_t expert) { return left(row, expert)-- > 0; }

 private:
  const RouteInput& in_;
  bool per_sequence_;
  std::vector<std::vector<int64_t>> left_;
};

// Position order by plain loops: all first choices before all second ones, or row by row.
void check_served_by_position(const RouteInput& in, const Assignment& assignment, const KitCase& at, int64_t experts) {
  const int64_t rows = in.rows(), choices = assignment.choice_TK.size(1);
  const bool by_rank = at.capacity.order == CapacityPolicy::Order::kChoiceMajor;
  Places places(at, in, experts, choices);
  for (int64_t i = 0; i < rows * choices; ++i) {
    const int64_t t = by_rank ? i % rows : i / choices, k = by_rank ? i / rows : i % choices;
    const bool kept = assignment.kept_TK[t][k].item<bool>();
    if (!kept && !assignment.dropped_TK[t][k].item<bool>()) continue;  // refused, or no choice
    must(places.take(t, assignment.choice_TK[t][k].item<int64_t>()) == kept,
         fmt::format("choice {} of row {} is served out of turn", k, t), at);
  }
}

// Whatever the order: nobody exceeds the places, and nobody is dropped while one is free.
void check_full_use(const RouteInput& in, const Assignment& assignment, const KitCase& at, int64_t experts) {
  Places places(at, in, experts, assignment.choice_TK.size(1));
  const auto each = [&](const Tensor& marked_TK, const auto& visit) {
    for (int64_t t = 0; t < in.rows(); ++t)
      for (int64_t k = 0; k < assignment.choice_TK.size(1); ++k)
        if (marked_TK[t][k].item<bool>()) visit(t, assignment.choice_TK[t][k].item<int64_t>());
  };
  each(assignment.kept_TK,
       [&](int64_t t, int64_t e) { must(places.take(t, e), fmt::format("expert {} takes more than its places", e), at); });
  each(assignment.dropped_TK, [&](int64_t t, int64_t e) {
    must(places.left(t, e) == 0, fmt::format("row {} is dropped while expert {} has a free place", t, e), at);
  });
}

void check_capacity(const Subject& subject) {
  std::mt19937_64 draw(subject.seed + 1);
  for (int i = 0; i < kCapacityCases; ++i) {
    KitCase at = capacity_case(subject, draw);
    if (i % 2 == 0) at.capacity.priority = CapacityPolicy::Priority::kPosition;
    const RouteInput in = kit_input(at);
    const KitLayer layer = kit_layer(subject, at);
    const Assignment assignment = layer.route(in).assignment;
    check_full_use(in, assignment, at, layer.max_experts());
    if (at.capacity.priority == CapacityPolicy::Priority::kPosition)
      check_served_by_position(in, assignment, at, layer.max_experts());
  }
}

}  // namespace

std::vector<Property> capacity_properties() {
  return {
      {"conserved", "kept, dropped and refused pairs are the chosen ones; losses and counters take them before the drops",
       needs_choices, check_conserved},
      {"capacity", "no expert takes more than its places or leaves one empty; rows are served in the order of the policy",
       capacity_not_applicable, check_capacity},
  };
}

}  // namespace moelab
