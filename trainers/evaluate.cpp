#include "trainers/evaluate.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moelab {
namespace {

// Only what comes after the prompt is scored. The prompt's last row predicts the first token of it.
Tensor after_prompt(const Tensor& targets_BL, int64_t prompt) {
  if (prompt == 0) return targets_BL;
  Tensor scored_BL = targets_BL.clone();
  scored_BL.narrow(1, 0, std::min(prompt - 1, scored_BL.size(1))).fill_(-1);
  return scored_BL;
}

// Values of scope "micro" and "sequence": their sum weighted by rows, or their sum alone for losses that are sums.
struct LocalSum {
  double value = 0;
  int64_t rows = 0;
};

// Sums over sequences that the final ratios are formed from.
struct EvalSums {
  const std::vector<Site*>& sites;
  int64_t tokens = 0, right = 0;  // scored
  int64_t targets = 0;            // scored or not: what sums over rows are divided by
  double loss = 0, bytes = 0;
  std::vector<RoutingRecord> records;
  TermTotals totals;                   // of scope "step"
  std::map<TermKey, LocalSum> locals;  // of the others

  explicit EvalSums(const std::vector<Site*>& all) : sites(all), records(all.size()) {}

  void add(const ModelOutput& out, const Batch& batch, const Tensor& scored_BL) {
    const Tensor counted_BL = scored_BL.ge(0);
    targets += batch.target_tokens();
    tokens += counted_BL.sum().item<int64_t>();
    right += out.logits_BLV.argmax(-1).eq(scored_BL).logical_and(counted_BL).sum().item<int64_t>();
    loss += cross_entropy_sum(out.logits_BLV, scored_BL).item<double>();
    for (size_t s = 0; s < out.sites.size(); ++s) {
      records[s].add(out.sites[s].record);
      for (const TermStatistics& found : out.sites[s].statistics) add_term({s, found.term}, found.per_scope);
    }
  }

  void add_term(const TermKey& key, const std::vector<LossStatistics>& per_scope) {
    const LossTerm& term = term_at(sites, key);
    if (!is_local(term)) return add_statistics(totals[key], per_scope.front(), 1);
    int64_t rows = 0;
    for (const LossStatistics& part : per_scope) rows += part.rows;
    const double value = local_value(term, per_scope, *sites[key.site]->router).item<double>();
    locals[key].value += value * (adds_up(term) ? 1 : static_cast<double>(rows));
    locals[key].rows += rows;
  }

  void all_reduce(Comm& comm) {
    if (comm.size() == 1) return;
    const Tensor counts = at::tensor({tokens, right, targets}, at::kLong), sums = at::tensor({loss, bytes}, at::kDouble);
    comm.all_reduce(counts);
    comm.all_reduce(sums);
    tokens = counts[0].item<int64_t>();
    right = counts[1].item<int64_t>();
    targets = counts[2].item<int64_t>();
    loss = sums[0].item<double>();
    bytes = sums[1].item<double>();
    for (RoutingRecord& record : records) record.all_reduce(comm);
    for (auto& [key, total] : totals) moelab::all_reduce(total, comm);
    for (auto& [key, local] : locals) all_reduce(local, comm);
  }

  static void all_reduce(LocalSum& local, Comm& comm) {
    const Tensor value = at::tensor({local.value}, at::kDouble), rows = at::tensor({local.rows}, at::kLong);
    comm.all_reduce(value);
    comm.all_reduce(rows);
    local = {value.item<double>(), rows.item<int64_t>()};
  }

  // Sums of zero, in the shapes that this forward pass shows: for a rank that may get no batch of its own.
  void take_shapes(const ModelOutput& out) {
    for (size_t s = 0; s < out.sites.size(); ++s) {
      RoutingRecord& record = records[s];
      const RoutingRecord& shown = out.sites[s].record;
      record.experts = shown.experts;
      record.active_E.resize(shown.active_E.size());
      record.chosen_E.resize(shown.chosen_E.size());
      record.accepted_E.resize(shown.accepted_E.size());
      record.weight_E.resize(shown.weight_E.size());
      for (const TermStatistics& found : out.sites[s].statistics) take_shapes({s, found.term}, found.per_scope.front());
    }
  }

  void take_shapes(const TermKey& key, const LossStatistics& shown) {
    if (is_local(term_at(sites, key))) locals[key] = {};
    else for (const Tensor& sum : shown.sums) totals[key].sums.push_back(at::zeros_like(sum));
  }

  double value_of(const TermKey& key) const {
    const LossTerm& term = term_at(sites, key);
    if (const auto total = totals.find(key); total != totals.end())
      return term.loss->value(total->second, *sites[pool_head(sites, key).site]->router).item<double>();
    const auto local = locals.find(key);
    if (local == locals.end()) return 0;  // an evaluation of no sequence
    const auto& [value, rows] = local->second;
    return adds_up(term) ? value : value / static_cast<double>(std::max<int64_t>(1, rows));
  }

  TermReading reading(const TermKey& key) const {
    const LossTerm& term = term_at(sites, key);
    const double value = value_of(key);
    return {value, value * term.coefficient * sum_scale(*term.loss, targets)};
  }
};

StepContext eval_context(const EvalSettings& settings, Comm& comm) {
  StepContext context;
  context.mode = Mode::kEval;
  context.seed = settings.seed;
  context.step = settings.step;
  context.total_steps = settings.total_steps;
  context.prompt = settings.prompt;
  context.comm = &comm;
  return context;
}

EvalSums sums_of(const Model& model, const std::vector<Site*>& sites, const Dataset& data, const EvalSettings& settings,
                 Comm& comm) {
  const std::shared_ptr<Comm> alone = single_comm();  // ranks evaluate different numbers of batches: no collective inside
  const StepContext context = eval_context(settings, *alone);
  const int64_t available = data.eval_sequences();
  const int64_t count = settings.sequences == 0 ? available : std::min(settings.sequences, available);
  EvalSums sums(sites);
  if (comm.size() > 1) sums.take_shapes(model.forward(with_lengths(data.eval_batch(0, 1)), context));
  for (int64_t first = comm.rank() * settings.batch; first < count; first += comm.size() * settings.batch) {
    const Batch rows = with_lengths(data.eval_batch(first, std::min(settings.batch, count - first)));
    const Tensor scored_BL = after_prompt(rows.targets_BL, settings.prompt);
    sums.add(model.forward(rows, context), rows, scored_BL);
    sums.bytes += data.bytes_of(scored_BL);
  }
  sums.all_reduce(comm);
  pool_layers(sums.totals, sites);
  return sums;
}

}  // namespace

Evaluation evaluate(const Model& model, const Dataset& data, const EvalSettings& settings, Comm& comm) {
  const at::NoGradGuard no_grad;
  const std::vector<Site*> sites = model.sites();
  const EvalSums sums = sums_of(model, sites, data, settings, comm);
  if (sums.tokens == 0 && settings.prompt > 0)
    usage_error(fmt::format("[eval] prompt = {} leaves no validation token to score; make it smaller", settings.prompt));
  Evaluation out;
  out.prompt = settings.prompt;
  const double tokens = static_cast<double>(std::max<int64_t>(1, sums.tokens));
  out.tokens = sums.tokens;
  out.loss = sums.loss / tokens;
  out.bytes = sums.bytes;
  out.bits_per_byte = out.loss / std::numbers::ln2 * (tokens / sums.bytes);
  out.accuracy = static_cast<double>(sums.right) / tokens;
  out.labels = site_labels(sites);
  out.records = sums.records;
  out.term_labels.resize(sites.size());
  out.terms.resize(sites.size());
  for (size_t s = 0; s < sites.size(); ++s)
    for (size_t t = 0; t < sites[s]->losses.size(); ++t) {
      out.term_labels[s].push_back(sites[s]->losses[t].label);
      out.terms[s].push_back(sums.reading({s, t}));
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
