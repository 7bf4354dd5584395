// Micro-batches and ranks: counters, exact step-scope losses and gradients do not depend on how a batch is cut.
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

namespace moelab {
namespace {

constexpr double kSplitTolerance = 1e-11;

// What a step leaves behind, however it was cut.
struct StepResult {
  std::map<std::string, Tensor> gradients;  // x, the router, the experts
  std::map<std::string, Tensor> deltas;
  std::vector<Tensor> losses;
  RoutingRecord record;
};

// One pass over one part.
struct PartPass {
  RouteOutput routed;
  Tensor task;  // Σ y·grad_y of its rows
  std::vector<LossStatistics> statistics;
};

PartPass pass_over(const KitLayer& layer, const KitPart& part, const Tensor& grad_y_TD, Execution execution) {
  PartPass pass{layer.route(part.in), {}, {}};
  pass.task = layer.run(pass.routed, part.in, execution).mul(grad_y_TD.index_select(0, part.row_T)).sum();
  for (TermStatistics& term : term_statistics(layer.site, part.in, pass.routed))
    pass.statistics.push_back(term.per_scope.front());
  return pass;
}

void add_statistics(std::vector<LossStatistics>& total, const std::vector<LossStatistics>& more) {
  if (total.empty()) {
    total = more;
    return;
  }
  for (size_t i = 0; i < total.size(); ++i) {
    for (size_t s = 0; s < total[i].sums.size(); ++s) total[i].sums[s] = total[i].sums[s].add(more[i].sums[s]);
    total[i].rows += more[i].rows;
  }
}

void note_pass(StepResult& result, const KitLayer& layer, const KitPart& part, const PartPass& pass) {
  result.record.add(record_of(part.in, pass.routed, layer.site.router->spec().max_experts));
  for (const auto& [name, delta] : pass.routed.deltas) {
    const auto there = result.deltas.find(name);
    result.deltas[name] = there == result.deltas.end() ? delta.clone() : there->second.add(delta);
  }
}

void note_losses(StepResult& result, const KitLayer& layer, const std::vector<LossStatistics>& total) {
  for (size_t i = 0; i < total.size(); ++i)
    result.losses.push_back(layer.site.losses[i].loss->value(total[i], *layer.site.router).detach());
}

void note_gradients(StepResult& result, const KitLayer& layer, const Tensor& x_TD) {
  result.gradients = gradients_of(layer);
  result.gradients["x"] = x_TD.grad().defined() ? x_TD.grad() : at::zeros_like(x_TD);
}

// One graph over all parts, each evaluated by the reference executor; the losses of the summed statistics.
StepResult in_one_graph(const KitLayer& layer, const RouteInput& in, const std::vector<KitPart>& parts,
                        const Tensor& grad_y_TD) {
  StepResult result;
  std::vector<LossStatistics> total;
  Tensor scalar = at::full({}, 0, grad_y_TD.options());
  for (const KitPart& part : parts) {
    const PartPass pass = pass_over(layer, part, grad_y_TD, Execution::kReference);
    add_statistics(total, pass.statistics);
    scalar = scalar.add(pass.task);
    note_pass(result, layer, part, pass);
  }
  for (size_t i = 0; i < total.size(); ++i) scalar = scalar.add(layer.site.losses[i].loss->value(total[i], *layer.site.router));
  scalar.backward();
  note_losses(result, layer, total);
  note_gradients(result, layer, in.x_TD);
  return result;
}

// A sweep without gradient, over this rank's parts and then over the ranks.
std::vector<LossStatistics> swept_statistics(const KitLayer& layer, const std::vector<KitPart>& parts, const Tensor& grad_y_TD,
                                             Comm& comm) {
  const at::NoGradGuard no_grad;
  std::vector<LossStatistics> total;
  for (const KitPart& part : parts) add_statistics(total, pass_over(layer, part, grad_y_TD, Execution::kAuto).statistics);
  for (LossStatistics& one : total) {
    for (Tensor& sum : one.sums) comm.all_reduce(sum = sum.contiguous());
    const Tensor rows = at::full({1}, one.rows, at::kLong);
    comm.all_reduce(rows);
    one.rows = rows.item<int64_t>();
  }
  return total;
}

// What the trainer does: ⟨∂value/∂S, S_m⟩ in each micro-batch's backward, gradients summed over micro-batches and ranks.
StepResult in_parts(const KitLayer& layer, const RouteInput& in, const std::vector<KitPart>& parts, const Tensor& grad_y_TD,
                    Comm& comm) {
  StepResult result;
  const std::vector<LossStatistics> total = swept_statistics(layer, parts, grad_y_TD, comm);
  for (const KitPart& part : parts) {
    const PartPass pass = pass_over(layer, part, grad_y_TD, Execution::kAuto);
    Tensor scalar = pass.task;
    for (size_t i = 0; i < total.size(); ++i) {
      const LossTerm& term = layer.site.losses[i];
      scalar = scalar.add(inner_product(statistics_gradient(*term.loss, total[i], *layer.site.router), pass.statistics[i]));
    }
    scalar.backward();
    note_pass(result, layer, part, pass);
  }
  note_losses(result, layer, total);
  note_gradients(result, layer, in.x_TD);
  for (auto* sums : {&result.gradients, &result.deltas})
    for (auto& [name, tensor] : *sums) comm.all_reduce(tensor = tensor.contiguous());
  result.record.all_reduce(comm);
  return result;
}

void must_equal_step(const StepResult& found, const StepResult& whole, const std::string& how, const KitLayer& layer,
                     const KitCase& at) {
  must_equal(found.record, whole.record, "counters " + how, at);
  for (size_t i = 0; i < whole.losses.size(); ++i)
    must_agree(found.losses[i], whole.losses[i], kSplitTolerance, "loss " + layer.site.losses[i].label + " " + how, at);
  double scale = 1e-30;  // of all gradients: the router's may cancel to nothing
  for (const auto& [name, gradient] : whole.gradients) scale = std::max(scale, gradient.abs().max().item<double>());
  for (const auto& [name, gradient] : whole.gradients)
    must(found.gradients.at(name).sub(gradient).abs().max().item<double>() <= kSplitTolerance * scale,
         "gradient of " + name + " " + how + " differs", at);
  must(found.deltas.size() == whole.deltas.size(), "deltas " + how + " differ in number", at);
  for (const auto& [name, delta] : whole.deltas)
    must_agree(found.deltas.at(name), delta, kSplitTolerance, "delta " + name + " " + how, at);
}

// The reference: the batch in one piece where rows decide for themselves, else each micro-batch by itself.
void check_micro_batches_at(const Subject& subject, const KitCase& at, int64_t parts) {
  const bool whole = decides_row_by_row(subject, at.mode);
  const KitLayer layer = kit_layer(subject, at);
  const Tensor grad_y_TD = kit_grad_y(at);
  const RouteInput once = kit_input(at), cut = kit_input(at);
  const StepResult expected = in_one_graph(layer, once, split_in(once, whole ? 1 : parts), grad_y_TD);
  layer.zero_grad();
  const StepResult found = in_parts(layer, cut, split_in(cut, parts), grad_y_TD, *cut.comm);
  must_equal_step(found, expected, fmt::format("in {} micro-batches", parts), layer, at);
}

std::vector<KitCase> split_cases(const Subject& subject) {
  std::vector<KitCase> cases;
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    for (const auto capacity : {CapacityPolicy::Mode::kNone, CapacityPolicy::Mode::kFactor})  // places are counted per sequence
      cases.push_back({.rows = 31, .sequences = 6, .capacity = {.mode = capacity}, .mode = mode, .seed = subject.seed});
  return cases;
}

void check_micro_batches(const Subject& subject) {
  for (const KitCase& at : split_cases(subject)) check_micro_batches_at(subject, at, at.mode == Mode::kTrain ? 4 : 2);
}

// This rank's half of the sequences, in two micro-batches where they may be cut.
std::vector<KitPart> parts_of_rank(const RouteInput& in, Comm& comm, bool cut) {
  const KitPart mine = split_in(in, comm.size())[static_cast<size_t>(comm.rank())];
  std::vector<KitPart> parts{mine};
  if (cut) {
    const int64_t first = comm.rank() * in.sequences / comm.size(), last = (comm.rank() + 1) * in.sequences / comm.size();
    parts = {sequences_of(in, first, (first + last) / 2), sequences_of(in, (first + last) / 2, last)};
  }
  for (KitPart& part : parts) part.in.comm = &comm;
  return parts;
}

void check_thread_ranks_at(const Subject& subject, const KitCase& at) {
  constexpr int ranks = 2;
  const bool alone = decides_row_by_row(subject, at.mode);
  const bool whole = alone || subject.facts.needs_global_batch;
  const KitLayer layer = kit_layer(subject, at);
  const Tensor grad_y_TD = kit_grad_y(at);
  const RouteInput once = kit_input(at);
  const StepResult expected = in_one_graph(layer, once, split_in(once, whole ? 1 : ranks), grad_y_TD);
  std::vector<StepResult> found(ranks);
  run_on_threads(ranks, [&](std::shared_ptr<Comm> comm) {
    const KitLayer own = kit_layer(subject, at);
    const RouteInput in = kit_input(at);
    found[static_cast<size_t>(comm->rank())] = in_parts(own, in, parts_of_rank(in, *comm, alone), grad_y_TD, *comm);
  });
  for (const StepResult& rank : found) must_equal_step(rank, expected, "over 2 thread ranks", layer, at);
}

void check_thread_ranks(const Subject& subject) {
  for (const KitCase& at : split_cases(subject)) check_thread_ranks_at(subject, at);
}

std::string ranks_not_applicable(const Subject& subject) {
  return subject.facts.mixes_ranks ? "its ranks decide over rows dealt out among them, so their number matters" : "";
}

}  // namespace

std::vector<Property> split_properties() {
  return {
      {"micro_batches",
       "micro-batches leave counters, exact step-scope losses and gradients as they are (or as each micro-batch alone)",
       always_applies, check_micro_batches},
      {"thread_ranks", "the same over 2 ranks", ranks_not_applicable, check_thread_ranks},
  };
}

}  // namespace moelab
