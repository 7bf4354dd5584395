// Routers that look back, at the row before or at the layer before, and mutants that do it wrongly.
#include "tests/conformance/mutants.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace moelab {
namespace {

// Which row of the call stands one position before each, -1 where there is none.
Tensor row_before(const RouteInput& in) {
  const Tensor sequence_T = in.sequence_T.contiguous(), position_T = in.position_T.contiguous();
  const auto *sequence = sequence_T.const_data_ptr<int64_t>(), *position = position_T.const_data_ptr<int64_t>();
  Tensor before_T = at::full({in.rows()}, -1, at::kLong);
  for (int64_t t = 0; t < in.rows(); ++t)
    for (int64_t s = 0; s < in.rows(); ++s)
      if (sequence[s] == sequence[t] && position[s] + 1 == position[t]) before_T.mutable_data_ptr<int64_t>()[t] = s;
  return before_T;
}

// A row's logits come from the sum of its x and that of the row before it. While decoding, each sequence's last x is kept.
struct LooksBack : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState& state) const override {
    require_finite(in.x_TD, "x", in);
    RouteInput summed = in;
    summed.router_x = wide(in).add(x_before(in, kept(in, state)));
    if (in.mode == Mode::kDecode) keep(in, state);
    return score(summed);
  }
  virtual Tensor kept(const RouteInput& in, const RouteState& state) const {
    const auto found = state.kept.find("last");
    return found == state.kept.end() ? nothing(in) : found->second;
  }
  virtual void keep(const RouteInput& in, RouteState& state) const {
    Tensor last_BD = kept(in, state).clone();
    write_last(in, last_BD);
    state.kept["last"] = last_BD;
  }
  Tensor wide(const RouteInput& in) const { return in.x_TD.to(weight_ED_.scalar_type()); }
  Tensor nothing(const RouteInput& in) const {
    return at::zeros({in.sequences, spec_.width}, weight_ED_.options().requires_grad(false));
  }
  void write_last(const RouteInput& in, Tensor& last_BD) const {
    const Tensor x_TD = wide(in).detach();
    for (int64_t t = 0; t < in.rows(); ++t) last_BD[in.sequence_T[t].item<int64_t>()].copy_(x_TD[t]);
  }
  Tensor x_before(const RouteInput& in, const Tensor& last_BD) const {
    const Tensor before_T = row_before(in), first_T1 = before_T.lt(0).unsqueeze(1);
    const Tensor x_TD = in.rows() == 0 ? wide(in) : wide(in).index_select(0, before_T.clamp_min(0));
    return at::where(first_T1, last_BD.index_select(0, in.sequence_T), x_TD);
  }
};

struct ForgetsWhileDecoding : LooksBack {
  using LooksBack::LooksBack;
  void keep(const RouteInput&, RouteState&) const override {}
};

// Requests that go on from the same state write into each other's.
struct SharesDecodeState : LooksBack {
  using LooksBack::LooksBack;
  void keep(const RouteInput& in, RouteState& state) const override {
    Tensor& last_BD = state.kept["last"];
    if (!last_BD.defined()) last_BD = nothing(in);
    write_last(in, last_BD);
  }
};

// Hands its logits to the next layer, which adds them to its own.
struct HandsOn : PlainRouter {
  using PlainRouter::PlainRouter;
  NoisyLogits scored(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    return in.carry.defined() ? moved(logits, in.carry) : logits;
  }
  void afterwards(const RouteInput&, RouteOutput& out) const override { out.carry = handed_on(out.scores.clean_TE); }
  virtual Tensor handed_on(const Tensor& logits_TE) const { return logits_TE.mul(0.5); }
};

struct HandsOnTheMean : HandsOn {
  using HandsOn::HandsOn;
  Tensor handed_on(const Tensor& logits_TE) const override {
    return logits_TE.size(0) == 0 ? logits_TE : logits_TE.mean(0, true).expand_as(logits_TE);
  }
};

const Registration<RouterEntry> decode_registrations[] = {
    registered<ForgetsWhileDecoding>("mutant_forgets_while_decoding"),
    registered<SharesDecodeState>("mutant_shares_decode_state"),
    registered<HandsOnTheMean>("mutant_hands_on_the_mean"),
    registered<LooksBack>("control_looks_back"),
    registered<HandsOn>("control_hands_on"),
};

}  // namespace

std::vector<Mutant> decode_mutants() {
  return {
      {"mutant_forgets_while_decoding", "decode", {}},
      {"mutant_shares_decode_state", "decode", {}},
      {"mutant_hands_on_the_mean", "other_rows", {"causality", "decode", "micro_batches", "thread_ranks"}},
  };
}

}  // namespace moelab
