// The losses at their landmarks: decisions in perfect balance and in collapse, made by hand.
#include "experiments/verify_case.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

// A layer of `experts` rows of parameters, `active` of them there, and rows that make `k` choices. The landmarks are asked at
// `said`: k, or 0 where the router says that it varies.
struct LandmarkCase {
  int64_t active, experts, k, said;
};

// Row t chooses first(t), first(t)+1, … of the active experts in a circle, with gates 1/k.
RouteOutput landmark_decision(const Tensor& first_T, const LandmarkCase& at, const Tensor& logits_TE) {
  RouteOutput out;
  const Tensor choice_TK = first_T.unsqueeze(1).add(at::arange(at.k, at::kLong)).remainder(at.active);
  out.assignment = {choice_TK, at::ones_like(choice_TK, at::kBool), at::zeros_like(choice_TK, at::kBool)};
  out.gate_TK = at::full(choice_TK.sizes(), 1.0 / static_cast<double>(at.k), at::kDouble);
  out.plan = make_sparse_plan(out.assignment, out.gate_TK, at.experts);
  const Tensor probability_TE = logits_TE.softmax(1);
  out.scores = {logits_TE, probability_TE, probability_TE, logits_TE, logits_TE, {}};
  out.statistics["distilled"] = logits_TE;  // a distilled router that agrees
  out.k = at.said;
  return out;
}

// Logits of 0 for the first `likely` experts, out of reach for the others.
Tensor landmark_logits(const LandmarkCase& at, int64_t likely) {
  const Tensor logits_TE = at::full({at.active, at.experts}, -1e9, at::kDouble);
  logits_TE.slice(1, 0, likely).fill_(0);
  return logits_TE;
}

RouteOutput balanced(const LandmarkCase& at) {
  return landmark_decision(at::arange(at.active, at::kLong), at, landmark_logits(at, at.active));
}

RouteOutput collapsed(const LandmarkCase& at) {
  return landmark_decision(at::zeros({at.active}, at::kLong), at, landmark_logits(at, at.k));
}

// Of a sum: per row.
double loss_value(const Loss& loss, const RouteInput& in, const RouteOutput& out, const Router& router, int64_t experts) {
  const auto statistics = collect_statistics(loss, LossScope::kStep, {in, out, router, experts});
  const double value = loss.value(statistics.front(), router).item<double>();
  return loss.reduces_by_sum() ? value / static_cast<double>(in.rows()) : value;
}

// NaN: there is no landmark.
void must_hit(double found, double landmark, const std::string& what, const KitCase& at) {
  if (std::isnan(landmark)) return;
  must(std::abs(found - landmark) <= 1e-9 * (1 + std::abs(landmark)),
       fmt::format("loss {} is {:.9g}, its landmark says {:.9g}", what, found, landmark), at);
}

// A loss as the router's paper has it or with its defaults, and with each other choice alone.
struct NamedLoss {
  std::string label;
  std::shared_ptr<const Loss> loss;
};

std::vector<NamedLoss> landmark_losses(const Subject& subject) {
  std::vector<NamedLoss> all;
  for (const LossTerm& term : attachable_losses(subject.entry, subject.facts)) all.push_back({term.label, term.loss});
  for (const LossEntry& entry : Registry<LossEntry>::instance().all()) {
    if (entry.refuses && !entry.refuses(subject.facts).empty()) continue;
    for (const OptionSpec& spec : entry.options)
      for (const OptionValue& value : other_values(spec)) {
        Options options(entry.options);
        options.set(spec, value);
        const std::string label = fmt::format("{} with {} = {}", entry.name, spec.name, to_text(value));
        all.push_back({label, entry.make(options, subject.entry)});
      }
  }
  return all;
}

// How many choices rows may make, of `active` experts.
std::vector<int64_t> choices_of_rows(const Subject& subject, int64_t active) {
  if (subject.facts.fixed_k > 0) return {std::min(subject.facts.fixed_k, active)};
  std::vector<int64_t> numbers{1};
  for (const int64_t k : {int64_t{2}, active})
    if (k <= active && k > numbers.back()) numbers.push_back(k);
  const OptionSpecs& options = subject.entry.options;
  const bool has_k = std::any_of(options.begin(), options.end(), [](const OptionSpec& spec) { return spec.name == "k"; });
  return has_k || subject.facts.variable_k ? numbers : std::vector<int64_t>{1};
}

void check_landmarks_at(const Subject& subject, const std::vector<NamedLoss>& losses, const LandmarkCase& where) {
  const KitCase at{.rows = where.active, .sequences = 1, .experts = where.active, .k = subject.facts.variable_k ? 0 : where.k};
  Subject grown = subject;
  grown.variant.room = where.experts - where.active;
  const KitLayer layer = kit_layer(grown, at);
  const RouteInput in = kit_input(at);
  for (const NamedLoss& one : losses) {
    const Landmarks marks = one.loss->landmarks_among(where.active, where.experts, where.said);
    const auto check = [&](const RouteOutput& out, double mark, const char* which) {
      const double found = loss_value(*one.loss, in, out, *layer.site.router, where.experts);
      must_hit(found, mark, fmt::format("{} at {} of {} of {} experts with k = {}", one.label, which, where.active, where.experts,
                                        where.k),
               at);
    };
    check(balanced(where), marks.balance, "balance");
    check(collapsed(where), marks.collapse, "collapse");
  }
}

// A router's own options change nothing here, room for more experts does.
void check_landmarks(const Subject& subject) {
  if (!subject.variant.label.empty() && subject.variant.room == 0) return;
  const std::vector<NamedLoss> losses = landmark_losses(subject);
  for (const int64_t active : {1, 4, 6})
    for (const int64_t k : choices_of_rows(subject, active))
      check_landmarks_at(subject, losses, {active, active + subject.variant.room, k, subject.facts.variable_k ? 0 : k});
}

std::string landmarks_not_applicable(const Subject& subject) {
  return attachable_losses(subject.entry, subject.facts).empty() ? "no loss can be attached to it" : "";
}

}  // namespace

std::vector<Property> loss_properties() {
  return {{"landmarks", "losses have at perfect balance and at collapse the values that describe prints",
           landmarks_not_applicable, check_landmarks}};
}

}  // namespace moelab
