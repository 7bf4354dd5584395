// The paper's losses at their landmarks: decisions in perfect balance and in collapse, made by hand.
#include "experiments/verify_case.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <cmath>

namespace moelab {
namespace {

// Row t chooses first(t), first(t)+1, … of E experts in a circle, with gates 1/k.
RouteOutput landmark_decision(const Tensor& first_T, int64_t experts, int64_t k, const Tensor& logits_TE) {
  RouteOutput out;
  const Tensor choice_TK = first_T.unsqueeze(1).add(at::arange(k, at::kLong)).remainder(experts);
  out.assignment = {choice_TK, at::ones_like(choice_TK, at::kBool), at::zeros_like(choice_TK, at::kBool)};
  out.gate_TK = at::full(choice_TK.sizes(), 1.0 / static_cast<double>(k), at::kDouble);
  out.plan = make_sparse_plan(out.assignment, out.gate_TK, experts);
  const Tensor probability_TE = logits_TE.softmax(1);
  out.scores = {logits_TE, probability_TE, probability_TE, logits_TE, logits_TE, {}};
  out.statistics["distilled"] = logits_TE;  // a distilled router that agrees
  out.k = k;
  return out;
}

RouteOutput balanced(int64_t experts, int64_t k) {
  return landmark_decision(at::arange(experts, at::kLong), experts, k, at::zeros({experts, experts}, at::kDouble));
}

RouteOutput collapsed(int64_t experts, int64_t k) {
  const Tensor logits_TE = at::full({experts, experts}, -1e9, at::kDouble);
  logits_TE.slice(1, 0, k).fill_(0);
  return landmark_decision(at::zeros({experts}, at::kLong), experts, k, logits_TE);
}

// Of a sum: per row.
double loss_value(const LossTerm& term, const RouteInput& in, const RouteOutput& out, const Router& router, int64_t experts) {
  const auto statistics = collect_statistics(*term.loss, LossScope::kStep, {in, out, router, experts});
  const double value = local_value(term, statistics, router).item<double>();
  return term.loss->reduces_by_sum() ? value / static_cast<double>(in.rows()) : value;
}

void must_hit(double found, double landmark, const std::string& label, const char* where, const KitCase& at) {
  if (std::isnan(landmark)) return;
  must(std::abs(found - landmark) <= 1e-9 * (1 + std::abs(landmark)),
       fmt::format("loss {} at {} is {:.9g}, its landmark says {:.9g}", label, where, found, landmark), at);
}

bool is_papers(const Subject& subject, const std::string& label) {
  for (const PaperLoss& paper : subject.entry.paper_losses)
    if (paper.name == label) return true;
  return false;
}

int64_t landmark_k(const Subject& subject, int64_t experts) {
  if (subject.facts.fixed_k > 0) return subject.facts.fixed_k;
  const RouterSpec& spec = kit_router(subject.entry, subject.variant, {})->spec();
  return spec.options.declared("k") ? std::min(spec.k(), experts - 1) : 1;
}

void check_landmarks(const Subject& subject) {
  const KitCase at{.rows = 6, .sequences = 1, .experts = 6};
  const KitLayer layer = kit_layer(subject, at);
  const RouteInput in = kit_input(at);
  const int64_t k = landmark_k(subject, at.experts);
  for (const LossTerm& term : layer.site.losses) {
    if (!is_papers(subject, term.label)) continue;
    const Landmarks landmarks = term.loss->landmarks(at.experts, k);
    must_hit(loss_value(term, in, balanced(at.experts, k), *layer.site.router, at.experts), landmarks.balance, term.label,
             "balance", at);
    must_hit(loss_value(term, in, collapsed(at.experts, k), *layer.site.router, at.experts), landmarks.collapse, term.label,
             "collapse", at);
  }
}

std::string landmarks_not_applicable(const Subject& subject) {
  if (subject.entry.paper_losses.empty()) return "its paper attaches no loss";
  return needs_choices(subject);
}

}  // namespace

std::vector<Property> loss_properties() {
  return {{"landmarks", "the paper's losses have at perfect balance and at collapse the values that describe prints",
           landmarks_not_applicable, check_landmarks, /*once=*/true}};
}

}  // namespace moelab
