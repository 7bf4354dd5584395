// Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity
// Fedus, Zoph, Shazeer, 2021, arXiv:2101.03961
//
//   x̃ = x ∘ u, u ~ U[1-ε, 1+ε] in training;  p = softmax(W x̃);  a = argmax p;  gate = p_a, not renormalised
//   W: truncated normal, σ = √(0.1/D);  loss 0.01 · E · Σ_e f_e P_e
//
// The paper's capacity is (rows/E)·1.25, without ×k, rounded up here; rows of one sequence share it, in their order.
//
// Differences from the paper: the group that shares a capacity is a sequence, not a slice of the batch.
#include "core/linear_router.h"

#include <cmath>

namespace moelab {
namespace {

Tensor switch_weight(const RouterSpec& spec) {
  const double std = std::sqrt(0.1 / static_cast<double>(spec.width));
  return truncated_normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, std, spec.dtype);
}

class SwitchRouter : public LinearRouter {
 public:
  explicit SwitchRouter(const RouterSpec& spec)
      : LinearRouter(spec, switch_weight(spec), resolved_noise(spec.noise, NoiseSpec::Kind::kJitter)) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    return route_topk(in, score(in), /*k=*/1, SoftmaxOver::kAll);
  }
};

const Registration<RouterEntry> registration_switch{{
    .name = "switch",
    .title = "Switch: one expert per row, gated by its probability",
    .citation = "Fedus, Zoph, Shazeer, 2021, arXiv:2101.03961",
    .equation = "p = softmax(W(x ∘ u)), u ~ U[1-ε, 1+ε];  a = argmax p;  y = p_a · f_a(x)",
    .facts = {.noisy_in_training = true, .fixed_k = 1},
    .options = {renormalise_option("none")},
    .paper_losses = {{"balance", 0.01, {{"counts", std::string("first_choice")}, {"probabilities", std::string("noisy")}}}},
    .paper_capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = 1.25},
    .noise_shape = "uniform(0,1) [T,D]",
    .probes = {{"logits", "[T,E]", "without jitter; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"}},
    .differences = {"the rows that share a capacity are those of one sequence; the paper's are a slice of the batch"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<SwitchRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
