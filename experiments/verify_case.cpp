#include "experiments/verify_case.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace moelab {
namespace {

constexpr int64_t kKitVocabulary = 64, kKitExpertWidth = 6, kKitLayer = 3, kKitStep = 7;

Options kit_options(const OptionSpecs& specs, const std::map<std::string, OptionValue>& values) {
  Options options(specs);
  for (const OptionSpec& spec : specs)
    if (const auto given = values.find(spec.name); given != values.end()) options.set(spec, given->second);
  return options;
}

std::map<std::string, OptionValue> options_at(const RouterEntry& entry, const Variant& variant, const KitCase& at) {
  std::map<std::string, OptionValue> values = variant.options;
  if (at.short_stages) values.merge(stages_within(entry.options, kKitStages));
  for (const OptionSpec& spec : entry.options) {
    if (spec.name != "k") continue;
    if (at.k > 0) values["k"] = at.k;
    else values.try_emplace("k", std::min(std::get<int64_t>(spec.default_value), at.experts));
  }
  return values;
}

Tensor kit_normal(const KitCase& at, const char* purpose, at::IntArrayRef shape) {
  return normal_tensor(random_key(at.seed, "verify").with(purpose), shape, 1, at.dtype);
}

Tensor kit_integers(const KitCase& at, const char* purpose, int64_t count, int64_t bound) {
  Tensor values = at::zeros({count}, at::kLong);
  for (int64_t i = 0; i < count; ++i)
    values.mutable_data_ptr<int64_t>()[i] = uniform_integer(random_key(at.seed, "verify").with(purpose), i, bound);
  return values;
}

// Many routers start at zero or nearly so, where gradients hide; a test wants them anywhere.
void scramble(const Module& module, const KitCase& at) {
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : module.parameters())
    entry.tensor.add_(kit_normal(at, entry.name.c_str(), entry.tensor.sizes()), 0.5);
}

// Uneven lengths, unless they shall be even; some may be empty.
Tensor kit_sequences(const KitCase& at) {
  if (at.even) return at::arange(at.rows, at::kLong).floor_divide(at.rows / at.sequences);
  return std::get<0>(kit_integers(at, "sequences", at.rows, std::max<int64_t>(at.sequences, 1)).sort());
}

Tensor kit_offsets(const Tensor& sequence_T, int64_t sequences) {
  return at::searchsorted(sequence_T, at::arange(sequences + 1, at::kLong));
}

Tensor kit_positions(const Tensor& sequence_T, const Tensor& cu_seqlens_B1) {
  return at::arange(sequence_T.numel(), at::kLong).sub(cu_seqlens_B1.index_select(0, sequence_T));
}

Comm* kit_comm() {
  static const std::shared_ptr<Comm> alone = single_comm();
  return alone.get();
}

Tensor sparse_rows(const SparsePlan& plan) {
  Tensor gates_TE = at::zeros({plan.rows, plan.experts}, plan.gate_N.options().requires_grad(false));
  gates_TE.index_put_({plan.token_N, plan.expert_N}, plan.gate_N.detach());
  Tensor fate_TE = at::zeros_like(gates_TE);
  fate_TE.index_put_({plan.token_N, plan.expert_N}, at::zeros_like(plan.gate_N.detach()).add_(1));
  if (plan.dropped_token_M.numel() > 0)
    fate_TE.index_put_({plan.dropped_token_M, plan.dropped_expert_M}, at::zeros_like(plan.gate_N).new_full({}, -1));
  return at::cat({gates_TE, fate_TE}, 1);
}

Tensor soft_rows(const SoftPlan& plan) {
  std::vector<Tensor> rows, weights;
  for (int64_t b = 0; b < plan.sequences; ++b) {
    const SoftMatrices matrices = soft_matrices(plan, b);
    rows.push_back(matrices.row_M);
    weights.push_back(at::cat({matrices.dispatch_MS, matrices.combine_MS}, 1).detach());
  }
  return at::cat(weights).index_select(0, at::cat(rows).argsort());
}

// Replays and held values are the layer's own.
Tensor carry_of_layer_before(const Router& router, RouteInput in, RouteState& state) {
  in.forced = nullptr;
  in.held = nullptr;
  return router.route(in, state).carry;
}

}  // namespace

std::string KitCase::text() const {
  return fmt::format("T={} sequences={} D={} E={} k={} {} {} seed {}", rows, sequences, width, experts,
                     k > 0 ? std::to_string(k) : "default", to_string(mode), dtype == at::kDouble ? "fp64" : "fp32", seed);
}

std::shared_ptr<Router> kit_router(const RouterEntry& entry, const Variant& variant, const KitCase& at) {
  RouterSpec spec;
  spec.width = at.width;
  spec.experts = at.experts;
  spec.max_experts = at.experts + variant.room;
  spec.layer = kKitLayer;
  spec.vocabulary = kKitVocabulary;
  spec.dtype = at.dtype;
  spec.init = random_key(at.seed, "verify").with("router");
  spec.options = kit_options(entry.options, options_at(entry, variant, at));
  spec.noise = variant.noise;
  spec.train_capacity = spec.eval_capacity = at.capacity;
  std::shared_ptr<Router> router = entry.make(std::move(spec));
  router->set_entry(&entry);
  return router;
}

bool builds(const RouterEntry& entry, const Variant& variant, const KitCase& at) {
  try {
    kit_router(entry, variant, at);
    return true;
  } catch (const Error& error) {
    if (error.code() == ExitCode::kUsage) return false;
    throw;
  }
}

bool has_size(const Subject& subject, const KitCase& at) {
  return subject.variant.label.empty() || builds(subject.entry, subject.variant, at);
}

KitLayer kit_layer(const Subject& subject, const KitCase& at) {
  KitLayer layer{{}, at};
  layer.site.path = "verify";
  layer.site.layer = kKitLayer;
  layer.site.router = kit_router(subject.entry, subject.variant, at);
  const ExpertEntry& ffn = Registry<ExpertEntry>::instance().find("ffn");
  const Options options = kit_options(ffn.options,
                                      {{"activation", at.activation}, {"width", kKitExpertWidth}, {"bias", at.bias}});
  layer.site.bank = make_experts("ffn",
                                 {at.width, layer.max_experts(), at.dtype, random_key(at.seed, "verify").with("experts"), 1,
                                  options});
  layer.site.losses = attachable_losses(subject.entry, subject.facts);
  scramble(*layer.site.router, at);
  scramble(*layer.site.bank, at);
  layer.hands_on = subject.hands_on;
  return layer;
}

std::vector<LossTerm> attachable_losses(const RouterEntry& entry, const RouterFacts& facts) {
  std::vector<LossTerm> terms;
  for (const LossEntry& loss : Registry<LossEntry>::instance().all()) {
    if (loss.refuses && !loss.refuses(facts).empty()) continue;
    std::map<std::string, OptionValue> values;
    for (const PaperLoss& paper : entry.paper_losses)
      if (paper.name == loss.name) values = paper.options;
    terms.push_back({loss.make(kit_options(loss.options, values), entry), loss.name, 1, LossScope::kStep});
  }
  return terms;
}

RouteOutput KitLayer::route(const RouteInput& in) const {
  KitState state;
  return route(in, state);
}

RouteOutput KitLayer::route(const RouteInput& in, KitState& state) const try {
  RouteInput own = in;
  if (hands_on) own.carry = carry_of_layer_before(*site.router, in, state.before);
  RouteOutput out = site.router->route(own, state.here);
  validate(out.plan, in.rows(), max_experts());
  return out;
} catch (const Error& error) {
  throw Error(error.code(), fmt::format("{} ({})", error.what(), at.text()));
} catch (const std::exception& error) {
  const std::string text = error.what();  // LibTorch's carries a stack
  throw std::runtime_error(fmt::format("{} ({})", text.substr(0, text.find('\n')), at.text()));
}

Tensor KitLayer::run(const RouteOutput& out, const RouteInput& in, Execution execution) const {
  return execute(out.plan, *site.bank, {in.x_TD, in.sequence_T, in.cu_seqlens_B1, nullptr, in.training()}, execution);
}

std::vector<NamedTensor> KitLayer::trainable() const {
  std::vector<NamedTensor> all = site.router->trainable("router.");
  for (NamedTensor& entry : site.bank->trainable("experts.")) all.push_back(std::move(entry));
  return all;
}

void KitLayer::zero_grad() const {
  site.router->zero_grad();
  site.bank->zero_grad();
}

int64_t pick(std::mt19937_64& draw, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(draw() % static_cast<uint64_t>(high - low + 1));
}

CapacityPolicy random_capacity(std::mt19937_64& draw) {
  CapacityPolicy policy;
  policy.mode = static_cast<CapacityPolicy::Mode>(pick(draw, 1, 3));
  policy.factor = policy.mode == CapacityPolicy::Mode::kTokenFraction ? 0.25
                                                                      : 0.5 + 0.25 * static_cast<double>(pick(draw, 0, 4));
  policy.value = pick(draw, 0, 8);
  policy.times_k = pick(draw, 0, 1) == 1;
  policy.round = static_cast<CapacityPolicy::Round>(pick(draw, 0, 2));
  policy.min = pick(draw, 0, 2);
  policy.multiple_of = pick(draw, 1, 3);
  policy.scope = static_cast<CapacityPolicy::Scope>(pick(draw, 0, 2));
  policy.priority = static_cast<CapacityPolicy::Priority>(pick(draw, 0, 3));
  policy.order = static_cast<CapacityPolicy::Order>(pick(draw, 0, 1));
  return policy;
}

RouteInput kit_input(const KitCase& at) {
  RouteInput in;
  in.x_TD = kit_normal(at, "x", {at.rows, at.width}).requires_grad_(true);
  in.sequences = std::max<int64_t>(at.sequences, 1);
  in.sequence_T = kit_sequences(at);
  in.sequence_key_T = in.sequence_T.add(100);
  in.cu_seqlens_B1 = kit_offsets(in.sequence_T, in.sequences);
  in.position_T = kit_positions(in.sequence_T, in.cu_seqlens_B1);
  in.token_ids_T = kit_integers(at, "tokens", at.rows, kKitVocabulary);
  in.segment_T = in.position_T.floor_divide(4);
  in.domain_T = in.sequence_T.remainder(2);
  in.mode = at.mode;
  in.layer = kKitLayer;
  in.step = kKitStep;
  in.total_steps = 2 * kKitStep;
  in.random = random_key(at.seed, "verify").with("draws");
  in.comm = kit_comm();
  return in;
}

Tensor kit_grad_y(const KitCase& at) { return kit_normal(at, "grad_y", {at.rows, at.width}); }

KitPart sequences_of(const RouteInput& in, int64_t from, int64_t to) {
  const auto* offsets = in.cu_seqlens_B1.const_data_ptr<int64_t>();
  const int64_t first = offsets[from], last = offsets[to];
  KitPart part{in, at::arange(first, last, at::kLong)};
  for (Tensor* rows : {&part.in.x_TD, &part.in.token_ids_T, &part.in.segment_T, &part.in.domain_T, &part.in.sequence_key_T,
                       &part.in.position_T})
    *rows = rows->slice(0, first, last);
  part.in.sequence_T = in.sequence_T.slice(0, first, last).sub(from);
  part.in.sequences = to - from;
  part.in.cu_seqlens_B1 = in.cu_seqlens_B1.slice(0, from, to + 1).sub(first);
  return part;
}

std::vector<KitPart> split_in(const RouteInput& in, int64_t parts) {
  std::vector<KitPart> all;
  for (int64_t p = 0; p < parts; ++p) all.push_back(sequences_of(in, p * in.sequences / parts, (p + 1) * in.sequences / parts));
  return all;
}

Tensor decision_of_rows(const RouteOutput& out) {
  if (const auto* sparse = std::get_if<SparsePlan>(&out.plan)) return sparse_rows(*sparse);
  if (const auto* soft = std::get_if<SoftPlan>(&out.plan)) return soft_rows(*soft);
  const auto& merge = std::get<MergePlan>(out.plan);
  return merge.alpha_GE.detach().index_select(0, merge.group_of_token_T);
}

std::vector<NamedTensor> plan_tensors(const Plan& plan) {
  if (const auto* p = std::get_if<SparsePlan>(&plan))
    return {{"token", p->token_N},
            {"expert", p->expert_N},
            {"gate", p->gate_N.detach()},
            {"offsets", p->offsets_E1},
            {"slot", p->slot_TK},
            {"dropped_token", p->dropped_token_M},
            {"dropped_expert", p->dropped_expert_M}};
  if (const auto* p = std::get_if<SoftPlan>(&plan)) return {{"dispatch and combine", soft_rows(*p)}};
  const auto& p = std::get<MergePlan>(plan);
  return {{"alpha", p.alpha_GE.detach()}, {"group_of_token", p.group_of_token_T}};
}

bool same_bits(const Plan& a, const Plan& b) {
  const auto left = plan_tensors(a), right = plan_tensors(b);
  return std::equal(left.begin(), left.end(), right.begin(), right.end(),
                    [](const NamedTensor& l, const NamedTensor& r) { return at::equal(l.tensor, r.tensor); });
}

void must(bool holds, const std::string& what, const KitCase& at) {
  if (!holds) throw std::runtime_error(fmt::format("{} ({})", what, at.text()));
}

double difference(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes()) return std::numeric_limits<double>::infinity();
  if (b.numel() == 0) return 0;
  const Tensor exact = b.detach().to(at::kDouble);
  return a.detach().to(at::kDouble).sub(exact).abs().max().item<double>() / std::max(exact.abs().max().item<double>(), 1e-30);
}

void must_agree(const Tensor& a, const Tensor& b, double tolerance, const std::string& what, const KitCase& at) {
  const double error = difference(a, b);
  must(error <= tolerance, fmt::format("{}: relative error {:.3g}, allowed {:.0e}", what, error, tolerance), at);  // NaN fails
}

void must_equal(const RoutingRecord& a, const RoutingRecord& b, const std::string& what, const KitCase& at) {
  must(a.chosen_E == b.chosen_E, what + ": chosen pairs per expert differ", at);
  must(a.accepted_E == b.accepted_E, what + ": accepted pairs per expert differ", at);
  must(a.rows == b.rows && a.left_behind == b.left_behind, what + ": rows, or rows left behind, differ", at);
  must(a.first_chosen == b.first_chosen && a.first_dropped == b.first_dropped, what + ": first choices, or their drops, differ",
       at);
  must(a.dropped == b.dropped && a.places == b.places, what + ": dropped pairs, or places, differ", at);
  must(a.entropy_rows == b.entropy_rows, what + ": rows with an entropy differ", at);
  must(std::abs(a.entropy_sum - b.entropy_sum) <= 1e-10 * (1 + std::abs(b.entropy_sum)), what + ": entropies differ", at);
}

void must_keep_bits(const Plan& a, const Plan& b, const std::string& what, const KitCase& at) {
  const auto left = plan_tensors(a), right = plan_tensors(b);
  for (size_t i = 0; i < left.size() && i < right.size(); ++i)
    must(at::equal(left[i].tensor, right[i].tensor), fmt::format("{}: {} differs", what, left[i].name), at);
  must(left.size() == right.size(), what + ": the plan has another form", at);
}

std::vector<double> loss_values(const KitLayer& layer, const RouteInput& in, const RouteOutput& out) {
  std::vector<double> values;
  for (const TermStatistics& term : term_statistics(layer.site, in, out))
    values.push_back(local_value(layer.site.losses[term.term], term.per_scope, *layer.site.router).item<double>());
  return values;
}

Tensor kit_scalar(const KitLayer& layer, const RouteInput& in, const RouteOutput& out, const KitCase& at) {
  Tensor scalar = layer.run(out, in).mul(kit_grad_y(at)).sum();
  for (const TermStatistics& term : term_statistics(layer.site, in, out)) {
    const LossTerm& loss = layer.site.losses[term.term];
    scalar = scalar.add(local_value(loss, term.per_scope, *layer.site.router), loss.coefficient);
  }
  return scalar;
}

std::vector<NamedTensor> state_of(const Module& module) {
  std::vector<NamedTensor> state = module.parameters();
  for (NamedTensor& buffer : module.buffers()) state.push_back(std::move(buffer));
  return state;
}

std::vector<NamedTensor> copied_state(const Module& module) {
  std::vector<NamedTensor> state = state_of(module);
  for (NamedTensor& entry : state) entry.tensor = entry.tensor.detach().clone();
  return state;
}

std::map<std::string, Tensor> gradients_of(const KitLayer& layer) {
  std::map<std::string, Tensor> gradients;
  for (const NamedTensor& entry : layer.trainable())
    gradients[entry.name] = entry.tensor.grad().defined() ? entry.tensor.grad().clone() : at::zeros_like(entry.tensor);
  return gradients;
}

std::string always_applies(const Subject&) { return ""; }

std::string needs_choices(const Subject& subject) {
  if (subject.facts.plan == PlanForm::kSparse) return "";
  return fmt::format("its plan is {}: no row chooses experts", to_string(subject.facts.plan));
}

bool decides_row_by_row(const Subject& subject, Mode mode) {
  return mode == Mode::kTrain ? subject.facts.batch_independent : subject.facts.batch_independent_eval;
}

std::string needs_independence(const Subject& subject) {
  if (subject.facts.batch_independent || subject.facts.batch_independent_eval) return "";
  return "a row's decision depends on other rows, by its declared facts";
}

}  // namespace moelab
