// Properties that hold a router to its declared facts: what it returns, what it reads, what its scores mean, in which precision
// it computes, and which experts are there.
#include "core/error.h"
#include "core/model/block.h"
#include "experiments/verify_case.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

PlanForm form_of(const Plan& plan) {
  if (std::holds_alternative<SparsePlan>(plan)) return PlanForm::kSparse;
  return std::holds_alternative<SoftPlan>(plan) ? PlanForm::kSoft : PlanForm::kMerge;
}

// As many choices as the facts say, and none missing where the number is fixed.
void check_number_of_choices(const Subject& subject, const KitLayer& layer, const RouteOutput& out, const KitCase& at) {
  if (subject.facts.variable_k) {
    must(out.k == 0, fmt::format("it says that the number of choices varies, but k is {}", out.k), at);
    return;
  }
  const int64_t said = choices_per_row(subject.facts, layer.site.router->spec(), at.mode);
  if (said > at.experts) return;  // fewer, or missing ones
  must(said == 0 || out.k == said, fmt::format("its facts and options say {} choices per row, but k is {}", said, out.k), at);
  must(out.assignment.choice_TK.ge(0).all().item<bool>(),
       "it does not say that the number of choices varies, but a row lacks some", at);
}

void check_plan_form(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    for (const int64_t experts : {1, 4, 9}) {
      const KitCase at{.experts = experts, .mode = mode};
      if (!has_size(subject, at)) continue;
      const KitLayer layer = kit_layer(subject, at);
      const RouteOutput out = layer.route(kit_input(at));
      const PlanForm said = subject.facts.plan_in(mode), found = form_of(out.plan);
      must(said == found, fmt::format("it says that its plan is {}, but it is {}", to_string(said), to_string(found)), at);
      must(out.assignment.defined() == (found == PlanForm::kSparse), "a sparse plan has an assignment, and no other has one", at);
      if (found == PlanForm::kSparse) check_number_of_choices(subject, layer, out, at);
    }
}

// A side channel, and whether the facts declare it.
struct Channel {
  const char* name;
  Tensor RouteInput::*rows;
  bool declared;
  bool optional;  // may be read where it is there
};

std::vector<Channel> channels_of(const RouterFacts& facts) {
  return {{"token ids", &RouteInput::token_ids_T, facts.needs_token_ids, false},
          {"domain labels", &RouteInput::domain_T, facts.needs_domain, false},
          {"segments", &RouteInput::segment_T, facts.needs_segments, true}};
}

bool refuses(const KitLayer& layer, const RouteInput& in) {
  try {
    layer.route(in);
  } catch (const Error& error) {
    return error.code() == ExitCode::kUsage;
  }
  return false;
}

void check_channels(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    for (const Channel& channel : channels_of(subject.facts)) {
      const KitCase at{.mode = mode};
      const KitLayer layer = kit_layer(subject, at);
      const RouteInput in = kit_input(at);
      RouteInput without = in;
      without.*channel.rows = Tensor();
      if (channel.declared) {
        must(refuses(layer, without), fmt::format("it needs {}, but does not refuse a batch without them", channel.name), at);
        continue;
      }
      const RouteOutput found = layer.route(without);
      if (!channel.optional)
        must_keep_bits(found.plan, layer.route(in).plan,
                       fmt::format("without {}, which it does not say that it needs", channel.name), at);
    }
}

// Rows in proportion to each other's pairs: a·|b|₁ = b·|a|₁ entry by entry.
void must_be_proportional(const Tensor& gate_TK, const Tensor& score_TK, const KitCase& at) {
  const Tensor left = gate_TK.mul(score_TK.abs().sum(1, true)), right = score_TK.mul(gate_TK.abs().sum(1, true));
  must_agree(left, right, 1e-9, "the gates of a row are not in proportion to scores.gate_TE, which they are taken from", at);
}

Tensor probabilities_by_rule(const Tensor& logits_TE, ProbabilityRule rule) {
  return rule == ProbabilityRule::kSoftmax ? logits_TE.softmax(1) : at::log_sigmoid(logits_TE).softmax(1);
}

void check_scores(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const KitCase at{.mode = mode, .seed = subject.seed};
    const RouteOutput out = kit_layer(subject, at).route(kit_input(at));
    const Scores& scores = out.scores;
    const Tensor &logits_TE = scores.clean_TE, &found_TE = scores.loss_TE;
    must(logits_TE.defined() && found_TE.defined(), "it has scores, but hands out no logits or no probabilities", at);
    must_agree(found_TE.sum(1), at::zeros_like(found_TE.sum(1)).add(1), 1e-9, "probabilities of a row do not sum to 1", at);
    const ProbabilityRule rule = subject.facts.probabilities;
    if (rule != ProbabilityRule::kOwn)
      must_agree(found_TE, probabilities_by_rule(logits_TE, rule), 1e-9,
                 fmt::format("probabilities for losses are not the {} of the logits", to_string(rule)), at);
    if (!out.assignment.defined() || !scores.gate_TE.defined()) continue;
    const Tensor& choice_TK = out.assignment.choice_TK;
    const Tensor score_TK = scores.gate_TE.gather(1, choice_TK.clamp_min(0)).masked_fill(choice_TK.lt(0), 0);
    must_be_proportional(out.gate_TK.masked_fill(choice_TK.lt(0), 0).detach(), score_TK.detach(), at);
  }
}

std::string scores_not_applicable(const Subject& subject) {
  return subject.facts.has_scores ? "" : "it has no scores that losses could read";
}

class Bfloat16Autocast {
 public:
  Bfloat16Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  ~Bfloat16Autocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
  Bfloat16Autocast(const Bfloat16Autocast&) = delete;
};

// Activations of half precision are widened before anything is decided from them.
void check_precision(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const at::NoGradGuard no_grad;
    const KitCase at{.mode = mode, .dtype = at::kFloat};
    const KitLayer layer = kit_layer(subject, at);
    RouteInput half = kit_input(at);
    half.x_TD = half.x_TD.to(at::kBFloat16);
    RouteInput wide = half;
    wide.x_TD = half.x_TD.to(at::kFloat);
    const RouteOutput expected = layer.route(wide);
    const Bfloat16Autocast autocast;
    const RouteOutput found = layer.route(half);
    must_keep_bits(found.plan, expected.plan, "bfloat16 activations under autocast, against the same in float32", at);
    for (const auto& [name, probe] : expected.probes)
      must(at::equal(found.probes.at(name), probe), "probe '" + name + "' is computed in half precision", at);
  }
}

// Another state of everything that belongs to experts which are not there.
void disturb_absent_experts(const KitLayer& layer) {
  const at::NoGradGuard no_grad;
  const int64_t there = layer.at.experts;
  for (const NamedTensor& entry : layer.site.bank->parameters()) entry.tensor.slice(0, there).mul_(-3).add_(1);
  const std::vector<Tensor> state = layer.site.router->per_expert_tensors();
  for (const Tensor& rows : state)
    if (rows.requires_grad()) rows.slice(0, there).mul_(-3).add_(1);
}

void must_not_reach_absent_experts(const KitLayer& layer, const Tensor& scalar, const std::string& what) {
  layer.zero_grad();
  if (scalar.requires_grad()) scalar.backward({}, /*retain_graph=*/true);
  std::vector<NamedTensor> owned = layer.site.bank->trainable("experts.");
  for (const Tensor& rows : layer.site.router->per_expert_tensors())
    if (rows.is_leaf()) owned.push_back({"router", rows});
  for (const NamedTensor& entry : owned)
    if (entry.tensor.grad().defined())
      must(!entry.tensor.grad().slice(0, layer.at.experts).any().item<bool>(),
           fmt::format("{} gives experts that are not there a gradient of {}", what, entry.name), layer.at);
}

// Losses without any landmark are about the parameters, those of absent experts included, not about decisions.
bool reads_decisions(const Loss& loss) {
  const Landmarks marks = loss.landmarks(4, 1);
  return !std::isnan(marks.balance) || !std::isnan(marks.collapse);
}

void must_say_who_is_there(const KitLayer& layer) {
  const Tensor active_E = layer.site.router->active_experts_E();
  const bool right = active_E.defined() && layer.site.router->active_experts() == layer.at.experts &&
                     active_E.slice(0, 0, layer.at.experts).all().item<bool>();
  must(right, fmt::format("active_experts_E() does not say that the first {} of {} experts are there", layer.at.experts,
                          layer.max_experts()),
       layer.at);
}

void check_room(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const KitCase at{.experts = 3, .mode = mode, .seed = subject.seed};
    const KitLayer layer = kit_layer(subject, at);
    must_say_who_is_there(layer);
    const RouteInput in = kit_input(at);
    const RouteOutput out = layer.route(in);
    const Tensor y_TD = layer.run(out, in);
    must_not_reach_absent_experts(layer, y_TD.mul(kit_grad_y(at)).sum(), "the output");
    for (const TermStatistics& term : term_statistics(layer.site, in, out)) {
      const LossTerm& loss = layer.site.losses[term.term];
      if (reads_decisions(*loss.loss))
        must_not_reach_absent_experts(layer, local_value(loss, term.per_scope, *layer.site.router), "loss " + loss.label);
    }
    disturb_absent_experts(layer);
    must_agree(layer.run(layer.route(in), in), y_TD, 1e-12, "output with other parameters of experts that are not there", at);
  }
}

std::string room_not_applicable(const Subject& subject) {
  return subject.variant.room > 0 ? "" : "it takes no max_experts above experts";
}

}  // namespace

std::vector<Property> fact_properties() {
  return {
      {"plan_form", "the plan has the declared form, and each row the declared number of choices", always_applies,
       check_plan_form},
      {"channels", "token ids, segments and labels are read only where declared, and their absence is refused where needed",
       always_applies, check_channels},
      {"scores", "gates come from the scores that the router names, probabilities for losses from its logits by the stated rule",
       scores_not_applicable, check_scores},
      {"precision", "bfloat16 activations are decided on in float32, whatever autocast says", always_applies, check_precision},
      {"room", "experts that are not there are never used, and get no gradient from outputs and decisions", room_not_applicable,
       check_room},
  };
}

}  // namespace moelab
