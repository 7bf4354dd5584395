// Top-p routing, as many experts as a row needs:
// Harder Tasks Need More Experts: Dynamic Routing in MoE Models
// Huang, An, Zhuang, Tao, Zhang, Jin, Xu, Chen, Huang, Feng, 2024, arXiv:2403.07652
//
//   P = softmax(W x);  A = shortest prefix of the experts, largest P first, whose Σ P > p;  gate_a = P_a
//   losses 0.01 · E · Σ_e f_e P_e, f = share of the choices that fall on e, and 1e-4 · mean_t Σ_e -P ln P
//
// The expert that crosses p is kept, so that every row has one: p = 0 takes the best alone, p = 1 takes all. Gates are not
// renormalised. The number of experts has no gradient; the entropy loss is what keeps it small.
//
// Differences from the paper: k_max caps the number of experts; where f counts a varying number of choices it is divided by
// their mean, so that perfect balance reads 1; W starts at N(0, 0.02²).
#include "core/linear_router.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>

#include <algorithm>

namespace moelab {
namespace {

class TopP : public LinearRouter {
 public:
  explicit TopP(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     resolved_noise(spec.noise, NoiseSpec::Kind::kNone)),
        p_(spec.options.real("p")),
        most_(spec.options.integer("k_max") == 0 ? spec.max_experts
                                                 : std::min(spec.options.integer("k_max"), spec.max_experts)) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(in);
    const Tensor probs_TE = logits.noisy_TE.softmax(1);
    const Tensor choice_TK = prefix(in, probs_TE.detach());
    const Tensor gate_TK = gather_choices(probs_TE, choice_TK);
    RouteOutput out = finish_sparse(in, spec_, {choice_TK, gate_TK, gate_TK, {}}, scores_of(logits, probs_TE));
    out.k = 0;  // it varies
    out.probes["k"] = choice_TK.ge(0).sum(1);
    return out;
  }

 private:
  // int64 [T, k_max]: experts by falling probability, -1 after the one at which the sum passes p.
  Tensor prefix(const RouteInput& in, const Tensor& probs_TE) const {
    const Tensor best_TK = choose(in, probs_TE, most_);
    if (in.forced || p_ >= 1) return best_TK;  // the sum never passes 1, whatever its rounding says
    const Tensor prob_TK = gather_choices(probs_TE, best_TK);
    const Tensor before_TK = at::cumsum(prob_TK, 1).roll(1, 1);  // column 0 is the best: always kept
    const Tensor later_TK = before_TK.gt(p_).logical_and(at::arange(most_).gt(0));
    return best_TK.masked_fill(later_TK, -1);
  }

  double p_;
  int64_t most_;
};

const Registration<RouterEntry> registration_top_p{{
    .name = "top_p",
    .title = "Top-p: as many experts as a row needs",
    .citation = "Huang et al., 2024, arXiv:2403.07652",
    .equation =
        "P = softmax(W x);  A = shortest prefix, largest P first, with Σ P > p;  gate_a = P_a;  y = Σ_{a∈A} gate_a · f_a(x)",
    .facts = {.variable_k = true},
    .options =
        {option("p", 0.4, "probability that a row's experts have to exceed together; 0: the best alone, 1: all").between(0, 1),
         option("k_max", 0, "at most this many experts per row; 0 = all").at_least(0), renormalise_option("none")},
    .paper_losses = {{"balance", 0.01, {{"counts", std::string("any_choice")}, {"divide_by_k", true}}}, {"entropy", 1e-4}},
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"},
               {"k", "[T]", "experts that the row chose, before drops"}},
    .differences = {"k_max caps the number of experts",
                    "f is divided by the mean number of choices, so that perfect balance reads 1", "W starts at N(0, 0.02²)"},
    .verified_with = {{{"k_max", int64_t{2}}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<TopP>(spec); },
}};

}  // namespace
}  // namespace moelab
