// Scaling Vision with Sparse Mixture of Experts
// Riquelme, Puigcerver, Mustafa, Neumann, Jenatton, Susano Pinto, Keysers, Houlsby, 2021, arXiv:2106.05974
//
//   z = W x;  z~ = z + n, n ~ N(0, (1/E)²) in training;  A = top-k of z~;  gate_a = softmax(z~)_a over all experts
//   losses 0.005 · CV²(Σ_t softmax(z)_t) + 0.005 · CV²(Σ_t P(t,e)), P(t,e) = Φ((z - k-th largest of z~) / std)
//   capacity ceil(T·k·1.05/E), up to a multiple of 4; the rows with the largest probability are served first (batch priority)
//
// Gates are not renormalised: with k = 1 the task still moves the router. The bar of P(t,e) counts e itself, unlike that of
// noisy_topk. Batch priority lets a later row take an earlier one's place, so it has no home in a causal model.
//
// Differences from the paper: W starts at N(0, 0.02²); the rows that share a capacity are those of the micro-batch; a capacity
// applies where [moe.capacity] asks for mode = "paper".
#include "core/linear_router.h"
#include "core/loss.h"

namespace moelab {
namespace {

// Normal noise of standard deviation 1/E, unless the experiment gives another kind or size.
NoiseSpec vmoe_noise(const RouterSpec& spec) {
  NoiseSpec noise = resolved_noise(spec.noise, NoiseSpec::Kind::kNormal);
  if (!noise.std_given) noise.std = 1.0 / static_cast<double>(spec.max_experts);
  return noise;
}

class Vmoe : public LinearRouter {
 public:
  explicit Vmoe(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     vmoe_noise(spec)) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    RouteOutput out = route_topk(in, score(in), spec_.k(), SoftmaxOver::kAll);
    out.probes["importance"] = out.scores.loss_TE.detach().sum(0);
    out.probes["load"] = load_rows(in, out, spec_.max_experts, /*include_self=*/true).front().detach().sum(0);
    return out;
  }
};

const Registration<RouterEntry> registration_vmoe{{
    .name = "vmoe",
    .title = "V-MoE: noisy softmax top-k with batch priority",
    .citation = "Riquelme et al., 2021, arXiv:2106.05974",
    .equation = "z~ = W x + n, n ~ N(0, (1/E)²);  A = top-k of z~;  gate_a = softmax(z~)_a;  y = Σ_{a∈A} gate_a · f_a(x)",
    .facts = {.noisy_in_training = true},
    .options = {k_option(2), renormalise_option("none")},
    .paper_losses = {{"importance", 0.005, {{"of", std::string("probabilities")}}},
                     {"load", 0.005, {{"threshold", std::string("include_self")}}}},
    .paper_capacity = {.mode = CapacityPolicy::Mode::kFactor,
                       .factor = 1.05,
                       .times_k = true,
                       .multiple_of = 4,
                       .scope = CapacityPolicy::Scope::kMicro,
                       .priority = CapacityPolicy::Priority::kBatch},
    .noise_shape = "normal [T,E]",
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"},
               {"importance", "[E]", "sum of the probabilities over the rows"},
               {"load", "[E]", "sum over the rows of P(e stays chosen); counts in evaluation and at k = E"}},
    .differences = {"W starts at N(0, 0.02²)", "the rows that share a capacity are those of the micro-batch",
                    "a capacity applies where [moe.capacity] asks for mode = \"paper\""},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<Vmoe>(spec); },
}};

}  // namespace
}  // namespace moelab
