// Properties of names: where a row stands in the batch, and which number an expert has, do not matter.
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace moelab {
namespace {

using Order = std::vector<int64_t>;  // what stands at each place now

Tensor longs(const Order& values) { return at::tensor(values, at::kLong); }

// The batch's rows in another order; each keeps its sequence, position and keys.
RouteInput rows_in_order(const RouteInput& in, const Tensor& row_T) {
  RouteInput moved = in;
  for (Tensor* rows : {&moved.x_TD, &moved.token_ids_T, &moved.segment_T, &moved.domain_T, &moved.sequence_T,
                       &moved.sequence_key_T, &moved.position_T})
    if (rows->defined()) *rows = rows->index_select(0, row_T);
  moved.cu_seqlens_B1 = Tensor();  // the sequences are interleaved
  return moved;
}

Order shuffled(int64_t count, int64_t seed) {
  Order order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(static_cast<uint64_t>(seed)));
  return order;
}

// A shuffle that leaves the rows of each sequence in their order.
Tensor interleaved(const RouteInput& in, int64_t seed) {
  const Tensor place_T = longs(shuffled(in.rows(), seed)), sequence_T = in.sequence_T.index_select(0, place_T);
  Tensor row_T = place_T.clone();
  for (int64_t b = 0; b < in.sequences; ++b) {
    const Tensor at_N = sequence_T.eq(b).nonzero().squeeze(1);
    row_T.index_copy_(0, at_N, std::get<0>(place_T.index_select(0, at_N).sort()));
  }
  return row_T;
}

void must_move_with_rows(const KitLayer& layer, const RouteInput& in, const Tensor& row_T, const std::string& how) {
  const RouteInput moved = rows_in_order(in, row_T);
  const RouteOutput there = layer.route(in), here = layer.route(moved);
  must_agree(decision_of_rows(here), decision_of_rows(there).index_select(0, row_T), 1e-10, "decisions " + how, layer.at);
  must_agree(layer.run(here, moved), layer.run(there, in).index_select(0, row_T), 1e-10, "output " + how, layer.at);
}

// Without a capacity, which serves rows in their order where nothing else is said.
void check_row_order(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const at::NoGradGuard no_grad;
    KitCase at{.mode = mode, .seed = subject.seed};
    RouteInput in = kit_input(at);
    must_move_with_rows(kit_layer(subject, at), in, interleaved(in, at.seed), "of sequences that are interleaved");
    if (!subject.facts.needs_segments) in.segment_T = Tensor();  // they rise from row to row
    must_move_with_rows(kit_layer(subject, at), in, longs(shuffled(at.rows, at.seed + 1)), "of rows that are shuffled");
    at.capacity = {.mode = CapacityPolicy::Mode::kFactor, .times_k = true};
    must_move_with_rows(kit_layer(subject, at), kit_input(at), interleaved(in, at.seed + 2),
                        "of interleaved sequences with a capacity");
  }
}

// What expert e is now, expert old_of_new[e] was: parameters and buffers of the router's, and its own.
void permute_experts(const KitLayer& layer, const Order& old_of_new) {
  const at::NoGradGuard no_grad;
  for (const Tensor& rows : layer.site.router->per_expert_tensors())
    rows.detach().copy_(rows.detach().index_select(0, longs(old_of_new)));
  layer.site.bank->permute(old_of_new);
}

// A permutation of the experts that are there.
Order new_order(const KitLayer& layer) {
  Order order = shuffled(layer.at.experts, layer.at.seed + 3);
  for (int64_t absent = layer.at.experts; absent < layer.max_experts(); ++absent) order.push_back(absent);
  return order;
}

struct Seen {
  Tensor y_TD, decision;
  int64_t slots;  // of an expert
  std::vector<double> losses;
};

Seen seen_by(const KitLayer& layer, const RouteInput& in) {
  const at::NoGradGuard no_grad;
  const RouteOutput out = layer.route(in);
  const auto* soft = std::get_if<SoftPlan>(&out.plan);
  return {layer.run(out, in), decision_of_rows(out), soft ? soft->slots_per_expert : 1, loss_values(layer, in, out)};
}

// The decision's columns are one or two blocks of one column per expert, or of one per slot, expert by expert.
Tensor columns_in_order(const Tensor& decision, const Order& old_of_new, int64_t slots) {
  const auto experts = static_cast<int64_t>(old_of_new.size());
  const Tensor blocks = decision.reshape({decision.size(0), decision.size(1) / (experts * slots), experts, slots});
  return blocks.index_select(2, longs(old_of_new)).reshape_as(decision);
}

// Draws belong to the number of an expert, so only modes without draws are asked.
void check_expert_order(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    if (mode == Mode::kTrain ? subject.facts.noisy_in_training : subject.facts.random_in_eval) continue;
    const KitCase at{.experts = 6, .mode = mode, .seed = subject.seed};
    const KitLayer layer = kit_layer(subject, at);
    const RouteInput in = kit_input(at);
    const Seen before = seen_by(layer, in);
    const Order order = new_order(layer);
    permute_experts(layer, order);
    const Seen after = seen_by(layer, in);
    must_agree(after.y_TD, before.y_TD, 1e-10, "output after experts have changed places", at);
    must_agree(after.decision, columns_in_order(before.decision, order, before.slots), 1e-10,
               "decisions after experts have changed places", at);
    for (size_t i = 0; i < before.losses.size(); ++i)
      must(std::abs(after.losses[i] - before.losses[i]) <= 1e-9 * (1 + std::abs(before.losses[i])),
           fmt::format("loss {} is {:.9g} after experts have changed places, and {:.9g} before", layer.site.losses[i].label,
                       after.losses[i], before.losses[i]),
           at);
  }
}

std::string expert_order_not_applicable(const Subject& subject) {
  if (!subject.facts.permutation_equivariant) return "its choice is tied to the numbers of the experts, by its declared facts";
  const bool draws = subject.facts.noisy_in_training && subject.facts.random_in_eval;
  return draws ? "it draws in training and in evaluation, expert by expert" : "";
}

}  // namespace

std::vector<Property> symmetry_properties() {
  return {
      {"row_order", "rows of a batch in another order are decided as before, each with its sequence and position", always_applies,
       check_row_order},
      {"expert_order", "experts that change places, with their rows of the router, change neither output nor losses",
       expert_order_not_applicable, check_expert_order},
  };
}

}  // namespace moelab
