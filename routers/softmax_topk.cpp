// The softmax top-k family of today's language models:
// Mixtral of Experts. Jiang, Sablayrolles, Roux et al., 2024, arXiv:2401.04088 (softmax after the selection, k = 2)
// OLMoE: Open Mixture-of-Experts Language Models. Muennighoff, Soldaini, Groeneveld et al., 2024, arXiv:2409.02060 (before)
//
//   z = W x;  A = top-k of z;  gate_a = softmax(z)_a (before), or softmax over A alone (after)
//   W ~ N(0, 0.02²);  loss 0.01 · E · Σ_e f_e P_e, f counts each of the k choices, so that perfect balance reads k
//
// Differences from the paper: OLMoE adds a z-loss of 0.001, which is not in the set attached here; the common code pools all
// layers into one balance loss, here each layer has its own.
#include "core/linear_router.h"

namespace moelab {
namespace {

class SoftmaxTopk : public LinearRouter {
 public:
  explicit SoftmaxTopk(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     resolved_noise(spec.noise, NoiseSpec::Kind::kNone)),
        softmax_over_(spec.options.text("softmax") == "before" ? SoftmaxOver::kAll : SoftmaxOver::kChosen) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    return route_topk(in, score(in), spec_.k(), softmax_over_);
  }

 private:
  SoftmaxOver softmax_over_;
};

const Registration<RouterEntry> registration_softmax_topk{{
    .name = "softmax_topk",
    .title = "Softmax top-k: the Mixtral and OLMoE family",
    .citation = "Jiang et al., 2024, arXiv:2401.04088; Muennighoff et al., 2024, arXiv:2409.02060",
    .equation = "z = W x;  A = top-k of z;  gate_a = softmax(z)_a, or softmax over A alone;  y = Σ_{a∈A} gate_a · f_a(x)",
    .options = {k_option(2),
                option("softmax", "before",
                       "gates from a softmax over all experts, or over the chosen ones (after the selection)")
                    .one_of({"before", "after"}),
                renormalise_option("none")},
    .paper_losses = {{"balance", 0.01, {{"counts", std::string("any_choice")}}}},
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"}},
    .differences = {"OLMoE's z-loss (0.001) is not attached; name it as a [[loss]]",
                    "each layer has its own balance loss (layers = \"pooled\" is the common code's)"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<SoftmaxTopk>(spec); },
}};

}  // namespace
}  // namespace moelab
