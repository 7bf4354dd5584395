// Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer
// Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean, 2017, arXiv:1701.06538
//
//   H = W_g x + n ∘ (softplus(W_noise x) + ε), n ~ N(0,1) in training;  A = top-k of H;  gate = softmax over A of H
//   losses 0.1 · CV²(Σ_t gate) + 0.1 · CV²(Σ_t P(t,e)), P(t,e) = Φ((W_g x - k-th largest of H without e) / std)
//
// Both matrices start at zero: at first the noise alone chooses, so that the load is even. With k = 1 the gate is 1, and only
// the two losses move the router.
//
// Differences from the paper: k counts over one flat level; the hierarchical form is not built.
#include "core/linear_router.h"
#include "core/loss.h"

#include <ATen/ops/softplus.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

Tensor zero_matrix(const RouterSpec& spec) { return at::zeros({spec.max_experts, spec.width}, spec.dtype); }

class NoisyTopk : public LinearRouter {
 public:
  explicit NoisyTopk(const RouterSpec& spec) : LinearRouter(spec, zero_matrix(spec), spec.noise) {
    noise_weight_ED_ = add_parameter("noise_weight", zero_matrix(spec));
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const bool learned = noise_.kind == NoiseSpec::Kind::kPaper && in.training();
    RouteOutput out = route_topk(in, learned ? checked(in, learned_noise(in)) : score(in), spec_.k(), SoftmaxOver::kChosen);
    out.probes["importance"] = importance(out);
    out.probes["load"] = load_rows(in, out, spec_.max_experts, /*include_self=*/false).detach().sum(0);
    return out;
  }

 private:
  NoisyLogits learned_noise(const RouteInput& in) const {
    const double epsilon = noise_.epsilon_given ? noise_.epsilon : 0;
    const Tensor clean_TE = router_logits(in.routed(), weight_ED_);
    const Tensor std_TE = at::softplus(router_logits(in.routed(), noise_weight_ED_)).add(epsilon);
    return {clean_TE, clean_TE.add(std_TE.mul(raw_normal(in, weight_ED_.size(0)))), std_TE};
  }

  // Σ over rows of the gates, before any drop. [E]
  Tensor importance(const RouteOutput& out) const {
    const Tensor gate_N = out.gate_TK.detach().reshape({-1});
    const Tensor expert_N = out.assignment.choice_TK.clamp_min(0).reshape({-1});
    return at::zeros({spec_.max_experts}, gate_N.options()).index_add(0, expert_N, gate_N);
  }

  Tensor noise_weight_ED_;
};

const Registration<RouterEntry> registration_noisy_topk{{
    .name = "noisy_topk",
    .title = "Noisy top-k: learned noise on the logits",
    .citation = "Shazeer et al., 2017, arXiv:1701.06538",
    .equation = "H = W_g x + n ∘ (softplus(W_noise x) + ε), n ~ N(0,1);  A = top-k of H;  gate = softmax over A of H",
    .facts = {.noisy_in_training = true},
    .options = {k_option(4), renormalise_option("none")},
    .paper_losses = {{"importance", 0.1, {{"of", std::string("gates")}}},
                     {"load", 0.1, {{"threshold", std::string("exclude_self")}}}},
    .noise_shape = "normal [T,E]",
    .probes = {{"logits", "[T,E]", "W_g x, without noise"},
               {"probs", "[T,E]", "softmax of them"},
               {"importance", "[E]", "sum of the gates over the rows"},
               {"load", "[E]", "sum over the rows of P(e stays chosen); counts in evaluation and at k = E"}},
    .differences = {"one flat level of experts; the paper's hierarchical form is not built"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<NoisyTopk>(spec); },
}};

}  // namespace
}  // namespace moelab
