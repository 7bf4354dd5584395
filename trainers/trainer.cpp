#include "trainers/trainer.h"

#include "core/error.h"
#include "core/io/checkpoint.h"
#include "trainers/signals.h"
#include "trainers/state.h"
#include "trainers/surgery.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <csignal>

namespace moelab {
namespace {

// Names the first gradient that is not finite; called only when the norm already says there is one.
[[noreturn]] void refuse_gradient(const Model& model, int64_t step) {
  for (const NamedTensor& parameter : model.trainable()) {
    const Tensor gradient = parameter.tensor.grad();
    if (gradient.defined() && !gradient.isfinite().all().item<bool>())
      diverged_error(fmt::format("non-finite gradient of {} at step {}; nothing was updated", parameter.name, step));
  }
  diverged_error(fmt::format("the gradient norm overflows at step {}; nothing was updated", step));
}

// The experts that are not there yet, or no longer.
std::vector<bool> masked_experts(const Site& site) {
  std::vector<bool> masked(static_cast<size_t>(site.bank->experts()), false);
  const Tensor active_E = site.router->active_experts_E();
  for (size_t e = 0; active_E.defined() && e < masked.size(); ++e) masked[e] = !active_E[static_cast<int64_t>(e)].item<bool>();
  return masked;
}

// What must not move: masked experts with their router rows, and experts without a token where the config says so.
std::vector<ExpertBank::Slice> untouched_slices(const std::vector<Site*>& sites, const StepResult& result, bool skip_unused) {
  std::vector<ExpertBank::Slice> all;
  for (size_t s = 0; s < sites.size(); ++s) {
    const std::vector<bool> masked = masked_experts(*sites[s]);
    const std::vector<int64_t>& accepted = result.records[s].accepted_E;
    for (size_t e = 0; e < masked.size(); ++e) {
      const bool unused = skip_unused && e < accepted.size() && accepted[e] == 0;
      if (!masked[e] && !unused) continue;
      const std::vector<ExpertBank::Slice> slices = slices_of(*sites[s], static_cast<int64_t>(e), /*with_router=*/masked[e]);
      all.insert(all.end(), slices.begin(), slices.end());
    }
  }
  return all;
}

// Freezing is no tensor, so a checkpoint keeps it as a list of names.
std::vector<std::string> frozen_names(const Model& model) {
  std::vector<std::string> names;
  for (const NamedTensor& parameter : model.parameters())
    if (!parameter.tensor.requires_grad()) names.push_back(parameter.name);
  return names;
}

void freeze_only(const Model& model, const std::vector<std::string>& names) {
  for (const NamedTensor& parameter : model.parameters())
    parameter.tensor.requires_grad_(std::find(names.begin(), names.end(), parameter.name) == names.end());
}

Outcome outcome_of(int signal) { return signal == SIGTERM ? Outcome::kTerminated : Outcome::kInterrupted; }

}  // namespace

Observer::~Observer() = default;

Trainer::Trainer(const TrainSettings& settings, std::shared_ptr<Model> model, std::shared_ptr<const Dataset> data,
                 std::shared_ptr<Comm> comm, std::string checkpoint_root, std::vector<Observer*> observers)
    : settings_(settings), model_(std::move(model)), data_(std::move(data)), comm_(std::move(comm)),
      checkpoint_root_(std::move(checkpoint_root)), observers_(std::move(observers)),
      objective_(make_objective(settings.objective, settings.objective_options)),
      optimizer_(settings.optimizer, model_->optimised()),
      window_(model_->sites()), last_window_(window_) {}

Outcome Trainer::run() {
  Outcome outcome = Outcome::kDone;
  while (step_ < settings_.steps) {
    const double lr = learning_rate(settings_.optimizer.lr, settings_.schedule, step_, settings_.steps);
    model_->zero_grad();
    const StepResult result = compute_step(*model_, *objective_, load_micro_batches(), step_context(), settings_.bf16);
    const double norm = apply_gradients(lr, result);
    end_routers_step(result);
    const Request request = observe(result, lr, norm);
    ++step_;
    if (due(settings_.eval_every) && step_ < settings_.steps) evaluate_now(/*final=*/false);
    if (due(settings_.checkpoint_every) || request == Request::kCheckpoint) save();
    if (pending_signal() != 0) outcome = outcome_of(pending_signal());
    if (request == Request::kStop) outcome = Outcome::kStoppedByObserver;
    if (outcome != Outcome::kDone) break;
  }
  save();
  if (outcome == Outcome::kDone) evaluate_now(/*final=*/true);
  if (pending_signal() != 0) outcome = outcome_of(pending_signal());  // it came during the evaluation; all is saved
  for (Observer* observer : observers_) observer->on_end(step_);
  return outcome;
}

void Trainer::resume(const Checkpoint& checkpoint) {
  require_same_data(checkpoint, *data_);
  restore(checkpoint, *model_, optimizer_);
  freeze_only(*model_, checkpoint.content.state.at("frozen"));
  step_ = saved_step_ = checkpoint.step;
  for (Site* site : model_->sites()) site->checked_step = step_;
  tokens_ = checkpoint.content.state.at("tokens");
  window_.load(checkpoint.content.state.at("window"));
  last_window_.load(checkpoint.content.state.at("last_window"));
  if (!checkpoint_root_.empty() && comm_->rank() == 0)
    tidy_checkpoints(checkpoint_root_, step_, static_cast<int>(settings_.keep_last));
}

// This rank's part of the step's batch, cut into micro-batches. The rows of rank r and micro-batch m are the same sequences,
// with the same random keys, as in any other split.
std::vector<Batch> Trainer::load_micro_batches() const {
  const int64_t parts = comm_->size() * settings_.micro_batches;
  if (settings_.batch % parts != 0)
    usage_error(fmt::format("batch = {} cannot be split over {} ranks × {} micro-batches", settings_.batch, comm_->size(),
                            settings_.micro_batches));
  const int64_t count = settings_.batch / parts;
  std::vector<Batch> batches;
  for (int64_t m = 0; m < settings_.micro_batches; ++m) {
    const int64_t first = (comm_->rank() * settings_.micro_batches + m) * count;
    batches.push_back(with_lengths(data_->train_batch(settings_.seed, step_, first, count, settings_.batch)));
  }
  return batches;
}

StepContext Trainer::step_context() const {
  StepContext context;
  context.seed = settings_.seed;
  context.step = step_;
  context.total_steps = settings_.steps;
  context.comm = comm_.get();
  context.recompute = settings_.recompute;
  return context;
}

// Returns the gradient norm before clipping.
double Trainer::apply_gradients(double lr, const StepResult& result) {
  const std::vector<NamedTensor> parameters = model_->trainable();
  const double norm = gradient_norm(parameters);
  if (!std::isfinite(norm)) refuse_gradient(*model_, step_);
  clip_gradients(parameters, norm, settings_.clip_norm);
  optimizer_.step(lr, untouched_slices(model_->sites(), result, settings_.optimizer.skip_unused_experts));
  return norm;
}

void Trainer::end_routers_step(const StepResult& result) {
  const at::NoGradGuard no_grad;
  const std::vector<Site*> sites = model_->sites();
  for (size_t s = 0; s < sites.size(); ++s) {
    for (const Event& event : sites[s]->router->end_step(result.deltas[s], step_)) {
      apply(*sites[s], event);
      for (Observer* observer : observers_) observer->on_event(sites[s]->path, event, step_);
    }
  }
}

void Trainer::apply(Site& site, const Event& event) {
  site.checked_step = step_ + 1;
  if (event.kind == Event::Kind::kFreeze || event.kind == Event::Kind::kUnfreeze)
    for (const NamedTensor& parameter : site.router->parameters())
      for (const std::string& name : event.tensors)
        if (parameter.name == name) parameter.tensor.requires_grad_(event.kind == Event::Kind::kUnfreeze);
  if (event.kind != Event::Kind::kExpertAdded) return;  // a removed one is masked, and may come back as it was
  if (event.source >= 0) clone_expert(site, optimizer_, event.source, event.expert, event.with_moments);
  else reset_expert(site, optimizer_, event.expert, random_key(settings_.seed, "added expert").with(site.path, step_));
}

Request Trainer::observe(const StepResult& result, double lr, double norm) {
  tokens_ += result.target_tokens;
  window_.add(result, lr, norm);
  const bool flush = (step_ + 1) % settings_.log_every == 0 || step_ + 1 == settings_.steps;
  const auto probe_forward = [this](const Batch& batch, const std::vector<Assignment>* forced) {
    const at::NoGradGuard no_grad;
    StepContext context = step_context();
    context.mode = Mode::kEval;
    context.prompt = settings_.eval_prompt;
    context.forced = forced;
    return model_->forward(batch, context);
  };
  Request request = Request::kNone;
  for (Observer* observer : observers_)
    request = std::max(
        request, observer->on_step({step_, settings_.steps, tokens_, lr, norm, result, window_, flush, *model_, probe_forward}));
  if (!flush) return request;
  last_window_ = window_;
  window_.reset();
  return request;
}

void Trainer::evaluate_now(bool final) {
  const EvalSettings settings{
      final ? 0 : settings_.eval_sequences, settings_.batch, settings_.seed, step_, settings_.steps, settings_.eval_prompt};
  last_evaluation_ = evaluate(*model_, *data_, settings, *comm_);
  for (Observer* observer : observers_) observer->on_evaluation(last_evaluation_, step_, final);
}

void Trainer::save() {
  if (checkpoint_root_.empty() || saved_step_ == step_ || comm_->rank() != 0) return;
  const nlohmann::json state{{"step", step_}, {"tokens", tokens_}, {"frozen", frozen_names(*model_)},
                             {"data", data_->fingerprint()},
                             {"window", window_.save()}, {"last_window", last_window_.save()}};
  const std::string folder = write_checkpoint(
      checkpoint_root_, step_, checkpoint_content(*model_, optimizer_, state, settings_.checkpoint_trained_only),
      static_cast<int>(settings_.keep_last));
  saved_step_ = step_;
  for (Observer* observer : observers_) observer->on_checkpoint(folder, step_);
}

}  // namespace moelab
