// Attention heads against one dot product at a time, in three styles; interleaved sequences of unequal lengths, any number of
// heads, every executor.
#include "heads_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <algorithm>
#include <cmath>

using namespace moelab;
using namespace moelab::testing;

namespace {

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
    const Tensor sum = chosen == 0 ? at::ones({}, at::kDouble) : gate_TE[t].sum();
    Tensor y = at::zeros({kWidth}, at::kDouble);
    const auto add = [&](const std::string& bank, int64_t h, const Tensor& weight) {
      const auto map = [&](const char* name) { return head_tensor(m, bank + name)[h]; };
      const Tensor head = plain_head(at, in, t, map("w_q").mv(in.x_TD[t]), map("w_k"), plain_values(in, map("w_v")));
      y = y + weight * map("w_o").mv(head);
    };
    for (int64_t h = 0; h < shared.size(0); ++h) add("shared.", h, split[0] * shared[h] * static_cast<double>(shared.size(0)));
    for (int64_t e = 0; e < at.experts; ++e) add("experts.", e, split[1] * gate_TE[t][e] / sum * chosen);
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

// Against 1 where all is smaller: over a lone key the gradient of a query is 0 but for rounding.
void check_same(const std::vector<Tensor>& a, const std::vector<Tensor>& b, double tolerance) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < b.size(); ++i) {
    CAPTURE(i);
    REQUIRE(a[i].sizes() == b[i].sizes());
    if (b[i].numel() == 0) continue;
    const double size = std::max(1.0, b[i].abs().max().item<double>());
    REQUIRE((a[i] - b[i]).abs().max().item<double>() < tolerance * size);
  }
}

const std::vector<std::string> kHeadExecutions{"auto", "loop", "grouped", "bmm", "reference"};

void check_case(HeadCase at) {
  const auto comm = single_comm();
  std::mt19937_64 draw(8);
  const Tensor x_TD = random_leaf(draw, {7, kWidth}, at::kDouble), grad_TD = random_leaf(draw, {7, kWidth}, at::kDouble, false);
  const RouteInput in = mixed_rows(x_TD, comm.get());
  std::vector<Tensor> plain;  // of the first; all have the same parameters and decide the same
  for (const std::string& execution : kHeadExecutions) {
    at.execution = execution;
    CAPTURE(at.style, at.tables, at.causal, execution);
    const auto attention = attention_of(at);
    const HeadOutcome routed = head_outcome(*attention, in, grad_TD);
    if (plain.empty()) plain = with_gradients(*attention, in, plain_attention(at, *attention, in, routed.outs), grad_TD);
    check_same(routed.values, plain, 1e-9);
  }
}

// Up to three interleaved sequences, each row at its place within its own.
RouteInput random_rows(std::mt19937_64& draw, int64_t rows, Comm* comm) {
  RouteInput in;
  in.x_TD = random_leaf(draw, {rows, kWidth}, at::kDouble);
  in.sequences = 3;
  in.sequence_T = at::empty({rows}, at::kLong);
  in.position_T = at::empty({rows}, at::kLong);
  std::vector<int64_t> next(3, 0);
  for (int64_t t = 0; t < rows; ++t) {
    const auto b = static_cast<int64_t>(draw() % 3);
    in.sequence_T[t] = b;
    in.position_T[t] = next[static_cast<size_t>(b)]++;
  }
  in.sequence_key_T = in.sequence_T;
  in.mode = Mode::kEval;
  in.comm = comm;
  return in;
}

// By turns: every row a number of its own, from none to all; one head for all rows; all heads; rows without a head but for one.
Assignment random_choice(std::mt19937_64& draw, int kind, int64_t rows) {
  const Tensor choice_TK = at::empty({rows, kExperts}, at::kLong), kept_TK = at::zeros({rows, kExperts}, at::kBool);
  const auto one = static_cast<int64_t>(draw() % kExperts);
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<int64_t> order{0, 1, 2, 3};
    std::shuffle(order.begin(), order.end(), draw);
    const auto some = static_cast<int64_t>(draw() % (kExperts + 1));
    for (int64_t k = 0; k < kExperts; ++k) {
      const int64_t head = order[static_cast<size_t>(k)];
      choice_TK[t][k] = head;
      kept_TK[t][k] = kind == 0 ? k < some : kind == 1 ? head == one : kind == 2 || (t == 0 && k == 0);
    }
  }
  return {.choice_TK = choice_TK, .kept_TK = kept_TK, .dropped_TK = kept_TK.logical_not()};
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

TEST_CASE("attention_head: every executor is the reference on random decisions, in values and gradients") {
  const auto comm = single_comm();
  std::mt19937_64 draw(19);
  for (const std::string style : {"moa", "moh", "switchhead"}) {
    std::vector<std::shared_ptr<RoutedAttention>> by_execution;
    for (const std::string& execution : kHeadExecutions)
      by_execution.push_back(attention_of({.style = style,
                                           .tables = "[moe.router]\nname = \"sigmoid_topk\"\nk = 4",
                                           .rotary = false,
                                           .heads = style == "switchhead" ? 2 : 1,
                                           .execution = execution}));
    for (int i = 0; i < 40; ++i) {
      const RouteInput in = random_rows(draw, i % 8 == 7 ? 0 : 1 + static_cast<int64_t>(draw() % 12), comm.get());
      const Tensor grad_TD = random_leaf(draw, in.x_TD.sizes().vec(), at::kDouble, false);
      std::vector<Assignment> forced;
      for (size_t s = 0; s < by_execution[0]->sites().size(); ++s) forced.push_back(random_choice(draw, i % 4, in.rows()));
      const auto reference = head_outcome(*by_execution.back(), in, grad_TD, forced);
      for (size_t e = 0; e + 1 < kHeadExecutions.size(); ++e) {
        CAPTURE(style, i, kHeadExecutions[e]);
        check_same(head_outcome(*by_execution[e], in, grad_TD, forced).values, reference.values, 1e-10);
      }
    }
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
