// Lory: Fully Differentiable Mixture-of-Experts for Autoregressive Language Model Pre-training
// Zhong, Xia, Chen, Lewis, 2024, arXiv:2405.03133
//
//   segments of T_s rows;  h_n = mean of segment n's rows;  e_n = softmax(R h_n)
//   rows of segment n: y = f(x; Σ_i α_i θ_i) with α = e_{n-1}: one merged expert per segment, mixed from what came before it
//   segment 1: own_stopgrad is the paper's α = stopgrad(e_1), which tells its first rows of its later ones; uniform is α = 1/E
//   eval = prompt: α = softmax(R · mean of the prompt) for all rows. The prompt is [eval] prompt tokens, without it all the rows
//   at hand; while decoding it is the first call
//   first warmup_steps steps: the dense model is expert 0 alone; then all others become copies of it, moments too
//
// The copies give the same function whatever α is. R must not start at 0: equal experts under uniform weights stay equal.
//
// Differences from the paper: the first segment is uniform unless asked for, so that no row sees later ones; the last segment
// may be shorter; R starts at N(0, 0.02²) (the paper gives no value); `[data] composer = "similarity"` compares documents by
// their tokens, not by a retriever's embeddings.
#include "core/error.h"
#include "core/linear_router.h"
#include "core/merging.h"

#include <ATen/ops/_unique2.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

enum class FirstSegment { kUniform, kOwnStopgrad, kOwn };

// Rows of one segment of one sequence form a group; groups are numbered by (sequence, segment).
struct LoryGroups {
  Tensor of_row_T;    // int64
  Tensor sequence_G;  // int64
  int64_t count() const { return sequence_G.numel(); }

  // The group of the segment before, -1 in the first one of a sequence.
  Tensor previous_G() const {
    const Tensor before_G = at::arange(-1, count() - 1, at::kLong);
    if (count() == 0) return before_G;
    const Tensor starts_G = at::cat({at::ones({1}, at::kBool), sequence_G.diff().ne(0)});
    return before_G.masked_fill(starts_G, -1);
  }
};

LoryGroups lory_groups(const Tensor& sequence_T, const Tensor& segment_T) {
  const Tensor rank_T = std::get<1>(at::_unique2(segment_T, /*sorted=*/true, /*return_inverse=*/true));
  const int64_t ranks = rank_T.numel() == 0 ? 1 : rank_T.max().item<int64_t>() + 1;
  const auto [key_G, group_T, counts] =
      at::_unique2(sequence_T.mul(ranks).add(rank_T), /*sorted=*/true, /*return_inverse=*/true);
  return {group_T, key_G.floor_divide(ranks)};
}

void require_rising_segments(const RouteInput& in) {
  const Tensor order_T = in.sequence_T.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor same_T = in.sequence_T.index_select(0, order_T).diff().eq(0);
  const Tensor falls_T = in.segment_T.index_select(0, order_T).diff().lt(0);
  if (falls_T.logical_and(same_T).any().item<bool>()) usage_error("router 'lory': segment_ids must rise within a sequence");
}

class LoryRouter : public LinearRouter {
 public:
  explicit LoryRouter(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     {.kind = NoiseSpec::Kind::kNone}),
        length_(spec.options.integer("segment_length")), warmup_steps_(spec.options.integer("warmup_steps")),
        own_first_(spec.options.text("first_segment") == "own_stopgrad"),
        own_first_in_eval_(own_first_ && spec.options.text("first_segment_eval") == "same"),
        prompt_(spec.options.text("eval") == "prompt") {
    require_no_noise(spec, "lory");
    if (warmup_steps_ > 0) dense_ = add_buffer("dense", at::ones({1}, spec.dtype));
  }

  RouterFacts facts() const override {
    RouterFacts facts = LinearRouter::facts();
    facts.batch_independent = !own_first_;
    facts.batch_independent_eval = facts.decodes = !prompt_ && !own_first_in_eval_;
    facts.reads_prompt = prompt_;
    facts.straight_through = own_first_ || own_first_in_eval_;  // stopgrad
    facts.stateful = warmup_steps_ > 0;
    return facts;
  }

  RouteOutput route(const RouteInput& in, RouteState& state) const override {
    require_finite(in.routed(), "x", in);
    if (dense_.defined() && dense_.item<double>() != 0) return finish_merge(dense_logits(in), in.sequence_T);
    if (in.mode == Mode::kDecode) return decode(in, state);
    return whole_prompt(in) ? route_prompt(in) : route_segments(in);
  }

  // Told per site, so that routers shared by several places copy the experts of each.
  std::vector<Event> end_step(const std::map<std::string, Tensor>&, int64_t step) override {
    if (warmup_steps_ == 0 || step + 1 != warmup_steps_) return {};
    dense_.zero_();
    std::vector<Event> events(1);
    events.front().note = "end of the dense warm-up";
    for (int64_t e = 1; e < spec_.experts; ++e) {
      Event copy{.kind = Event::Kind::kExpertAdded, .expert = e, .source = 0, .tensors = {},
                 .note = fmt::format("expert {} starts as a copy of the dense expert 0", e)};
      copy.with_moments = true;
      events.push_back(std::move(copy));
    }
    return events;
  }

 private:
  bool whole_prompt(const RouteInput& in) const { return prompt_ && !in.training(); }

  FirstSegment first_segment(const RouteInput& in) const {
    if (whole_prompt(in)) return FirstSegment::kOwn;
    const bool own = in.training() ? own_first_ : own_first_in_eval_;
    return own ? FirstSegment::kOwnStopgrad : FirstSegment::kUniform;
  }

  // Segment of each row; its numbers only order the rows.
  Tensor segment_of_row(const RouteInput& in) const {
    if (whole_prompt(in)) return at::zeros_like(in.position_T);
    if (!in.segment_T.defined()) return in.position_T.floor_divide(length_);
    require_rising_segments(in);
    return in.segment_T;
  }

  Tensor logits_of(const RouteInput& in, const Tensor& mean_GD) const {
    const Tensor logits_GE = router_logits(mean_GD, weight_ED_);
    return checked(in, {logits_GE, logits_GE, {}}).clean_TE;
  }

  Tensor equal_logits(const RouteInput& in, const Tensor& like_GE) const {
    const Tensor zeros_GE = at::zeros_like(like_GE.detach());
    return checked(in, {zeros_GE, zeros_GE, {}}).clean_TE;
  }

  // All weight on expert 0.
  Tensor dense_logits(const RouteInput& in) const {
    Tensor logits_BE = at::full({in.sequences, spec_.max_experts}, -1e9, weight_ED_.options().requires_grad(false));
    logits_BE.select(1, 0).zero_();
    return logits_BE;
  }

  // What each group is mixed with, from the logits that each group's own mean gives.
  Tensor used_logits(const RouteInput& in, const LoryGroups& groups, const Tensor& own_GE) const {
    const FirstSegment rule = first_segment(in);
    Tensor first_GE = own_GE;
    if (rule == FirstSegment::kUniform) first_GE = equal_logits(in, own_GE);
    if (rule == FirstSegment::kOwnStopgrad) first_GE = stop_gradient(in, "e_1", own_GE);
    const Tensor previous_G = groups.previous_G();
    const Tensor is_first_G1 = previous_G.lt(0).unsqueeze(1).to(own_GE.device());
    return at::where(is_first_G1, first_GE, own_GE.index_select(0, previous_G.clamp_min(0).to(own_GE.device())));
  }

  RouteOutput route_segments(const RouteInput& in) const {
    const LoryGroups groups = lory_groups(in.sequence_T, segment_of_row(in));
    const Tensor own_GE = logits_of(in, sums_over_groups(in.routed(), groups.of_row_T, groups.count()).mean_GD());
    return finish_merge(used_logits(in, groups, own_GE), groups.of_row_T);
  }

  // One mixture per sequence. What follows the prompt is not in its mean.
  RouteOutput route_prompt(const RouteInput& in) const {
    const LoryGroups groups = lory_groups(in.sequence_T, segment_of_row(in));
    Tensor x_TD = in.routed(), group_T = groups.of_row_T;
    if (in.prompt > 0) {
      const Tensor given_P = in.position_T.lt(in.prompt).nonzero().squeeze(1);
      x_TD = x_TD.index_select(0, given_P.to(x_TD.device()));
      group_T = group_T.index_select(0, given_P);
    }
    return finish_merge(logits_of(in, sums_over_groups(x_TD, group_T, groups.count()).mean_GD()), groups.of_row_T);
  }

  // Each sequence's open segment comes along as one more row, which stands for the rows that earlier calls saw of it: their
  // sum, their number, and the mixture that the segment began with.
  RouteOutput decode(const RouteInput& in, RouteState& state) const {
    const bool goes_on = state.kept.count("segment") != 0;
    Tensor sequence_T = in.sequence_T, segment_T = segment_of_row(in);
    if (goes_on) {
      sequence_T = at::cat({sequence_T, at::arange(in.sequences, at::kLong)});
      segment_T = at::cat({segment_T, state.kept.at("segment")});
    }
    const LoryGroups groups = lory_groups(sequence_T, segment_T);
    const Tensor group_T = groups.of_row_T.narrow(0, 0, in.rows());
    GroupSums sums = sums_over_groups(in.routed(), group_T, groups.count());
    const Tensor open_B = groups.of_row_T.narrow(0, in.rows(), goes_on ? in.sequences : 0);
    if (goes_on) {
      sums.sum_GD = sums.sum_GD.index_add(0, open_B, state.kept.at("sum"));
      sums.count_G = sums.count_G.index_add(0, open_B, state.kept.at("count"));
    }
    Tensor used_GE = used_logits(in, groups, logits_of(in, sums.mean_GD()));
    if (goes_on) used_GE = used_GE.index_copy(0, open_B, state.kept.at("logits"));
    keep(state, in.sequences, groups, segment_T, sums, used_GE);
    return finish_merge(used_GE, group_T);
  }

  // The last group of each sequence is the open one from now on.
  static void keep(RouteState& state, int64_t sequences, const LoryGroups& groups, const Tensor& segment_T,
                   const GroupSums& sums, const Tensor& used_GE) {
    const Tensor ends_G =
        at::cat({groups.sequence_G.diff().ne(0), at::ones({std::min<int64_t>(1, groups.count())}, at::kBool)});
    const Tensor last_B = ends_G.nonzero().squeeze(1);
    check_invariant(last_B.numel() == sequences, "lory: a sequence without rows cannot be decoded");
    const Tensor segment_G = at::zeros({groups.count()}, at::kLong).index_copy(0, groups.of_row_T, segment_T);
    state.kept["segment"] = segment_G.index_select(0, last_B);
    state.kept["sum"] = sums.sum_GD.index_select(0, last_B);
    state.kept["count"] = sums.count_G.index_select(0, last_B);
    state.kept["logits"] = used_GE.index_select(0, last_B);
  }

  int64_t length_;
  int64_t warmup_steps_;
  bool own_first_;
  bool own_first_in_eval_;
  bool prompt_;
  Tensor dense_;  // [1], 1 = still dense; undefined without a warm-up
};

const Registration<RouterEntry> registration_lory{{
    .name = "lory",
    .title = "Lory: one merged expert per segment, chosen by the segment before",
    .citation = "Zhong, Xia, Chen, Lewis, 2024, arXiv:2405.03133",
    .equation = "e_n = softmax(R · mean of segment n);  rows of segment n: y = f(x; Σ_i e_{n-1,i} θ_i)",
    .facts = {.plan = PlanForm::kMerge},
    .options = {option("segment_length", 256, "rows of a segment, where the data name no segments").at_least(1),
                option("first_segment", "uniform", "mixture of the first segment: equal weights, or its own without gradient")
                    .one_of({"uniform", "own_stopgrad"}),
                option("first_segment_eval", "same", "the same in evaluation, where only uniform is causal")
                    .one_of({"same", "uniform"}),
                option("eval", "segments",
                       "evaluation by segments, or one mixture from the mean of the prompt: of what generation starts from, of "
                       "[eval] prompt tokens (only what follows is scored), of all rows in `moelab route`")
                    .one_of({"segments", "prompt"}),
                option("warmup_steps", 0, "steps with expert 0 alone, the dense model; then all experts become its copies")
                    .at_least(0).in_steps()},
    .probes = {{"logits", "[T,E]", "what the row's mixture is the softmax of; -1e9 for inactive experts"},
               {"probs", "[T,E]", "the row's mixture"}},
    .differences = {"the first segment is mixed uniformly unless first_segment = \"own_stopgrad\" asks for the paper's rule, "
                    "under which rows see later ones",
                    "the last segment may be shorter", "R starts at N(0, 0.02²); the paper gives no value",
                    "[data] composer = \"similarity\" compares documents by their tokens, not by a retriever's embeddings"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<LoryRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
