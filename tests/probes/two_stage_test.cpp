// Probe: a bank of two stages. Experts are attention heads with their own W_q and W_o; keys and values are shared. One decision
// routes the query side and the output side, and the module's own code, the attention, runs in between on one row per pair.
#include "core/error.h"
#include "core/execute.h"
#include "core/grouped.h"
#include "../support/sparse_cases.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

constexpr int64_t kWidth = 6, kHead = 4, kHeads = 5;

class HeadBank : public ExpertBank {
 public:
  explicit HeadBank(std::mt19937_64& draw)
      : w_q_(add_parameter("w_q", random_leaf(draw, {kHeads, kHead, kWidth}, at::kDouble))),
        w_o_(add_parameter("w_o", random_leaf(draw, {kHeads, kWidth, kHead}, at::kDouble))) {
    groups_.push_back({.first = 0, .experts = kHeads, .stacked = {{"w_q", w_q_}, {"w_o", w_o_}}});
  }
  int stages() const override { return 2; }
  int64_t output_width(int stage) const override { return stage == 0 ? kHead : kWidth; }
  double flops_per_row(int64_t) const override { return 4.0 * kHead * kWidth; }
  void reset_expert(int64_t, RandomKey) override {}
  Tensor forward(const ExpertContext& context, int stage) const override {
    return grouped_linear(context.rows_ND, stage == 0 ? w_q_ : w_o_, {}, context.offsets_E1);
  }
  Tensor w_q_, w_o_;
};

// Causal attention of one query row per pair over the keys of its row's past.
Tensor attend_pairs(const Tensor& query_NH, const Tensor& key_TH, const Tensor& value_TH, const Tensor& token_N) {
  const Tensor future_NT = at::arange(key_TH.size(0)).unsqueeze(0).gt(token_N.unsqueeze(1));
  return query_NH.matmul(key_TH.t()).masked_fill(future_NT, -1e30).softmax(1).matmul(value_TH);
}

}  // namespace

TEST_CASE("attention heads: one decision routes the query side and the output side") {
  std::mt19937_64 draw(17);
  const int64_t rows = 11;
  HeadBank bank(draw);
  const SparseCase at_hand = random_sparse_case(draw, rows, kHeads, 3, 0.2, at::kDouble);
  const SparsePlan& plan = at_hand.plan;
  const Tensor x_TD = random_leaf(draw, {rows, kWidth}, at::kDouble);
  const Tensor grad_y_TD = random_leaf(draw, {rows, kWidth}, at::kDouble, false);
  const Tensor w_k = random_leaf(draw, {kWidth, kHead}, at::kDouble), w_v = random_leaf(draw, {kWidth, kHead}, at::kDouble);
  const std::vector<Tensor> leaves{x_TD, w_k, w_v, at_hand.gate_TK, bank.w_q_, bank.w_o_};

  const auto gradients = [&](const Tensor& y_TD) {
    for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
    y_TD.backward(grad_y_TD, true);
    std::vector<Tensor> grads{y_TD};
    for (const Tensor& leaf : leaves) grads.push_back(leaf.grad());
    return grads;
  };

  const ExecuteInput input{.x_TD = x_TD};
  const Tensor key_TH = x_TD.matmul(w_k), value_TH = x_TD.matmul(w_v);
  const Tensor query_NH = map_pairs(plan, bank, dispatch_rows(x_TD, plan), input, 0);
  const Tensor attended_NH = attend_pairs(query_NH, key_TH, value_TH, plan.token_N);
  const auto routed = gradients(combine_rows(map_pairs(plan, bank, attended_NH, input, 1), plan));

  // Dense: every head over every row, weighted with its gate or 0.
  const Tensor gate_TE = at::zeros({rows, kHeads}, at::kDouble).index_put({plan.token_N, plan.expert_N}, plan.gate_N);
  Tensor y_TD = at::zeros({rows, kWidth}, at::kDouble);
  for (int64_t h = 0; h < kHeads; ++h) {
    const Tensor head_TH = attend_pairs(x_TD.matmul(bank.w_q_[h].t()), x_TD.matmul(w_k), x_TD.matmul(w_v), at::arange(rows));
    y_TD = y_TD + gate_TE.select(1, h).unsqueeze(1) * head_TH.matmul(bank.w_o_[h].t());
  }
  const auto dense = gradients(y_TD);
  for (size_t i = 0; i < dense.size(); ++i) CHECK(relative_error(routed[i], dense[i]) < 1e-10);
  CHECK_THROWS_AS(execute(plan, bank, input), Error);  // the attention in between is the module's to run
}
