// GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding
// Lepikhin, Lee, Xu, Chen, Firat, Huang, Krikun, Shazeer, Chen, 2020, arXiv:2006.16668
//
//   p = softmax(W x);  e1 = argmax p, e2 = argmax of the rest;  g_i = p_i / (p1 + p2), before any drop
//   the second expert is kept with a policy of its own (u ~ U(0,1), θ = threshold):
//     random_2g: u < g2/θ (θ = 1/2 is the paper's 2·g2) | random_2p: u < 2·p2 | threshold: g2 > θ | all | none
//     gumbel: e2 = argmax over the rest of logits + Gumbel noise, always kept
//   loss 0.01 · E · Σ_e f_e P_e, f of the first choices; capacity 2·rows/E, first choices served before second ones
//
// A refused second expert still counts in p1 + p2, and is neither kept nor dropped.
//
// Differences from the paper: the group that shares a capacity is a sequence; evaluation keeps every second expert; W starts
// at N(0, 0.02²), the paper gives no value.
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>

namespace moelab {
namespace {

enum class SecondExpert { kRandom2g, kRandom2p, kThreshold, kAll, kNone, kGumbel };
const std::vector<std::string> kSecondExpertNames{"random_2g", "random_2p", "threshold", "all", "none", "gumbel"};

SecondExpert second_expert_of(const std::string& name) {
  const auto found = std::find(kSecondExpertNames.begin(), kSecondExpertNames.end(), name);
  check_invariant(found != kSecondExpertNames.end(), "second_expert = " + name);
  return static_cast<SecondExpert>(found - kSecondExpertNames.begin());
}

bool draws(SecondExpert policy) {
  return policy == SecondExpert::kRandom2g || policy == SecondExpert::kRandom2p || policy == SecondExpert::kGumbel;
}

class GshardRouter : public LinearRouter {
 public:
  explicit GshardRouter(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     resolved_noise(spec.noise, NoiseSpec::Kind::kNone)),
        train_policy_(second_expert_of(spec.options.text("second_expert"))),
        eval_policy_(second_expert_of(spec.options.text("second_expert_eval"))),
        threshold_(std::max(spec.options.real("threshold"), 1e-9)) {}

  RouterFacts facts() const override {
    RouterFacts facts = LinearRouter::facts();
    facts.noisy_in_training = facts.noisy_in_training || draws(train_policy_);
    facts.random_in_eval = draws(eval_policy_);
    return facts;
  }

  std::string noise_shape(Mode mode) const override {
    const SecondExpert policy = mode == Mode::kTrain ? train_policy_ : eval_policy_;
    if (!draws(policy)) return "";
    return policy == SecondExpert::kGumbel ? "Gumbel values [T,E]" : "uniform [T]";
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const SecondExpert policy = in.training() ? train_policy_ : eval_policy_;
    const NoisyLogits logits = score(logit_input(in, policy));
    const Tensor probs_TE = logits.noisy_TE.softmax(1);
    const Tensor choice_TK = choices(in, policy, logits.noisy_TE);
    const Tensor prob_TK = gather_choices(probs_TE, choice_TK);
    return finish_sparse(in, spec_, {choice_TK, prob_TK, prob_TK, allowed(in, policy, prob_TK)}, scores_of(logits, probs_TE));
  }

 private:
  // A given `noise` is the second expert's draw where the policy draws; noise on the logits then comes from the stream.
  static RouteInput logit_input(const RouteInput& in, SecondExpert policy) {
    RouteInput logit_in = in;
    if (draws(policy)) logit_in.noise = Tensor();
    return logit_in;
  }

  // The second expert's draws must not repeat those of the noise on the logits.
  static RouteInput second_input(const RouteInput& in) {
    RouteInput second_in = in;
    second_in.random = in.random.with("second_expert");
    return second_in;
  }

  // [T,2], or [T,1] where there is one expert only.
  Tensor choices(const RouteInput& in, SecondExpert policy, const Tensor& logits_TE) const {
    const Tensor top_TK = choose(in, logits_TE, std::min<int64_t>(2, logits_TE.size(1)));
    if (in.forced || policy != SecondExpert::kGumbel || top_TK.size(1) < 2) return top_TK;
    const Tensor first_T1 = top_TK.slice(1, 0, 1);
    const Tensor noisy_TE = logits_TE.detach().add(raw_gumbel(second_input(in), logits_TE.size(1)));
    const Tensor rest_TE = noisy_TE.scatter(1, first_T1, -std::numeric_limits<double>::infinity());
    return at::cat({first_T1, choose(in, rest_TE, 1)}, 1);
  }

  // Pairs that the policy lets through, bool [T,K]: always the first.
  Tensor allowed(const RouteInput& in, SecondExpert policy, const Tensor& prob_TK) const {
    Tensor allowed_TK = at::ones_like(prob_TK, at::kBool);
    if (!in.forced && prob_TK.size(1) == 2) allowed_TK.select(1, 1).copy_(second_allowed(in, policy, prob_TK.detach()));
    return allowed_TK;
  }

  Tensor second_allowed(const RouteInput& in, SecondExpert policy, const Tensor& prob_TK) const {
    const Tensor p2_T = prob_TK.select(1, 1);
    const Tensor g2_T = p2_T.div(prob_TK.sum(1));
    switch (policy) {
      case SecondExpert::kRandom2g: return raw_uniform(second_input(in), 1).select(1, 0).lt(g2_T.div(threshold_));
      case SecondExpert::kRandom2p: return raw_uniform(second_input(in), 1).select(1, 0).lt(p2_T.mul(2));
      case SecondExpert::kThreshold: return g2_T.gt(threshold_);
      case SecondExpert::kNone: return at::zeros_like(p2_T, at::kBool);
      case SecondExpert::kAll:
      case SecondExpert::kGumbel: break;
    }
    return at::ones_like(p2_T, at::kBool);
  }

  SecondExpert train_policy_;
  SecondExpert eval_policy_;
  double threshold_;
};

const Registration<RouterEntry> registration_gshard{{
    .name = "gshard",
    .title = "GShard: two experts, the second one at random",
    .citation = "Lepikhin et al., 2020, arXiv:2006.16668",
    .equation = "p = softmax(W x);  e1, e2 = top-2;  g_i = p_i / (p1 + p2);  e2 kept with probability min(1, g2/threshold)",
    .facts = {.noisy_in_training = true, .fixed_k = 2},
    .options = {option("second_expert", "random_2g", "in training: which second experts are kept").one_of(kSecondExpertNames),
                option("second_expert_eval", "all", "the same in evaluation").one_of(kSecondExpertNames),
                option("threshold", 0.5, "random_2g keeps where u < g2/threshold, threshold where g2 > threshold")
                    .between(0, 1)
                    .read_when("second_expert", {"random_2g", "threshold"})
                    .read_when("second_expert_eval", {"random_2g", "threshold"}),
                renormalise_option("before_drop")},
    .paper_losses = {{"balance", 0.01, {{"counts", std::string("first_choice")}}}},
    .paper_capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = 1, .times_k = true},
    .noise_shape = "uniform [T]; Gumbel values [T,E] with second_expert = \"gumbel\"",
    .probes = {{"logits", "[T,E]", "W x, without noise; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"}},
    .differences = {"the rows that share a capacity are those of one sequence", "evaluation keeps every second expert",
                    "W starts at N(0, 0.02²); the paper gives no value"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<GshardRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
