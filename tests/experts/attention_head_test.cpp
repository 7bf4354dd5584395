// Attention heads against one dot product at a time, in three styles; interleaved sequences of unequal lengths, any number of
// heads.
#include "core/config.h"
#include "core/model/routed_attention.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

constexpr int64_t kWidth = 6, kExperts = 4;

struct HeadCase {
  std::string style = "moa";
  std::string tables = "";  // more of [moe.router] and [moe.expert]
  bool causal = true;
  bool rotary = true;
  int64_t heads = 2;        // of the model: a head's size is 6 / heads
  int64_t experts = kExperts;
};

std::shared_ptr<RoutedAttention> attention_of(const HeadCase& at) {
  const std::string text = "[moe]\nexperts = " + std::to_string(at.experts) + "\n" + at.tables + "\n";
  const std::string head = "[moe.expert]\nname = \"attention_head\"\nstyle = \"" + at.style + "\"\n";
  AttentionPlace place;
  place.path = "attention";
  place.attention.width = kWidth;
  place.attention.heads = at.heads;
  place.attention.causal = at.causal;
  place.attention.rotary = at.rotary;
  place.layer = read_layer(parse_config(text + head, "heads.toml"), kWidth, 0, 0, at::kDouble, random_key(3, "heads"));
  const auto attention = Registry<ExpertEntry>::instance().find("attention_head").make_attention(place);
  std::mt19937_64 draw(4);
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : attention->parameters())
    entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), at::kDouble, false));
  return attention;
}

// Seven rows of two sequences, 4 and 3 long, interleaved, and out of order within the first.
RouteInput mixed_rows(const Tensor& x_TD, Comm* comm) {
  RouteInput in;
  in.x_TD = x_TD;
  in.sequence_T = in.sequence_key_T = at::tensor({0, 1, 0, 0, 1, 0, 1}, at::kLong);
  in.position_T = at::tensor({0, 0, 2, 1, 1, 3, 2}, at::kLong);
  in.sequences = 2;
  in.mode = Mode::kEval;
  in.comm = comm;
  return in;
}

Tensor head_tensor(const Module& module, const std::string& name) {
  for (const NamedTensor& entry : module.parameters())
    if (entry.name == name) return entry.tensor;
  FAIL("no parameter " << name);
  return {};
}

Tensor head_turned(const Tensor& x_A, int64_t position) {
  const int64_t half = x_A.size(0) / 2;
  std::vector<Tensor> low, high;
  for (int64_t i = 0; i < half; ++i) {
    const double angle =
        static_cast<double>(position) * std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(2 * half));
    low.push_back(x_A[i] * std::cos(angle) - x_A[i + half] * std::sin(angle));
    high.push_back(x_A[i + half] * std::cos(angle) + x_A[i] * std::sin(angle));
  }
  low.insert(low.end(), high.begin(), high.end());
  return at::stack(low);
}

// Attention of row t with query q over the rows of its sequence, keys and values one row at a time.
Tensor plain_head(const HeadCase& at, const RouteInput& in, int64_t t, const Tensor& q_A, const Tensor& w_k,
                  const std::vector<Tensor>& values) {
  const auto position = [&](int64_t row) { return in.position_T[row].item<int64_t>(); };
  std::vector<Tensor> scores, seen;
  for (int64_t s = 0; s < in.rows(); ++s) {
    if (in.sequence_T[s].item<int64_t>() != in.sequence_T[t].item<int64_t>() || (at.causal && position(s) > position(t)))
      continue;
    const Tensor k_A = w_k.mv(in.x_TD[s]);
    const Tensor q = at.rotary ? head_turned(q_A, position(t)) : q_A, k = at.rotary ? head_turned(k_A, position(s)) : k_A;
    scores.push_back(q.dot(k) / std::sqrt(static_cast<double>(q.size(0))));
    seen.push_back(values[static_cast<size_t>(s)]);
  }
  const Tensor weight = at::stack(scores).exp();
  return (weight / weight.sum()).unsqueeze(0).mm(at::stack(seen))[0];
}

std::vector<Tensor> plain_values(const RouteInput& in, const Tensor& w_v) {
  std::vector<Tensor> values;
  for (int64_t s = 0; s < in.rows(); ++s) values.push_back(w_v.mv(in.x_TD[s]));
  return values;
}

// gate[t][e] of a decision, on the graph.
Tensor gates_of(const LayerOutput& out, int64_t experts) {
  const auto& plan = std::get<SparsePlan>(out.routed.plan);
  return at::zeros({plan.rows, experts}, at::kDouble).index_put({plan.token_N, plan.expert_N}, plan.gate_N);
}

Tensor plain_moa(const HeadCase& at, const RoutedAttention& m, const RouteInput& in, const std::vector<LayerOutput>& outs) {
  const Tensor gate_TE = gates_of(outs.at(0), at.experts), w_k = head_tensor(m, "shared.w_k")[0];
  const std::vector<Tensor> values = plain_values(in, head_tensor(m, "shared.w_v")[0]);
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < in.rows(); ++t) {
    Tensor y = at::zeros({kWidth}, at::kDouble);
    for (int64_t e = 0; e < at.experts; ++e) {
      if (gate_TE[t][e].item<double>() == 0) continue;
      const Tensor head = plain_head(at, in, t, head_tensor(m, "experts.w_q")[e].mv(in.x_TD[t]), w_k, values);
      y = y + gate_TE[t][e] * head_tensor(m, "experts.w_o")[e].mv(head);
    }
    rows.push_back(y);
  }
  return at::stack(rows);
}

Tensor plain_moh(const HeadCase& at, const RoutedAttention& m, const RouteInput& in, const std::vector<LayerOutput>& outs) {
  const Tensor gate_TE = gates_of(outs.at(0), at.experts);
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < in.rows(); ++t) {
    const Tensor split = head_tensor(m, "split.weight").mv(in.x_TD[t]).softmax(0) * 2;
    const Tensor shared = head_tensor(m, "shared_gate.weight").mv(in.x_TD[t]).softmax(0);
    const auto chosen = static_cast<double>(gate_TE[t].count_nonzero().item<int64_t>());
    Tensor y = at::zeros({kWidth}, at::kDouble);
    const auto add = [&](const std::string& bank, int64_t h, const Tensor& weight) {
      const auto map = [&](const char* name) { return head_tensor(m, bank + name)[h]; };
      const Tensor head = plain_head(at, in, t, map("w_q").mv(in.x_TD[t]), map("w_k"), plain_values(in, map("w_v")));
      y = y + weight * map("w_o").mv(head);
    };
    for (int64_t h = 0; h < shared.size(0); ++h) add("shared.", h, split[0] * shared[h] * static_cast<double>(shared.size(0)));
    for (int64_t e = 0; e < at.experts; ++e) add("experts.", e, split[1] * gate_TE[t][e] * chosen);
    rows.push_back(y);
  }
  return at::stack(rows);
}

Tensor plain_switchhead(const HeadCase& at, const RoutedAttention& m, const RouteInput& in,
                        const std::vector<LayerOutput>& outs) {
  std::vector<Tensor> rows(static_cast<size_t>(in.rows()), at::zeros({kWidth}, at::kDouble));
  for (int64_t h = 0; h < at.heads; ++h) {
    const Tensor value_TE = gates_of(outs.at(static_cast<size_t>(h)), at.experts);
    const Tensor output_TE = gates_of(outs.at(static_cast<size_t>(at.heads + h)), at.experts);
    const std::string number = std::to_string(h);
    std::vector<Tensor> values;
    for (int64_t s = 0; s < in.rows(); ++s) {
      Tensor v = at::zeros({kWidth / at.heads}, at::kDouble);
      for (int64_t e = 0; e < at.experts; ++e)
        v = v + value_TE[s][e] * head_tensor(m, "value" + number + ".experts.w_v")[e].mv(in.x_TD[s]);
      values.push_back(v);
    }
    for (int64_t t = 0; t < in.rows(); ++t) {
      const Tensor head =
          plain_head(at, in, t, head_tensor(m, "shared.w_q")[h].mv(in.x_TD[t]), head_tensor(m, "shared.w_k")[h], values);
      for (int64_t e = 0; e < at.experts; ++e)
        rows[static_cast<size_t>(t)] =
            rows[static_cast<size_t>(t)] + output_TE[t][e] * head_tensor(m, "output" + number + ".experts.w_o")[e].mv(head);
    }
  }
  return at::stack(rows);
}

Tensor plain_attention(const HeadCase& at, const RoutedAttention& m, const RouteInput& in, const std::vector<LayerOutput>& outs) {
  if (at.style == "moa") return plain_moa(at, m, in, outs);
  return at.style == "moh" ? plain_moh(at, m, in, outs) : plain_switchhead(at, m, in, outs);
}

void check_case(const HeadCase& at) {
  const auto attention = attention_of(at);
  const auto comm = single_comm();
  std::mt19937_64 draw(8);
  const Tensor x_TD = random_leaf(draw, {7, kWidth}, at::kDouble), grad_TD = random_leaf(draw, {7, kWidth}, at::kDouble, false);
  const RouteInput in = mixed_rows(x_TD, comm.get());
  SiteWalk walk(in);
  const Tensor y_TD = attention->forward(x_TD, walk, nullptr);
  const std::vector<LayerOutput> outs = walk.take();
  REQUIRE(outs.size() == attention->sites().size());
  std::vector<Tensor> leaves{x_TD};
  for (const NamedTensor& entry : attention->parameters()) leaves.push_back(entry.tensor);
  const auto gradients = [&](const Tensor& y) {
    for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
    y.backward(grad_TD, /*keep_graph=*/true);
    std::vector<Tensor> all{y};
    for (const Tensor& leaf : leaves) all.push_back(leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf));
    return all;
  };
  const auto routed = gradients(y_TD), plain = gradients(plain_attention(at, *attention, in, outs));
  for (size_t i = 0; i < plain.size(); ++i) {
    CAPTURE(at.style, at.tables, at.causal, i);
    CHECK(relative_error(routed[i], plain[i]) < 1e-9);
  }
}

}  // namespace

TEST_CASE("attention_head: every style equals one dot product at a time, causal and bidirectional, in values and gradients") {
  for (const bool causal : {true, false}) {
    check_case({.style = "moa", .tables = "[moe.router]\nk = 2", .causal = causal, .heads = 1});
    check_case(
        {.style = "moa", .tables = "[moe.router]\nname = \"top_p\"\np = 0.7", .causal = causal, .rotary = false, .heads = 2});
    check_case({.style = "moh", .tables = "[moe.router]\nk = 2\nrenormalise = \"before_drop\"", .causal = causal, .heads = 3});
    check_case(
        {.style = "moh", .tables = "[moe.router]\nname = \"top_p\"\np = 0.7", .causal = causal, .rotary = false, .heads = 2});
    check_case({.style = "switchhead", .tables = "[moe.router]\nname = \"sigmoid_topk\"\nk = 2", .causal = causal, .heads = 3});
  }
}

TEST_CASE("attention_head: all heads with unit weights are dense multi-head attention") {
  // Equal logits give equal gates, and moh multiplies by their number; a lone expert has the gate 1.
  const std::string all = "[moe.router]\nk = 3";
  for (const HeadCase& at : {HeadCase{.style = "moh", .tables = all, .heads = 3, .experts = 3},
                             HeadCase{.style = "switchhead", .tables = "[moe.router]\nk = 1", .heads = 3, .experts = 1}}) {
    const auto attention = attention_of(at);
    const auto comm = single_comm();
    {
      const at::NoGradGuard no_grad;
      for (const NamedTensor& entry : attention->parameters())
        if (entry.name.find("router.weight") != std::string::npos || entry.name == "split.weight" ||
            entry.name == "shared_gate.weight")
          entry.tensor.zero_();
    }
    AttentionSpec spec;
    spec.width = kWidth;
    spec.heads = 3;
    spec.context = 5;
    spec.dtype = at::kDouble;
    SelfAttention dense(spec);
    const bool moh = at.style == "moh";
    std::mt19937_64 draw(9);
    const Tensor x_TD = random_leaf(draw, {5, kWidth}, at::kDouble, false);
    RouteInput in;
    in.x_TD = x_TD;
    in.sequence_T = in.sequence_key_T = at::zeros({5}, at::kLong);
    in.position_T = at::arange(5, at::kLong);
    in.mode = Mode::kEval;
    in.comm = comm.get();
    const at::NoGradGuard no_grad;
    if (moh) head_tensor(*attention, "shared.w_o").zero_();  // the one shared head is not part of the comparison
    const auto set = [&](const char* name, const Tensor& weight_HAD) {
      head_tensor(dense, name).copy_(weight_HAD.reshape({kWidth, kWidth}));
    };
    const auto side = [&](const std::string& which, const char* map) {
      std::vector<Tensor> heads;
      for (int64_t h = 0; h < 3; ++h) heads.push_back(head_tensor(*attention, which + std::to_string(h) + ".experts." + map)[0]);
      return at::stack(heads);
    };
    set("q", head_tensor(*attention, moh ? "experts.w_q" : "shared.w_q"));
    set("k", head_tensor(*attention, moh ? "experts.w_k" : "shared.w_k"));
    set("v", moh ? head_tensor(*attention, "experts.w_v") : side("value", "w_v"));
    set("o", (moh ? head_tensor(*attention, "experts.w_o") : side("output", "w_o")).permute({1, 0, 2}));
    SiteWalk walk(in);
    CHECK(relative_error(attention->forward(x_TD, walk, nullptr), dense.forward(x_TD.unsqueeze(0))[0]) < 1e-10);
  }
}

TEST_CASE("attention_head: routers without sparse plans and odd heads under rotary positions are refused") {
  using Catch::Matchers::ContainsSubstring;
  using Catch::Matchers::MessageMatches;
  CHECK_THROWS_MATCHES(attention_of({.tables = "[moe.router]\nname = \"soft_moe\""}), std::exception,
                       MessageMatches(ContainsSubstring("use a router with a sparse plan")));
  CHECK_THROWS_MATCHES(attention_of({.tables = "[moe.router]\nk = 1", .heads = 2}), std::exception,
                       MessageMatches(ContainsSubstring("odd")));
}
