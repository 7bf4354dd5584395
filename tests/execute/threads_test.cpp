// Our own kernels give the same bits on one, two and three threads, forward and backward.
#include "execute_support.h"

#include "core/select.h"
#include "tests/experts/experts_support.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;

namespace {

// `work` gives the tensors to compare.
template <class Work>
void same_bits(Work work) {
  const auto on = [&](int threads) {
    at::set_num_threads(threads);
    const std::vector<Tensor> values = work();
    at::set_num_threads(1);
    return values;
  };
  const std::vector<Tensor> one = on(1);
  for (const int threads : {2, 3}) {
    const std::vector<Tensor> more = on(threads);
    REQUIRE(one.size() == more.size());
    for (size_t i = 0; i < one.size(); ++i) {
      INFO(threads << " threads, tensor " << i);
      CHECK(at::equal(one[i], more[i]));
    }
  }
}

void same_bits_of(const SparsePlan& plan, const Tensor& gate_TK, const ExpertBank& bank, int64_t width, at::ScalarType dtype,
                  const ExecutorUse& use) {
  std::mt19937_64 draw(64);
  const PlanCase at{plan, random_leaf(draw, {plan.rows, width}, dtype), {gate_TK}};
  const Tensor grad_y_TD = random_leaf(draw, {plan.rows, width}, dtype, false);
  same_bits([&] { return outcomes(at, bank, grad_y_TD, use); });
}

// One expert takes all; few experts in several blocks; anything.
std::vector<SparseCase> three_plans(at::ScalarType gate_dtype) {
  std::mt19937_64 draw(63);
  return {one_takes_all(draw, 1300, 8, gate_dtype), random_sparse_case(draw, 900, 3, 1, 0.3, gate_dtype),
          random_sparse_case(draw, 300, 8, 3, 0.1, gate_dtype)};
}

}  // namespace

TEST_CASE("same bits on 1, 2, 3 threads: feed-forward experts in float, double and bfloat16, kept or recomputed") {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16})
    for (const SparseCase& sparse : three_plans(dtype == at::kDouble ? at::kDouble : at::kFloat))
      for (const char* activation : {"gelu", "swiglu"})
        for (const ExecutorUse& use : {kUses[0], kUses[1]}) {
          INFO(at::toString(dtype) << ", " << activation << ", " << use.name << ", rows " << sparse.plan.rows);
          const auto bank = ffn_bank(32, sparse.plan.experts, 64, activation, true, dtype);
          same_bits_of(sparse.plan, sparse.gate_TK, *bank, 32, dtype, use);
        }
}

TEST_CASE("same bits on 1, 2, 3 threads: experts of unequal widths, and of several kinds") {
  const GivenOptions wide{{"activation", std::string("gelu")}, {"width", int64_t{48}}};
  for (const SparseCase& sparse : three_plans(at::kFloat)) {
    std::vector<int64_t> widths(static_cast<size_t>(sparse.plan.experts), 24);
    widths.back() = 40;
    const auto unequal = bank_of("ffn", 32, sparse.plan.experts, {{"widths", widths}}, at::kFloat);
    const auto mixed = mixed_bank({{"ffn", 1, wide}, {"identity", 1}, {"zero", sparse.plan.experts - 2}}, 32, at::kFloat);
    same_bits_of(sparse.plan, sparse.gate_TK, *unequal, 32, at::kFloat, kUses[0]);
    same_bits_of(sparse.plan, sparse.gate_TK, *mixed, 32, at::kFloat, kUses[0]);
  }
}

TEST_CASE("same bits on 1, 2, 3 threads: dispatch and combine") {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    std::mt19937_64 draw(7);
    const SparseCase sparse = random_sparse_case(draw, 2048, 8, 3, 0.1, dtype == at::kDouble ? at::kDouble : at::kFloat);
    const Tensor x_TD = random_leaf(draw, {2048, 96}, dtype), grad_y_TD = random_leaf(draw, {2048, 96}, dtype, false);
    same_bits([&] {
      x_TD.mutable_grad() = Tensor(), sparse.gate_TK.mutable_grad() = Tensor();
      const Tensor y_TD = combine_rows(dispatch_rows(x_TD, sparse.plan), sparse.plan);
      y_TD.backward(grad_y_TD, /*retain_graph=*/true);
      return std::vector<Tensor>{y_TD.detach(), x_TD.grad(), sparse.gate_TK.grad()};
    });
  }
}

TEST_CASE("same bits on 1, 2, 3 threads: softmax and top-k, their gradients, and the plan of the choice") {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble})
    for (const int64_t experts : {5, 64, 100, 1025}) {
      std::mt19937_64 draw(8);
      const int64_t rows = 700, k = 4;
      const Tensor logits_TE = random_leaf(draw, {rows, experts}, dtype),
                   grad_TE = random_leaf(draw, {rows, experts}, dtype, false),
                   grad_TK = random_leaf(draw, {rows, k}, dtype, false);
      same_bits([&] {
        logits_TE.mutable_grad() = Tensor();
        const SoftmaxTopk out = softmax_topk(logits_TE, k);
        out.probs_TE.mul(grad_TE).sum().add(out.prob_TK.mul(grad_TK).sum()).backward();
        const Tensor all_TK = at::ones({rows, k}, at::kBool);
        const SparsePlan plan = make_sparse_plan({out.choice_TK, all_TK, all_TK.logical_not()}, out.prob_TK.detach(), experts);
        return std::vector<Tensor>{out.probs_TE.detach(), out.choice_TK, out.prob_TK.detach(), logits_TE.grad(),
                                   plan.token_N,          plan.gate_N,   plan.slot_TK};
      });
    }
}

// Their products are the library's, one per expert, and short enough that it splits none.
TEST_CASE("same bits on 1, 2, 3 threads: adapters and patch experts") {
  for (const char* kind : {"lora", "conv"})
    for (const SparseCase& sparse : three_plans(at::kFloat)) {
      INFO(kind << ", rows " << sparse.plan.rows);
      const auto bank = bank_of(kind, 32, sparse.plan.experts, {}, at::kFloat);
      std::mt19937_64 draw(9);
      for (const NamedTensor& entry : bank->parameters())
        entry.tensor.detach().add_(random_leaf(draw, entry.tensor.sizes().vec(), at::kFloat, false), 0.3);
      for (const ExecutorUse& use : {kUses[0], kUses[2]}) same_bits_of(sparse.plan, sparse.gate_TK, *bank, 32, at::kFloat, use);
    }
}
