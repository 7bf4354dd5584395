// Attention heads with unit weights are dense attention; the gates of mixture-of-head attention sum to 1.
#include "heads_support.h"

#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

// Zero logits, the sigmoid's 1/2 and scale 2: every gate is 1.
const std::string kUnitGates = "[moe.router]\nname = \"sigmoid_topk\"\nscale = 2.0\nk = ";

void zero_deciders(const RoutedAttention& attention) {
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : attention.parameters())
    if (entry.name.find("router.weight") != std::string::npos || entry.name == "split.weight" ||
        entry.name == "shared_gate.weight")
      entry.tensor.zero_();
}

// A sequence of five rows.
RouteInput one_sequence(std::mt19937_64& draw, Comm* comm) {
  RouteInput in;
  in.x_TD = random_leaf(draw, {5, kWidth}, at::kDouble, false);
  in.sequence_T = in.sequence_key_T = at::zeros({5}, at::kLong);
  in.position_T = at::arange(5, at::kLong);
  in.mode = Mode::kEval;
  in.comm = comm;
  return in;
}

// Head h of one side of switchhead: the sum of the experts that it chose.
Tensor chosen_sum(const RoutedAttention& m, const std::string& side, const char* map, const std::vector<int64_t>& chosen) {
  std::vector<Tensor> heads;
  for (int64_t h = 0; h < 3; ++h)
    heads.push_back(
        head_tensor(m, side + std::to_string(h) + ".experts." + map).index_select(0, at::tensor(chosen, at::kLong)).sum(0));
  return at::stack(heads);
}

std::vector<Assignment> all_rows_choose(size_t sites, const std::vector<int64_t>& chosen) {
  const Tensor choice_TK = at::tensor(chosen, at::kLong).unsqueeze(0).expand({5, -1}).contiguous();
  const Tensor all_TK = at::ones_like(choice_TK, at::kBool);
  return std::vector<Assignment>(sites, {.choice_TK = choice_TK, .kept_TK = all_TK, .dropped_TK = all_TK.logical_not()});
}

}  // namespace

TEST_CASE("attention_head: all heads with unit weights are dense multi-head attention; so are chosen experts of switchhead") {
  struct DenseCase {
    HeadCase at;
    std::vector<int64_t> chosen;
  };
  for (const auto& [at, chosen] : {DenseCase{{.style = "moh", .tables = kUnitGates + "3", .heads = 3, .experts = 3}, {0, 1, 2}},
                                   DenseCase{{.style = "switchhead", .tables = kUnitGates + "1", .heads = 3, .experts = 1}, {0}},
                                   DenseCase{{.style = "switchhead", .tables = kUnitGates + "4", .heads = 3}, {0, 1, 2, 3}},
                                   DenseCase{{.style = "switchhead", .tables = kUnitGates + "2", .heads = 3}, {3, 1}}}) {
    CAPTURE(at.style, chosen);
    const auto attention = attention_of(at);
    zero_deciders(*attention);
    const auto comm = single_comm();
    std::mt19937_64 draw(9);
    const RouteInput in = one_sequence(draw, comm.get());
    AttentionSpec spec;
    spec.width = kWidth;
    spec.heads = 3;
    spec.context = 5;
    spec.dtype = at::kDouble;
    SelfAttention dense(spec);
    const bool moh = at.style == "moh";
    const at::NoGradGuard no_grad;
    if (moh) head_tensor(*attention, "shared.w_o").zero_();  // the one shared head is not part of the comparison
    const auto set = [&](const char* name, const Tensor& weight_HAD) {
      head_tensor(dense, name).copy_(weight_HAD.reshape({kWidth, kWidth}));
    };
    set("q", head_tensor(*attention, moh ? "experts.w_q" : "shared.w_q"));
    set("k", head_tensor(*attention, moh ? "experts.w_k" : "shared.w_k"));
    set("v", moh ? head_tensor(*attention, "experts.w_v") : chosen_sum(*attention, "value", "w_v", chosen));
    const Tensor o_HDA = moh ? head_tensor(*attention, "experts.w_o") : chosen_sum(*attention, "output", "w_o", chosen);
    set("o", o_HDA.permute({1, 0, 2}));
    const HeadOutcome routed = head_outcome(*attention, in, {}, all_rows_choose(attention->sites().size(), chosen));
    CHECK(relative_error(routed.values[0], dense.forward(in.x_TD.unsqueeze(0))[0]) < 1e-10);
  }
}

// y_t = Σ_h W_o^h · Σ_s softmax_s(q_h·k_s/√A)·v_s with one key and one value per row.
TEST_CASE("attention_head: all heads of moa with unit weights are multi-query attention") {
  const HeadCase at{.style = "moa", .tables = kUnitGates + "4", .rotary = false, .heads = 2};
  const auto attention = attention_of(at);
  zero_deciders(*attention);
  const auto comm = single_comm();
  std::mt19937_64 draw(10);
  const RouteInput in = one_sequence(draw, comm.get());
  const at::NoGradGuard no_grad;
  const Tensor w_q = head_tensor(*attention, "experts.w_q"), w_o = head_tensor(*attention, "experts.w_o"),
               key_TA = in.x_TD.mm(head_tensor(*attention, "shared.w_k")[0].t()),
               value_TA = in.x_TD.mm(head_tensor(*attention, "shared.w_v")[0].t()), y_TD = at::zeros({5, kWidth}, at::kDouble);
  for (int64_t h = 0; h < kExperts; ++h)
    for (int64_t t = 0; t < 5; ++t) {
      const Tensor score_S = key_TA.narrow(0, 0, t + 1).mv(w_q[h].mv(in.x_TD[t])).div(std::sqrt(3.0)).exp();
      y_TD[t] += w_o[h].mv(value_TA.narrow(0, 0, t + 1).t().mv(score_S / score_S.sum()));
    }
  CHECK(relative_error(head_outcome(*attention, in, {}).values[0], y_TD) < 1e-10);
}

TEST_CASE("attention_head: moh divides the gates of a row by their sum, unless told otherwise") {
  const auto comm = single_comm();
  std::mt19937_64 draw(11);
  const RouteInput in = one_sequence(draw, comm.get());
  const at::NoGradGuard no_grad;
  const auto output = [&](const char* gates, const char* expert) {
    const auto attention = attention_of(
        {.style = "moh", .tables = std::string("[moe.router]\nk = 2\nrenormalise = ") + gates, .expert = expert, .heads = 3});
    return head_outcome(*attention, in, {}).values[0];
  };
  const Tensor as_told = output("\"none\"", "normalise = false\n");
  CHECK(relative_error(output("\"none\"", ""), output("\"before_drop\"", "normalise = false\n")) < 1e-8);  // its guard is 1e-9
  CHECK(relative_error(output("\"none\"", ""), as_told) > 1e-3);
}
