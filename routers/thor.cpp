// Taming Sparsely Activated Transformer with Stochastic Experts
// Zuo, Liu, Jiao, Kim, Hassan, Zhang, Zhao, Gao, 2021, arXiv:2110.04260
//
//   training: e ~ U{0, …, E-1}, one draw per layer and forward pass for the whole batch;  y = FFN_e(x), gate 1
//   evaluation: random: again one drawn expert;  ensemble: 1/E · Σ_e FFN_e(x);  fixed: one expert for all;
//               averaged: the FFN whose parameters are 1/E · Σ_e θ_e
//
// It has no parameters. The method is a router and an objective: two passes a step, tied by `paired_consistency`. With
// pair = "distinct" the passes of a step walk through one shuffle of the experts, so that two of them differ wherever E > 1.
// A draw is a function of seed, layer, step and pass, and of sequence and position where the granularity says so: all ranks
// and micro-batches agree.
//
// Differences from the paper: it describes a pair of experts per layer; by default both passes draw from all experts and may
// agree, as in the authors' code. Granularities other than the batch, and evaluation by ensemble, fixed expert or averaged
// parameters, are additions.
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

namespace moelab {
namespace {

enum class Granularity { kBatch, kSequence, kPosition, kToken };
enum class Inference { kRandom, kEnsemble, kFixed, kAveraged };

Granularity granularity_of(const std::string& word) {
  if (word == "sequence") return Granularity::kSequence;
  if (word == "position") return Granularity::kPosition;
  return word == "token" ? Granularity::kToken : Granularity::kBatch;
}

Inference inference_of(const std::string& word) {
  if (word == "ensemble") return Inference::kEnsemble;
  if (word == "fixed") return Inference::kFixed;
  return word == "averaged" ? Inference::kAveraged : Inference::kRandom;
}

const char* shape_of_draws(Granularity granularity) {
  switch (granularity) {
    case Granularity::kBatch: return "[1]";
    case Granularity::kSequence: return "[sequences]";
    case Granularity::kPosition: return "[positions]";
    case Granularity::kToken: break;
  }
  return "[T]";
}

// An outside program's draws, and which of them each row uses.
struct GivenDraws {
  int64_t count;
  Tensor of_row_T;
};

GivenDraws given_draws(const RouteInput& in, Granularity granularity) {
  const int64_t rows = in.rows();
  switch (granularity) {
    case Granularity::kBatch: return {1, at::zeros({rows}, at::kLong)};
    case Granularity::kSequence: return {in.sequences, in.sequence_T};
    case Granularity::kPosition: return {rows == 0 ? 0 : in.position_T.max().item<int64_t>() + 1, in.position_T};
    case Granularity::kToken: break;
  }
  return {rows, at::arange(rows, at::kLong)};
}

Tensor given_thor_experts(const RouteInput& in, Granularity granularity, int64_t experts) {
  const GivenDraws draws = given_draws(in, granularity);
  if (in.noise.scalar_type() != at::kLong || in.noise.numel() != draws.count)
    usage_error(fmt::format("noise of the router 'thor' is here the drawn expert, int64 {} = [{}]", shape_of_draws(granularity),
                            draws.count));
  if (in.noise.lt(0).logical_or(in.noise.ge(experts)).any().item<bool>())
    usage_error(fmt::format("noise of the router 'thor' names an expert outside 0 … {}", experts - 1));
  return in.noise.reshape({-1}).index_select(0, draws.of_row_T);
}

// The expert with the largest of E uniforms is a uniform draw; those of lower rank go on without replacement. [T]
Tensor drawn_thor_experts(const RouteInput& in, RandomKey key, Granularity granularity, int64_t experts, int64_t rank) {
  const bool by_sequence = granularity == Granularity::kSequence || granularity == Granularity::kToken;
  const bool by_position = granularity == Granularity::kPosition || granularity == Granularity::kToken;
  const Tensor same_U = at::zeros({granularity == Granularity::kBatch ? 1 : in.rows()}, at::kLong);
  const Tensor draw_UE = uniform_rows(key.with("expert"), by_sequence ? in.sequence_key_T : same_U,
                                      by_position ? in.position_T : same_U, experts, at::kDouble);
  return stable_topk(draw_UE, rank + 1).select(1, rank).expand({in.rows()});
}

class ThorRouter : public Router {
 public:
  explicit ThorRouter(const RouterSpec& spec)
      : Router(spec), granularity_(granularity_of(spec.options.text("granularity"))),
        inference_granularity_(granularity_of(spec.options.text("inference_granularity"))),
        inference_(inference_of(spec.options.text("inference"))), distinct_(spec.options.text("pair") == "distinct"),
        fixed_expert_(spec.options.integer("fixed_expert")) {
    if (fixed_expert_ >= spec.experts)
      usage_error(fmt::format("router 'thor': fixed_expert = {} is not one of 0 … {}", fixed_expert_, spec.experts - 1));
  }

  RouterFacts facts() const override {
    RouterFacts facts = Router::facts();
    facts.random_in_eval = inference_ == Inference::kRandom;
    if (inference_ == Inference::kEnsemble) facts.in_evaluation = InEvaluation::kAllExperts;
    if (inference_ == Inference::kAveraged) facts.in_evaluation = InEvaluation::kMergedExperts;
    return facts;
  }

  std::string noise_shape(Mode mode) const override {
    if (mode != Mode::kTrain && inference_ != Inference::kRandom) return "";
    return std::string("int64 expert ") + shape_of_draws(mode == Mode::kTrain ? granularity_ : inference_granularity_);
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    if (!in.training() && inference_ == Inference::kAveraged) return averaged(in);
    return finish_unscored(in, spec_, in.forced ? in.forced->choice_TK : choices(in));
  }

 private:
  RouteOutput averaged(const RouteInput& in) const {
    const Tensor alpha_1E = at::zeros({1, spec_.max_experts}, spec_.dtype);
    alpha_1E.slice(1, 0, spec_.experts).fill_(1.0 / static_cast<double>(spec_.experts));
    RouteOutput out;
    out.plan = MergePlan{.alpha_GE = alpha_1E, .group_of_token_T = at::zeros({in.rows()}, at::kLong)};
    return out;
  }

  Tensor choices(const RouteInput& in) const {
    if (in.training()) return random_choice(in, granularity_);
    if (inference_ == Inference::kEnsemble) return at::arange(spec_.experts, at::kLong).expand({in.rows(), spec_.experts});
    if (inference_ == Inference::kFixed) return at::full({in.rows(), 1}, fixed_expert_, at::kLong);
    return random_choice(in, inference_granularity_);
  }

  Tensor random_choice(const RouteInput& in, Granularity granularity) const {
    if (in.noise.defined()) return given_thor_experts(in, granularity, spec_.experts).unsqueeze(1);
    const RandomKey key = distinct_ ? in.random.in_pass(-in.pass) : in.random;
    const int64_t rank = distinct_ ? in.pass % spec_.experts : 0;
    return drawn_thor_experts(in, key, granularity, spec_.experts, rank).unsqueeze(1);
  }

  Granularity granularity_;
  Granularity inference_granularity_;
  Inference inference_;
  bool distinct_;
  int64_t fixed_expert_;
};

const Registration<RouterEntry> registration_thor{{
    .name = "thor",
    .title = "THOR: experts drawn at random, passes that have to agree",
    .citation = "Zuo et al., 2021, arXiv:2110.04260",
    .equation = "e ~ U{0, …, E-1} per layer and pass;  y = FFN_e(x);  objective paired_consistency over two passes",
    .facts = {.learned = false,
              .noisy_in_training = true,
              .random_in_eval = true,
              .differentiable_gate = false,
              .permutation_equivariant = false,
              .passes = 2,
              .fixed_k = 1,
              .has_scores = false},
    .options =
        {option("granularity", "batch", "in training: rows that share a draw").one_of({"batch", "sequence", "position", "token"}),
         option("pair", "independent", "passes of a step draw with replacement, or different experts")
             .one_of({"independent", "distinct"}),
         option("inference", "random", "in evaluation: a draw, the mean output of all experts, one expert, averaged parameters")
             .one_of({"random", "ensemble", "fixed", "averaged"}),
         option("inference_granularity", "token", "inference = random: rows that share a draw")
             .one_of({"token", "position", "sequence"})
             .read_when("inference", {"random"}),
         option("fixed_expert", 0, "inference = fixed: which expert").at_least(0).read_when("inference", {"fixed"}),
         renormalise_option("none")},
    .noise_shape = "int64 expert [1], [sequences], [positions] or [T], by granularity",
    .differences = {"the paper describes a pair of experts per layer; by default both passes draw from all experts and may "
                    "agree, as in the authors' code",
                    "granularities other than the batch, and evaluation by ensemble, fixed expert or averaged parameters, are "
                    "additions"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<ThorRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
