// From logits to a plan: softmax with top-k in one pass, and the counting sort, beside the library's calls and beside the gate's
// matrix product. float32, T = 8192, d = 1024.
#include "bench_support.h"

#include "core/error.h"
#include "core/execute.h"
#include "core/select.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <memory>
#include <tuple>

using namespace moelab;
using namespace moelab::bench;

namespace {

constexpr int64_t kRows = 8192, kWidth = 1024;
constexpr int64_t kInner = 32;  // runs of a line per measurement, some milliseconds: in a layer the choices are in the cache, too

struct Decision {
  int64_t experts, k;
  Tensor x_TD = normal_tensor(random_key(1, "x"), {kRows, kWidth}, 1, at::kFloat);
  Tensor weight_ED = normal_tensor(random_key(1, "router"), {experts, kWidth}, 0.03, at::kFloat);
  Tensor logits_TE = x_TD.matmul(weight_ED.t());
  SoftmaxTopk chosen = softmax_topk(logits_TE, k);
  Tensor kept_TK = at::ones({kRows, k}, at::kBool), none_TK = at::zeros({kRows, k}, at::kBool);

  Decision(int64_t experts_, int64_t k_) : experts(experts_), k(k_) {}
  SparsePlan plan_of(const SoftmaxTopk& of) const {
    return make_sparse_plan({of.choice_TK, kept_TK, none_TK}, of.prob_TK, experts);
  }
};

// What a plain user calls: order and counts of the flattened choices.
std::tuple<Tensor, Tensor> sorted_by_library(const Decision& d) {
  const Tensor expert_N = d.chosen.choice_TK.flatten();
  return {expert_N.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false), at::bincount(expert_N, {}, d.experts)};
}

void check_answers(const Decision& d) {
  check_close(d.chosen.probs_TE, d.logits_TE.softmax(1), "softmax");
  check_close(d.chosen.prob_TK, std::get<0>(d.logits_TE.softmax(1).topk(d.k)), "top-k");
  const SparsePlan plan = d.plan_of(d.chosen);
  const auto [order_N, count_E] = sorted_by_library(d);
  check_invariant(plan.token_N.equal(order_N.floor_divide(d.k)), "permutation: wrong answer before timing");
  check_invariant(plan.offsets_E1.diff().equal(count_E), "counts: wrong answer before timing");
}

void add_decision(Suite& suite, int64_t experts, int64_t k) {
  const auto d = std::make_shared<const Decision>(experts, k);
  check_answers(*d);
  const std::string tail = fmt::format("T{}_d{}_E{}_k{}/threads1", kRows, kWidth, experts, k);
  const double product_flops = 2.0 * static_cast<double>(kRows * kWidth * experts);
  const auto line = [&](const std::string& what, std::function<void()> work, double flops = 0) {
    suite.add(Line{.name = what + "/" + tail, .work = [=] { const at::NoGradGuard no_grad; work(); },
                   .inner = kInner,
                   .counters = {{"rows_per_expert", static_cast<double>(kRows * k / experts)}, {"flops", flops},
                                {"bytes", 4.0 * static_cast<double>(kRows * (flops > 0 ? kWidth : experts))}}});
  };
  line("softmax_topk/fused", [=] { benchmark::DoNotOptimize(softmax_topk(d->logits_TE, k).prob_TK); });
  line("softmax_topk/library", [=] { benchmark::DoNotOptimize(d->logits_TE.softmax(1).topk(k)); });
  line("permutation/counting_sort", [=] { benchmark::DoNotOptimize(d->plan_of(d->chosen).gate_N); });
  line("permutation/library", [=] { benchmark::DoNotOptimize(sorted_by_library(*d)); });
  line("decision/plan", [=] { benchmark::DoNotOptimize(d->plan_of(softmax_topk(router_logits(d->x_TD, d->weight_ED),
                                                                               k)).gate_N); }, product_flops);
  line("decision/gate_product", [=] { benchmark::DoNotOptimize(d->x_TD.matmul(d->weight_ED.t())); }, product_flops);
  const std::string where = fmt::format("E{} k{}: ", experts, k);
  suite.add(RatioRow{where + "library softmax and topk over the fused pass", "softmax_topk/library/" + tail,
                     "softmax_topk/fused/" + tail,
                     experts >= 64 ? 4.0 : 0.0, true});
  suite.add(RatioRow{where + "argsort and bincount over the plan's counting sort", "permutation/library/" + tail,
                     "permutation/counting_sort/" + tail, 10, true});
  suite.add(RatioRow{where + "permutation, ns per routed row", "permutation/counting_sort/" + tail, "", 4, false,
                     1e9 / static_cast<double>(kInner * kRows * k)});
  suite.add(RatioRow{where + "x to plan over the gate's product", "decision/plan/" + tail, "decision/gate_product/" + tail,
                     experts == 64 ? 1.5 : 0.0, false});
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  for (const auto& [experts, k] : {std::pair{8, 2}, {64, 2}, {64, 8}, {256, 8}}) add_decision(suite, experts, k);
  return suite.run(argc, argv);
}
