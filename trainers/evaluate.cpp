#include "trainers/evaluate.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moelab {
namespace {

// Sums over sequences that the final ratios are formed from.
struct EvalSums {
  int64_t tokens = 0, right = 0;
  double loss = 0;
  std::vector<RoutingRecord> records;
  std::vector<std::vector<LossStatistics>> terms;

  explicit EvalSums(const std::vector<Site*>& sites) : records(sites.size()) {
    for (const Site* site : sites) terms.emplace_back(site->losses.size());
  }

  void add(const ModelOutput& out, const Batch& batch) {
    const Tensor counted_BL = batch.targets_BL.ge(0);
    tokens += counted_BL.sum().item<int64_t>();
    right += out.logits_BLV.argmax(-1).eq(batch.targets_BL).logical_and(counted_BL).sum().item<int64_t>();
    loss += cross_entropy_sum(out.logits_BLV, batch.targets_BL).item<double>();
    for (size_t s = 0; s < out.sites.size(); ++s) {
      records[s].add(out.sites[s].record);
      for (const TermStatistics& term : out.sites[s].statistics)
        for (const LossStatistics& part : term.per_scope) add_statistics(terms[s][term.term], part);
    }
  }

  static void add_statistics(LossStatistics& total, const LossStatistics& part) {
    if (total.sums.empty())
      for (const Tensor& sum : part.sums) total.sums.push_back(at::zeros_like(sum));
    for (size_t i = 0; i < part.sums.size(); ++i) total.sums[i].add_(part.sums[i]);
    total.rows += part.rows;
  }

  void all_reduce(Comm& comm) {
    if (comm.size() == 1) return;
    const Tensor counts = at::tensor({tokens, right}, at::kLong), sums = at::tensor({loss}, at::kDouble);
    comm.all_reduce(counts);
    comm.all_reduce(sums);
    tokens = counts[0].item<int64_t>();
    right = counts[1].item<int64_t>();
    loss = sums.item<double>();
    for (RoutingRecord& record : records) record.all_reduce(comm);
    for (std::vector<LossStatistics>& site : terms)
      for (LossStatistics& total : site) all_reduce(total, comm);
  }

  static void all_reduce(LossStatistics& total, Comm& comm) {
    for (const Tensor& sum : total.sums) comm.all_reduce(sum);
    const Tensor rows = at::tensor({total.rows}, at::kLong);
    comm.all_reduce(rows);
    total.rows = rows.item<int64_t>();
  }

  // Sums of zero, in the shapes that this forward pass shows: for a rank that may get no batch of its own.
  void take_shapes(const ModelOutput& out) {
    for (size_t s = 0; s < out.sites.size(); ++s) {
      records[s].experts = out.sites[s].record.experts;
      records[s].chosen_E.resize(out.sites[s].record.chosen_E.size());
      records[s].accepted_E.resize(out.sites[s].record.accepted_E.size());
      for (const TermStatistics& term : out.sites[s].statistics)
        for (const Tensor& sum : term.per_scope.front().sums) terms[s][term.term].sums.push_back(at::zeros_like(sum));
    }
  }
};

}  // namespace

Batch to_batch(const TokenBatch& tokens) {
  Batch batch{tokens.tokens_BL, tokens.targets_BL, {}, tokens.sequence_B, tokens.domain_B};
  const Tensor counted_BL = tokens.targets_BL.ge(0);
  if (counted_BL.all().item<bool>()) return batch;
  const Tensor place_L = at::arange(1, tokens.targets_BL.size(1) + 1, at::kLong);
  batch.length_B = std::get<0>(counted_BL.to(at::kLong).mul(place_L).max(1));
  return batch;
}

Evaluation evaluate(const Model& model, const Dataset& data, int64_t sequences, int64_t batch, int64_t seed, Comm& comm) {
  const at::NoGradGuard no_grad;
  const int64_t available = data.eval_sequences();
  const int64_t count = sequences == 0 ? available : std::min(sequences, available);
  const std::vector<Site*> sites = model.sites();
  EvalSums sums(sites);
  StepContext context;
  context.mode = Mode::kEval;
  context.seed = seed;
  const std::shared_ptr<Comm> alone = single_comm();
  context.comm = alone.get();  // ranks evaluate different numbers of batches: no collective inside
  if (comm.size() > 1) sums.take_shapes(model.forward(to_batch(data.eval_batch(0, 1)), context));
  for (int64_t first = comm.rank() * batch; first < count; first += comm.size() * batch) {
    const Batch rows = to_batch(data.eval_batch(first, std::min(batch, count - first)));
    sums.add(model.forward(rows, context), rows);
  }
  sums.all_reduce(comm);
  Evaluation out;
  const double tokens = static_cast<double>(std::max<int64_t>(1, sums.tokens));
  out.tokens = sums.tokens;
  out.loss = sums.loss / tokens;
  out.bits_per_byte = out.loss / std::numbers::ln2 / data.bytes_per_token();
  out.accuracy = static_cast<double>(sums.right) / tokens;
  out.labels = site_labels(sites);
  out.records = sums.records;
  for (size_t s = 0; s < sites.size(); ++s) {
    out.terms.emplace_back();
    for (size_t t = 0; t < sums.terms[s].size(); ++t) {
      const LossTerm& term = sites[s]->losses[t];
      out.terms[s].push_back(sums.terms[s][t].sums.empty() ? 0 : term.loss->value(sums.terms[s][t], *sites[s]->router).item<double>());
    }
  }
  return out;
}

std::vector<std::string> site_labels(const std::vector<Site*>& sites) {
  std::vector<std::string> labels;
  for (const Site* site : sites) {
    const auto same_block = [&](const Site* other) { return other->layer == site->layer; };
    std::string label = fmt::format("layer.{}", site->layer);
    if (std::count_if(sites.begin(), sites.end(), same_block) > 1) label += "." + site->path.substr(site->path.rfind('.') + 1);
    labels.push_back(label);
  }
  return labels;
}

}  // namespace moelab
