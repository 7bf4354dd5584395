// Properties of who may look at whom: later tokens, other sequences, padding, and calls before this one while decoding.
#include "core/model/rows.h"
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

#include <fmt/format.h>

#include <limits>

namespace moelab {
namespace {

constexpr int64_t kPrompt = 3;  // the first tokens of each sequence

struct Decided {
  Tensor rows_Tn;  // decision_of_rows
  Tensor y_TD;
};

Decided decide_rows(const KitLayer& layer, const RouteInput& in) {
  const RouteOutput out = layer.route(in);
  return {decision_of_rows(out), layer.run(out, in).detach()};
}

// Token j becomes another one, in every channel that tells tokens apart.
RouteInput with_other_token(const RouteInput& in, int64_t row) {
  RouteInput changed = in;
  changed.x_TD = in.x_TD.clone();
  changed.x_TD.select(0, row).neg_().add_(1);
  changed.token_ids_T = in.token_ids_T.clone();
  changed.token_ids_T.select(0, row).add_(1).remainder_(64);
  return changed;
}

// Largest change of the rows before `row` in its sequence, relative to all rows.
double change_before(const Decided& then, const Decided& now, const RouteInput& in, int64_t row) {
  const auto* offsets = in.cu_seqlens_B1.const_data_ptr<int64_t>();
  const int64_t first = offsets[in.sequence_T[row].item<int64_t>()];
  if (first == row) return 0;
  return std::max(difference(now.rows_Tn.slice(0, first, row), then.rows_Tn.slice(0, first, row)),
                  difference(now.y_TD.slice(0, first, row), then.y_TD.slice(0, first, row)));
}

std::vector<CapacityPolicy> probed_policies() {
  std::vector<CapacityPolicy> policies{{}};
  for (const auto order : {CapacityPolicy::Order::kTokenMajor, CapacityPolicy::Order::kChoiceMajor})
    policies.push_back({.mode = CapacityPolicy::Mode::kFactor, .times_k = true, .order = order});
  return policies;
}

// A router that says it looks ahead has to, or the label on its training loss is wrong; a capacity may only do so at times.
void check_causality(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    for (const CapacityPolicy& policy : probed_policies()) {
      const KitCase at{.capacity = policy, .mode = mode, .seed = subject.seed};
      const int64_t k = kit_layer(subject, at).route(kit_input(at)).k;
      const Causality claim = causality(subject.facts, policy, mode, k);
      const Leak leak = probe_leaks(subject, at);
      must(!claim.causal || leak.worst <= 1e-12,
           fmt::format("causal by its facts ({}), but changing row {} changes earlier rows of its sequence by {:.3g}",
                       claim.reason, leak.row, leak.worst),
           at);
      const bool by_others = !decides_row_by_row(subject, mode) && !subject.facts.time_ordered;
      const bool by_method = subject.facts.looks_ahead || by_others;
      must(!by_method || leak.worst > 1e-9, "it says that it looks ahead, but no later token changes an earlier row", at);
    }
}

// Rows of a prompt see each other. From its last row on nobody sees a later row: these are the rows that are judged.
void check_prompt(const Subject& subject) {
  const at::NoGradGuard no_grad;
  const KitCase at{.mode = Mode::kEval, .seed = subject.seed};
  const KitLayer layer = kit_layer(subject, at);
  RouteInput in = kit_input(at);
  in.prompt = kPrompt;
  const Decided then = decide_rows(layer, in);
  double within = 0;
  for (int64_t row = 1; row < at.rows; ++row) {
    const Decided now = decide_rows(layer, with_other_token(in, row));
    const double change = change_before(then, now, in, row);
    if (in.position_T[row].item<int64_t>() < kPrompt) within = std::max(within, change);
    else
      must(change <= 1e-12, fmt::format("it says that it reads a prompt and no further, but after a prompt of {} changing row {} "
                                        "changes earlier rows by {:.3g}", kPrompt, row, change), at);
  }
  must(within > 1e-9, "it says that it reads prompts, but no token of one changes an earlier row of it", at);
}

std::string prompt_not_applicable(const Subject& subject) {
  return subject.facts.reads_prompt ? "" : "it reads no prompt";
}

// A sequence decides the same with and without the others beside it.
void check_other_rows(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    if (!decides_row_by_row(subject, mode)) continue;
    const at::NoGradGuard no_grad;
    const KitCase at{.capacity = {.mode = CapacityPolicy::Mode::kFactor, .priority = CapacityPolicy::Priority::kBatch},
                     .mode = mode};
    const KitLayer layer = kit_layer(subject, at);
    const RouteInput in = kit_input(at);
    const Decided all = decide_rows(layer, in);
    for (int64_t b = 0; b < in.sequences; ++b) {
      const KitPart part = sequences_of(in, b, b + 1);
      const Decided alone = decide_rows(layer, part.in);
      must_agree(alone.rows_Tn, all.rows_Tn.index_select(0, part.row_T), 1e-12,
                 fmt::format("decisions of sequence {} alone", b), at);
      must_agree(alone.y_TD, all.y_TD.index_select(0, part.row_T), 1e-11, fmt::format("output of sequence {} alone", b), at);
    }
  }
}

// The batch as a rectangle: sequence b has its rows first, then padding. The padded x is not even a number.
struct Rectangle {
  Batch batch;
  Tensor x_BLD;
};

Rectangle padded_rectangle(const RouteInput& in) {
  const Tensor length_B = in.cu_seqlens_B1.diff();
  const int64_t length = length_B.max().item<int64_t>() + 3;
  Rectangle wide;
  wide.batch.length_B = length_B;
  wide.batch.tokens_BL = at::full({in.sequences, length}, 63, at::kLong);
  wide.batch.tokens_BL.index_put_({in.sequence_T, in.position_T}, in.token_ids_T);
  wide.batch.sequence_B = at::arange(in.sequences, at::kLong).add(100);
  wide.batch.domain_B = at::arange(in.sequences, at::kLong).remainder(2);
  wide.x_BLD = at::full({in.sequences, length, in.x_TD.size(1)}, std::numeric_limits<double>::quiet_NaN(),
                        in.x_TD.options().requires_grad(false));
  wide.x_BLD.index_put_({in.sequence_T, in.position_T}, in.x_TD.detach());
  return wide;
}

RouteInput without_padding(const Rectangle& wide, const RouteInput& in) {
  const BatchRows rows(wide.batch);
  RouteInput routed = rows.route_input({.mode = in.mode, .step = in.step, .total_steps = in.total_steps, .comm = in.comm});
  routed.x_TD = rows.gather(wide.x_BLD);
  routed.segment_T = in.segment_T;
  routed.layer = in.layer;
  routed.random = in.random;
  return routed;
}

void check_padding_of(const Subject& subject, const KitCase& at, const std::string& what) {
  const at::NoGradGuard no_grad;
  const KitLayer layer = kit_layer(subject, at);
  const RouteInput bare = kit_input(at), padded = without_padding(padded_rectangle(bare), bare);
  const RouteOutput expected = layer.route(bare), found = layer.route(padded);
  must_keep_bits(found.plan, expected.plan, what, at);
  const int64_t experts = layer.max_experts();
  must_equal(record_of(padded, found, experts), record_of(bare, expected, experts), "counters of " + what, at);
  must(layer.run(found, padded).sizes() == padded.x_TD.sizes(), "the output of " + what + " has another shape", at);
}

void check_padding(const Subject& subject) {
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    KitCase at{.capacity = {.mode = CapacityPolicy::Mode::kFactor}, .mode = mode};
    check_padding_of(subject, at, "a padded batch");
    at.rows = 0;
    check_padding_of(subject, at, "a batch of padding alone");
  }
}

constexpr int64_t kDecoded = 7;  // tokens of each sequence, the first kPrompt of which come at once

// Columns [from, to) of sequences of equal length, as a model hands them on: without labels and segments.
RouteInput columns_of(const RouteInput& in, int64_t from, int64_t to) {
  RouteInput part = in;
  const Tensor row_T = in.position_T.ge(from).logical_and(in.position_T.lt(to)).nonzero().squeeze(1);
  for (Tensor* rows : {&part.x_TD, &part.token_ids_T, &part.sequence_T, &part.sequence_key_T, &part.position_T})
    *rows = rows->index_select(0, row_T);
  part.segment_T = part.domain_T = Tensor();
  part.cu_seqlens_B1 = at::arange(in.sequences + 1, at::kLong).mul(to - from);
  return part;
}

// A second request that goes on from the same state with other tokens, and must not be seen by the first.
void decode_on_the_side(const KitLayer& layer, const RouteInput& in, KitState fork) {
  RouteInput other = in;
  other.x_TD = in.x_TD.neg();
  other.token_ids_T = in.token_ids_T.add(1).remainder(64);
  layer.route(other, fork);
}

void check_decode(const Subject& subject) {
  const at::NoGradGuard no_grad;
  const KitCase at{.rows = 2 * kDecoded, .sequences = 2, .mode = Mode::kEval, .even = true, .seed = subject.seed};
  const KitLayer layer = kit_layer(subject, at);
  const RouteInput whole = columns_of(kit_input(at), 0, kDecoded);
  const Decided expected = decide_rows(layer, whole);
  KitState state;
  for (int64_t from = 0, to = kPrompt; from < kDecoded; from = to++) {
    RouteInput part = columns_of(whole, from, to);
    part.mode = Mode::kDecode;
    if (from > 0) decode_on_the_side(layer, part, state);
    const RouteOutput out = layer.route(part, state);
    const Tensor row_T = whole.position_T.ge(from).logical_and(whole.position_T.lt(to)).nonzero().squeeze(1);
    const std::string where = fmt::format("of tokens {} to {}, decoded, against the full forward pass", from, to - 1);
    must_agree(decision_of_rows(out), expected.rows_Tn.index_select(0, row_T), 1e-10, "decisions " + where, at);
    must_agree(layer.run(out, part), expected.y_TD.index_select(0, row_T), 1e-10, "output " + where, at);
  }
}

std::string decode_not_applicable(const Subject& subject) {
  return subject.facts.decodes ? "" : "it says that it cannot decode token by token";
}

}  // namespace

Leak probe_leaks(const Subject& subject, const KitCase& at) {
  const at::NoGradGuard no_grad;
  const KitLayer layer = kit_layer(subject, at);
  const RouteInput in = kit_input(at);
  const Decided then = decide_rows(layer, in);
  Leak leak;
  for (int64_t row = 1; row < at.rows; row += 2) {
    const double change = change_before(then, decide_rows(layer, with_other_token(in, row)), in, row);
    if (change > leak.worst) leak = {change, row};
  }
  return leak;
}

std::vector<Property> order_properties() {
  return {
      {"causality", "changing a token changes no earlier row of its sequence where the facts and the capacity say causal",
       always_applies, check_causality},
      {"prompt", "a router that reads a prompt reads nothing after it", prompt_not_applicable, check_prompt},
      {"other_rows", "a sequence decides the same without the others", needs_independence, check_other_rows},
      {"padding", "a padded batch gives bitwise the plan and the counts of the same rows without padding, and padding alone none",
       always_applies, check_padding},
      {"decode", "token by token, with what RouteState keeps, it decides as in the full forward pass", decode_not_applicable,
       check_decode},
  };
}

}  // namespace moelab
