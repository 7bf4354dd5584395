// Soft Merging of Experts with Adaptive Routing
// Muqeeth, Liu, Raffel, 2023, arXiv:2306.03745
//
//   h = mean over the rows of a sequence;  α = softmax(W h);  every row of it: y = f(x; Σ_e α_e θ_e)
//
// The expert's parameters are mixed, not its outputs: one expert is run, and gradients reach all of them and W. The mean holds
// the whole sequence, so no row is causal.
//
// Differences from the paper: the authors' code passes h through a layer normalisation and can drop experts at random in
// training; neither is done here. W starts at N(0, 0.02²).
#include "core/linear_router.h"
#include "core/merging.h"

namespace moelab {
namespace {

class SmearRouter : public LinearRouter {
 public:
  explicit SmearRouter(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     {.kind = NoiseSpec::Kind::kNone}) {
    require_no_noise(spec, "smear");
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    const Tensor mean_BD = sums_over_groups(in.routed(), in.sequence_T, in.sequences).mean_GD();
    const Tensor logits_BE = router_logits(mean_BD, weight_ED_);
    return finish_merge(checked(in, {logits_BE, logits_BE, {}}).clean_TE, in.sequence_T);
  }
};

const Registration<RouterEntry> registration_smear{{
    .name = "smear",
    .title = "SMEAR: one merged expert per sequence",
    .citation = "Muqeeth, Liu, Raffel, 2023, arXiv:2306.03745",
    .equation = "h = mean of the sequence's x;  α = softmax(W h);  y = f(x; Σ_e α_e θ_e)",
    .facts = {.plan = PlanForm::kMerge, .batch_independent = false, .batch_independent_eval = false, .decodes = false},
    .probes = {{"logits", "[T,E]", "W h of the row's sequence; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them: the row's mixture"}},
    .differences = {"no layer normalisation of h before W, no dropping of experts in training (the authors' code has both)",
                    "W starts at N(0, 0.02²)"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<SmearRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
