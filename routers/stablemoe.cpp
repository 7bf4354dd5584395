// StableMoE: Stable Routing Strategy for Mixture of Experts
// Dai, Dong, Ma, Zheng, Sui, Chang, Wei, 2022, arXiv:2204.08396
//
//   s = W x;  ŝ = Ŵ h, h = D̂[id] (word) or b + Σ_{j<5} A_j D̂[id of the j-th token before] (cnn)
//   stage 1 (step < S1):  a = argmax s;  losses 0.3 · balance + Σ_t CE(ŝ_t, a_t), which teaches D̂, Ŵ alone
//   stage 2 (step ≥ S1):  a = argmax ŝ, frozen;  the task loss alone
//   gate = σ(s_a) in both stages, so that W goes on learning;  evaluation of stage 1 routes by ŝ, or by s
//   W, Ŵ orthogonal, rows of norm 0.1;  D̂ ~ N(0, 1);  S1: a tenth of the steps
//
// The convolution is causal: before the beginning of a sequence its taps read zero. Capacity as in the released code:
// ⌊2·rows/E⌋ in the order of rows; the balance loss counts rows before that cut.
//
// Differences from the paper: S1 is a number of steps (6000 of the paper's 60000), not a share of them. The released code
// leaves the frozen parameters in the optimiser, whose momentum and decay move them: here they stand still, bit for bit. It
// keeps the losses of the last routed layer alone: here each layer has its own. It reserves an id for padding, which is never
// routed here.
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

constexpr int64_t kStableTaps = 5;  // the row's own token and four before it
constexpr int64_t kFirstStage = 1, kSecondStage = 2;

// Orthogonal rows of norm 0.1, or orthogonal columns where there are more rows than columns.
Tensor stable_centroids(RandomKey key, int64_t rows, int64_t columns, at::ScalarType dtype) {
  const Tensor tall = normal_tensor(key, {std::max(rows, columns), std::min(rows, columns)}, 1, at::kDouble);
  const auto [basis, triangle] = at::linalg_qr(tall);
  const Tensor signed_basis = basis.mul(triangle.diagonal().sign());
  return (rows < columns ? signed_basis.t() : signed_basis).mul(0.1).to(dtype).contiguous();
}

int64_t stable_vocabulary(const RouterSpec& spec) {
  const int64_t wanted = spec.options.integer("vocabulary");
  if (wanted == 0 && spec.vocabulary == 0)
    usage_error("[moe.router] stablemoe needs `vocabulary`, the number of token ids, where no data set says it");
  if (wanted > 0 && wanted < spec.vocabulary)
    usage_error(fmt::format("[moe.router] vocabulary = {} is less than the data's {}", wanted, spec.vocabulary));
  return wanted > 0 ? wanted : spec.vocabulary;
}

// The ids that each row's taps read: its own, then those before it in its sequence; -1 before the beginning. `latest_BW` holds
// each sequence's newest ids, newest first, and moves on. [T, taps]
Tensor stable_windows(const RouteInput& in, const Tensor& id_T, Tensor& latest_BW) {
  const Tensor order_T = in.position_T.argsort(/*stable=*/true, 0, /*descending=*/false);
  Tensor window_TW = at::empty({in.rows(), kStableTaps}, at::kLong);
  const auto* order = order_T.const_data_ptr<int64_t>();
  const auto* id = id_T.const_data_ptr<int64_t>();
  const auto* sequence = in.sequence_T.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < in.rows(); ++i) {
    int64_t* latest = latest_BW.mutable_data_ptr<int64_t>() + sequence[order[i]] * kStableTaps;
    std::copy_backward(latest, latest + kStableTaps - 1, latest + kStableTaps);
    *latest = id[order[i]];
    std::copy(latest, latest + kStableTaps, window_TW.mutable_data_ptr<int64_t>() + order[i] * kStableTaps);
  }
  return window_TW;
}

class StableMoe : public LinearRouter {
 public:
  explicit StableMoe(const RouterSpec& spec)
      : LinearRouter(spec, stable_centroids(spec.init.with("weight"), spec.max_experts, spec.width, spec.dtype),
                     resolved_noise(spec.noise, NoiseSpec::Kind::kNone)),
        stage1_steps_(spec.options.integer("stage1_steps")), vocabulary_(stable_vocabulary(spec)),
        evaluates_distilled_(spec.options.text("eval_router") == "distilled") {
    const int64_t dim = spec.options.integer("distill_dim");
    const bool learns = stage1_steps_ > 0;
    const auto normal = [&](const char* name, at::IntArrayRef shape, double std) {
      return add_parameter(name, normal_tensor(spec.init.with(name), shape, std, spec.dtype), learns);
    };
    embedding_Vd_ = normal("embedding", {vocabulary_, dim}, 1);
    const Tensor centroids_Ed = stable_centroids(spec.init.with("distilled"), spec.max_experts, dim, spec.dtype);
    distilled_Ed_ = add_parameter("distilled", centroids_Ed, learns);
    if (spec.options.text("distilled") == "cnn") {
      taps_dWd_ = normal("taps", {dim, kStableTaps, dim}, 1 / std::sqrt(static_cast<double>(kStableTaps * dim)));
      bias_d_ = add_parameter("taps_bias", at::zeros({dim}, spec.dtype), learns);
    }
    stage_ = add_buffer("stage", at::full({1}, learns ? kFirstStage : kSecondStage, at::kLong));
  }

  RouteOutput route(const RouteInput& in, RouteState& state) const override {
    const bool second = in_second_stage(in);
    const NoisyLogits logits = second ? clean_logits(in) : score(in);
    const Tensor distilled_TE = second ? distilled_scores(in, state).detach() : distilled_scores(in, state);
    const bool by_distilled = second || (!in.training() && evaluates_distilled_);
    const Tensor& select_TE = by_distilled ? distilled_TE : logits.noisy_TE;
    const Tensor choice_TK = choose(in, select_TE, 1), gate_TE = logits.noisy_TE.sigmoid();
    const Tensor gate_TK = gather_choices(gate_TE, choice_TK), probability_TE = logits.clean_TE.softmax(1);
    RouteOutput out = finish_sparse(in, spec_, {choice_TK, gate_TK, gate_TK, {}},
                                    {select_TE, gate_TE, probability_TE, logits.clean_TE, logits.noisy_TE, logits.std_TE});
    out.statistics["distilled"] = out.probes["distilled"] = distilled_TE;
    out.statistics["stage1"] = at::full({in.rows(), 1}, second ? 0 : 1, distilled_TE.options().requires_grad(false));
    const Tensor agrees_T1 = stable_topk(logits.clean_TE, 1).eq(stable_topk(distilled_TE, 1));
    out.probes["agreement"] = agrees_T1.squeeze(1).to(distilled_TE.scalar_type());
    return out;
  }

  // The last step of stage 1 ends with the switch.
  std::vector<Event> end_step(const std::map<std::string, Tensor>&, int64_t step) override {
    if (step + 1 < stage1_steps_ || switched()) return {};
    stage_.fill_(kSecondStage);
    Event stage, freeze;
    stage.note = "stage 2: the distilled router decides";
    freeze.kind = Event::Kind::kFreeze;
    freeze.tensors = {"embedding", "distilled", "taps", "taps_bias"};  // the last two where there is a convolution
    freeze.note = "the distilled router's parameters move no more";
    return {stage, freeze};
  }

  // By name, not by size: the embedding may have as many rows as there are experts.
  std::vector<Tensor> per_expert_tensors() const override {
    std::vector<Tensor> all{weight_ED_, distilled_Ed_};
    if (mask_E_.defined()) all.push_back(mask_E_);
    return all;
  }

 private:
  bool switched() const { return stage_.item<int64_t>() == kSecondStage; }

  // The buffer knows what callers without a step cannot: decoding, evaluation of a checkpoint.
  bool in_second_stage(const RouteInput& in) const { return in.step >= stage1_steps_ || switched(); }

  NoisyLogits clean_logits(const RouteInput& in) const {
    const Tensor logits_TE = router_logits(in.routed(), weight_ED_);
    return checked(in, {logits_TE, logits_TE, {}});
  }

  Tensor token_ids(const RouteInput& in) const {
    if (!in.token_ids_T.defined())
      usage_error(fmt::format("the router of layer {} reads token ids, and there are none", in.layer));
    if (in.rows() == 0) return in.token_ids_T;
    const auto lowest = in.token_ids_T.min().item<int64_t>(), highest = in.token_ids_T.max().item<int64_t>();
    if (lowest < 0 || highest >= vocabulary_)
      usage_error(fmt::format("token {} is outside the vocabulary of {} that the router of layer {} knows",
                              lowest < 0 ? lowest : highest, vocabulary_, in.layer));
    return in.token_ids_T.contiguous();
  }

  Tensor distilled_scores(const RouteInput& in, RouteState& state) const {
    const Tensor id_T = token_ids(in);
    const Tensor hidden_Td = taps_dWd_.defined() ? convolved(in, id_T, state) : embedded(id_T);
    const Tensor scores_TE = router_logits(hidden_Td, distilled_Ed_);
    return checked(in, {scores_TE, scores_TE, {}}).clean_TE;
  }

  Tensor embedded(const Tensor& id) const { return at::embedding(embedding_Vd_, id.to(embedding_Vd_.device())); }

  Tensor convolved(const RouteInput& in, const Tensor& id_T, RouteState& state) const {
    const auto kept = state.kept.find("window");
    const bool goes_on = in.mode == Mode::kDecode && kept != state.kept.end();
    Tensor latest_BW = goes_on ? kept->second.clone() : at::full({in.sequences, kStableTaps}, -1, at::kLong);
    const Tensor window_TW = stable_windows(in, id_T, latest_BW);
    if (in.mode == Mode::kDecode) state.kept["window"] = latest_BW;
    const Tensor nothing_TW1 = window_TW.lt(0).unsqueeze(2).to(embedding_Vd_.device());
    const Tensor read_TWd = embedded(window_TW.clamp_min(0)).masked_fill(nothing_TW1, 0);
    return router_logits(read_TWd.flatten(1), taps_dWd_.flatten(1)).add(bias_d_);
  }

  int64_t stage1_steps_;
  int64_t vocabulary_;
  bool evaluates_distilled_;
  Tensor embedding_Vd_, distilled_Ed_;
  Tensor taps_dWd_, bias_d_;  // [d, taps, d] and [d]: of the convolution; undefined without
  Tensor stage_;
};

const Registration<RouterEntry> registration_stablemoe{{
    .name = "stablemoe",
    .title = "StableMoE: routes learned, distilled into the token ids, and frozen",
    .citation = "Dai et al., 2022, arXiv:2204.08396",
    .equation =
        "s = W x, ŝ = Ŵ D̂[id];  stage 1: a = argmax s, ŝ learns to say a;  stage 2: a = argmax ŝ, frozen;  y = σ(s_a) · f_a(x)",
    .facts = {.stateful = true, .needs_token_ids = true, .fixed_k = 1, .distils = true},
    .options =
        {option("stage1_steps", 6000, "stage 2 from this step on; the paper's is a tenth of its steps").at_least(0).in_steps(),
         option("distilled", "word", "the distilled router reads the token, or a causal window of 5 tokens")
             .one_of({"word", "cnn"}),
         option("distill_dim", 50, "width of the distilled router's embedding").at_least(1),
         option("vocabulary", 0, "token ids that the embedding has rows for; 0 = the data's").at_least(0).as_rows_of("embedding"),
         option("eval_router", "distilled", "who decides in evaluation while stage 1 lasts").one_of({"distilled", "main"}),
         renormalise_option("none")},
    .paper_losses = {{"stablemoe_balance", 0.3}, {"distillation", 1}},
    .paper_capacity = {.mode = CapacityPolicy::Mode::kFactor,
                       .factor = 2,
                       .round = CapacityPolicy::Round::kFloor,
                       .scope = CapacityPolicy::Scope::kGlobal},
    .probes = {{"logits", "[T,E]", "s = W x; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"},
               {"distilled", "[T,E]", "ŝ"},
               {"agreement", "[T]", "1 where argmax ŝ = argmax s"}},
    .differences =
        {"stage 1 ends after a number of steps, not after a share of them",
         "in stage 2 the distilled router stands still; the released code leaves it in the optimiser, which moves it",
         "each layer has losses of its own; the released code keeps the last layer's alone",
         "a [moe.capacity] with priority = \"batch\" or \"score\" serves by the gate σ(s)",
         "no token id is reserved for padding, which is never routed"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<StableMoe>(spec); },
}};

}  // namespace
}  // namespace moelab
