// Control: a softmax top-k router whose random weights are never trained. What learned routing must beat; a router of this
// kind is the starting point of
// Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers. Chen, Zhang, Jaiswal, Liu, Wang, 2023,
// arXiv:2303.01610
//
//   z = W x with W ~ N(0, 1/D), fixed;  the rest as softmax_topk
//
// Rows of unit mean square get logits of unit variance, whatever D is.
//
// Differences from the paper: k is constant; the paper raises it during training.
#include "core/linear_router.h"

#include <cmath>

namespace moelab {
namespace {

Tensor frozen_weight(const RouterSpec& spec) {
  const double std = 1 / std::sqrt(static_cast<double>(spec.width));
  return normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, std, spec.dtype);
}

class FrozenRouter : public LinearRouter {
 public:
  explicit FrozenRouter(const RouterSpec& spec)
      : LinearRouter(spec, frozen_weight(spec), resolved_noise(spec.noise, NoiseSpec::Kind::kNone), /*trainable=*/false),
        softmax_over_(spec.options.text("softmax") == "before" ? SoftmaxOver::kAll : SoftmaxOver::kChosen) {}

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    return route_topk(in, score(in), spec_.k(), softmax_over_);
  }

 private:
  SoftmaxOver softmax_over_;
};

const Registration<RouterEntry> registration_frozen{{
    .name = "frozen",
    .title = "Control: random weights, never trained",
    .citation = "after Chen et al., 2023, arXiv:2303.01610",
    .equation = "z = W x, W ~ N(0, 1/D) fixed;  A = top-k of z;  gate_a = softmax(z)_a, or softmax over A alone",
    .facts = {.learned = false},
    .options = {k_option(2),
                option("softmax", "before",
                       "gates from a softmax over all experts, or over the chosen ones (after the selection)")
                    .one_of({"before", "after"}),
                renormalise_option("none")},
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"}},
    .differences = {"k is constant; the paper raises it during training"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<FrozenRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
