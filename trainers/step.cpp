#include "trainers/step.h"

#include "core/error.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

// Adds the sums of every term of this scope of one forward pass; `share` is 1 / passes.
void add_totals(TermTotals& totals, const std::vector<Site*>& sites, const ModelOutput& out, double share,
                LossScope scope = LossScope::kStep) {
  for (size_t s = 0; s < out.sites.size(); ++s)
    for (const TermStatistics& found : out.sites[s].statistics)
      if (sites[s]->losses[found.term].scope == scope)
        add_statistics(totals[{s, found.term}], found.per_scope.front(), share);
}

void all_reduce_totals(TermTotals& totals, int64_t passes, Comm& comm) {
  for (auto& [key, total] : totals) {
    total.rows /= passes;
    all_reduce(total, comm);
  }
}

// Adds `more` to a total and returns what the whole step is expected to hold: the sums so far, stretched to all its rows.
LossStatistics streamed_total(LossStatistics& total, const LossStatistics& more, int64_t step_rows) {
  if (total.sums.empty()) total = {std::vector<Tensor>(more.sums.size()), 0};
  total.rows += more.rows;
  LossStatistics expected{{}, step_rows};
  const double stretch = static_cast<double>(step_rows) / static_cast<double>(std::max<int64_t>(1, total.rows));
  for (size_t i = 0; i < more.sums.size(); ++i) {
    total.sums[i] = total.sums[i].defined() ? total.sums[i].add(more.sums[i]) : more.sums[i];
    expected.sums.push_back(total.sums[i].mul(stretch));
  }
  return expected;
}

class Step {
 public:
  Step(const Model& model, const Objective& objective, const std::vector<Batch>& micro_batches, const StepContext& context,
       bool bf16)
      : model_(model),
        objective_(objective),
        micro_batches_(micro_batches),
        context_(context),
        bf16_(bf16),
        sites_(model.sites()) {}

  StepResult run() {
    count_tokens();
    if (micro_batches_.size() > 1 && has_step_scope()) sweep();
    for (const Batch& batch : micro_batches_) backward_of(batch);
    reduce_results();
    return std::move(result_);
  }

 private:
  // Target tokens and rows of the whole step, known before any forward pass.
  void count_tokens() {
    int64_t targets = 0, rows = 0;
    for (const Batch& batch : micro_batches_) {
      targets += batch.target_tokens();
      rows += model_.rows(batch);
    }
    const Tensor both = at::tensor({targets, rows}, at::kLong);
    context_.comm->all_reduce(both);
    result_.target_tokens = both[0].item<int64_t>();
    rows_ = both[1].item<int64_t>();
    result_.records.resize(sites_.size());
    result_.deltas.resize(sites_.size());
    for (const Site* site : sites_) result_.terms.emplace_back(site->losses.size());
  }

  bool has_step_scope() const {
    const auto in_step = [](const LossTerm& term) { return term.scope == LossScope::kStep && term.coefficient != 0; };
    return std::any_of(sites_.begin(), sites_.end(),
                       [&](const Site* site) { return std::any_of(site->losses.begin(), site->losses.end(), in_step); });
  }

  // First sweep, without gradient: the totals that every micro-batch's gradient refers to. The same random keys give the
  // same decisions as the second sweep.
  void sweep() {
    const at::NoGradGuard no_grad;
    const AutocastGuard autocast(bf16_);
    for (const Batch& batch : micro_batches_)
      for (const ModelOutput& out : objective_.compute(model_, batch, context_).passes) add_totals(totals_, sites_, out, share());
    finish_totals();
  }

  double share() const { return 1.0 / static_cast<double>(objective_.passes()); }

  void finish_totals() {
    all_reduce_totals(totals_, objective_.passes(), *context_.comm);
    pool_layers(totals_, sites_);
    for (const auto& [key, total] : totals_)
      gradients_[key] = statistics_gradient(*term_at(sites_, key).loss, total, router_of(key));
    swept_ = true;
  }

  const Router& router_of(const TermKey& key) const { return *sites_[pool_head(sites_, key).site]->router; }

  void backward_of(const Batch& batch) {
    ObjectiveOutput out;
    {
      const AutocastGuard autocast(bf16_);
      out = objective_.compute(model_, batch, context_);
    }
    // With one micro-batch per rank its own forward pass is the sweep: totals are reduced between forward and backward.
    if (!swept_) {
      for (const ModelOutput& pass : out.passes) add_totals(totals_, sites_, pass, share());
      if (micro_batches_.size() == 1) finish_totals();
    }
    stream(out.passes);
    Tensor loss = out.loss_sum.div(static_cast<double>(std::max<int64_t>(1, result_.target_tokens)));
    for (const ModelOutput& pass : out.passes) loss = add_terms(loss, pass);
    task_sum_ += out.task_sum;
    loss_sum_ += out.loss_sum.item<double>();
    for (const auto& [name, value] : out.metrics) result_.metrics[name] += value;
    for (const ModelOutput& pass : out.passes) add_records(pass);
    if (loss.requires_grad()) loss.backward();
  }

  // Scope "step_streaming": the gradient of this micro-batch refers to what all ranks have shown of the step so far.
  void stream(const std::vector<ModelOutput>& passes) {
    TermTotals fresh;
    for (const ModelOutput& pass : passes) add_totals(fresh, sites_, pass, share(), LossScope::kStepStreaming);
    all_reduce_totals(fresh, objective_.passes(), *context_.comm);
    for (const auto& [key, more] : fresh) {
      const LossStatistics expected = streamed_total(streamed_[key], more, rows_);
      gradients_[key] = statistics_gradient(*term_at(sites_, key).loss, expected, *sites_[key.site]->router);
    }
  }

  // Adds this pass's part of every routing loss to the loss of its micro-batch.
  Tensor add_terms(Tensor loss, const ModelOutput& pass) {
    for (size_t s = 0; s < pass.sites.size(); ++s) {
      for (const TermStatistics& found : pass.sites[s].statistics) {
        const TermKey key{s, found.term};
        const LossTerm& term = term_at(sites_, key);
        const double scale = term.coefficient * share() * sum_scale(*term.loss, result_.target_tokens);
        if (!is_local(term)) {
          if (scale != 0) loss = loss.add(inner_product(gradients_.at(key), found.per_scope.front()), scale);
        } else {
          loss = add_local_term(loss, key, found, scale);
        }
      }
    }
    return loss;
  }

  // Values of scope "micro" and "sequence" are averaged over the step by their rows.
  Tensor add_local_term(const Tensor& loss, const TermKey& key, const TermStatistics& found, double scale) {
    int64_t rows = 0;
    for (const LossStatistics& part : found.per_scope) rows += part.rows;
    const LossTerm& term = term_at(sites_, key);
    const Tensor value = local_value(term, found.per_scope, *sites_[key.site]->router);
    const double weight = row_weight(term, rows, rows_);
    result_.terms[key.site][key.term].value += value.item<double>() * weight * share();
    return scale == 0 ? loss : loss.add(value, scale * weight);
  }

  // What value() reads of a router beside the statistics has a gradient of its own, that of the whole step's value: taken
  // once, on one rank, since ranks are summed.
  void backward_of_router_reads() const {
    for (const auto& [key, total] : totals_) {
      const LossTerm& term = term_at(sites_, key);
      if (term.coefficient == 0 || !is_pool_head(sites_, key)) continue;
      const Tensor value = term.loss->value(total, router_of(key));
      if (value.requires_grad()) value.mul(term.coefficient * sum_scale(*term.loss, result_.target_tokens)).backward();
    }
  }

  void add_records(const ModelOutput& pass) {
    for (size_t s = 0; s < pass.sites.size(); ++s) {
      result_.records[s].add(pass.sites[s].record);
      for (const auto& [name, delta] : pass.sites[s].deltas) {
        Tensor& sum = result_.deltas[s][name];
        sum = sum.defined() ? sum.add(delta.detach()) : delta.detach().clone();
      }
    }
  }

  void reduce_results() {
    Comm& comm = *context_.comm;
    if (!swept_) finish_totals();  // every coefficient is 0, so no gradient waited for them: only to be reported
    totals_.merge(streamed_);  // complete now
    if (comm.rank() == 0) backward_of_router_reads();
    const at::NoGradGuard no_grad;
    for (const NamedTensor& parameter : model_.trainable()) reduce_gradient(parameter.tensor, comm);
    for (size_t s = 0; s < sites_.size(); ++s) {
      result_.records[s].all_reduce(comm);
      for (auto& [name, delta] : result_.deltas[s]) comm.all_reduce(delta);
    }
    const Tensor sums = at::tensor({task_sum_, loss_sum_}, at::kDouble);
    comm.all_reduce(sums);
    const double targets = static_cast<double>(std::max<int64_t>(1, result_.target_tokens));
    result_.task_loss = sums[0].item<double>() / targets;
    result_.total_loss = sums[1].item<double>() / targets;
    for (auto& [name, value] : result_.metrics) value = reduced(value, comm) / targets;
    read_terms(comm);
    refuse_non_finite_loss();
  }

  void reduce_gradient(const Tensor& parameter, Comm& comm) const {
    if (comm.size() == 1) return;
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
    Tensor gradient = parameter.grad().contiguous();
    comm.all_reduce(gradient);
    parameter.mutable_grad() = gradient;
  }

  static double reduced(double value, Comm& comm) {
    const Tensor tensor = at::tensor({value}, at::kDouble);
    comm.all_reduce(tensor);
    return tensor.item<double>();
  }

  void read_terms(Comm& comm) {
    for (size_t s = 0; s < sites_.size(); ++s) {
      for (size_t t = 0; t < sites_[s]->losses.size(); ++t) {
        const LossTerm& term = sites_[s]->losses[t];
        TermReading& reading = result_.terms[s][t];
        const auto total = totals_.find({s, t});
        if (total != totals_.end()) reading.value = term.loss->value(total->second, router_of({s, t})).item<double>();
        else if (is_local(term)) reading.value = reduced(reading.value, comm);
        reading.weighted = reading.value * term.coefficient * sum_scale(*term.loss, result_.target_tokens);
        if (is_pool_head(sites_, {s, t})) result_.total_loss += reading.weighted;
      }
    }
  }

  void refuse_non_finite_loss() const {
    if (std::isfinite(result_.total_loss)) return;
    std::string what = std::isfinite(result_.task_loss) ? "" : fmt::format("the task loss is {}", result_.task_loss);
    for (size_t s = 0; s < sites_.size(); ++s)
      for (size_t t = 0; t < result_.terms[s].size(); ++t)
        if (!std::isfinite(result_.terms[s][t].value) && what.empty())
          what = fmt::format("loss '{}' of {} is {}", sites_[s]->losses[t].label, sites_[s]->path, result_.terms[s][t].value);
    diverged_error(
        fmt::format("non-finite loss at step {}: {}; nothing was updated", context_.step, what.empty() ? "the total" : what));
  }

  const Model& model_;
  const Objective& objective_;
  const std::vector<Batch>& micro_batches_;
  StepContext context_;
  bool bf16_;
  std::vector<Site*> sites_;
  StepResult result_;
  TermTotals totals_;
  TermTotals streamed_;  // over all ranks, of the micro-batches so far
  std::map<TermKey, std::vector<Tensor>> gradients_;
  bool swept_ = false;
  int64_t rows_ = 0;
  double task_sum_ = 0;
  double loss_sum_ = 0;
};

}  // namespace

StepResult compute_step(const Model& model, const Objective& objective, const std::vector<Batch>& micro_batches,
                        const StepContext& context, bool bf16) {
  return Step(model, objective, micro_batches, context, bf16).run();
}

AutocastGuard::AutocastGuard(bool on) : on_(on) {
  if (!on_) return;
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
}

AutocastGuard::~AutocastGuard() {
  if (!on_) return;
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
}

}  // namespace moelab
