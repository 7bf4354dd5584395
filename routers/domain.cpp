// Domain: experts by the label of the data (domain, task, language)
// after Gururangan, Lewis, Holtzman, Smith, Zettlemoyer, 2021, arXiv:2108.05036 (hard), and task-level routing:
// Kudugunta, Huang, Bapna, Krikun, Lepikhin, Luong, Firat, 2021, arXiv:2110.03742 (learned)
//
//   hard:    label d has the experts d·k, d·k + 1, …, d·k + k-1, mod E;  gate 1/k
//   learned: p = softmax(weight[d]), the k largest, gate p
//
// Labels are those of the data set, 0 … domains-1; another one is an error. With more domains than E/k, domains share experts.
//
// Differences from the paper: evaluation reads the label too, where the paper mixes experts by an estimate of it (hard); no
// noise and no balance loss of its own (learned).
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>

#include <fmt/format.h>

namespace moelab {
namespace {

constexpr double kAbsentLogit = -1e9;  // probability exactly 0, as in linear routers

class DomainRouter : public Router {
 public:
  explicit DomainRouter(const RouterSpec& spec)
      : Router(spec), domains_(spec.options.integer("domains")),
        bounded_(!spec.options.flag("hard") || spec.options.was_set("domains")) {
    require_k_fits(spec);
    if (spec.options.flag("hard")) return;
    const Tensor initial_RE = normal_tensor(spec.init.with("weight"), {domains_, spec.max_experts}, 0.02, spec.dtype);
    weight_RE_ = add_parameter("weight", initial_RE);
  }

  RouterFacts facts() const override {
    RouterFacts facts = Router::facts();
    const bool learned = weight_RE_.defined();
    facts.learned = facts.differentiable_gate = facts.permutation_equivariant = facts.has_scores = learned;
    return facts;
  }

  std::vector<Tensor> per_expert_tensors() const override {
    if (!weight_RE_.defined()) return {};
    return {weight_RE_.t()};
  }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    require_finite(in.routed(), "x", in);
    const Tensor label_T = labels(in);
    if (weight_RE_.defined()) return route_learned(in, label_T);
    return finish_unscored(in, spec_, in.forced ? in.forced->choice_TK : hard_choices(label_T));
  }

 private:
  Tensor labels(const RouteInput& in) const {
    if (!in.domain_T.defined())
      usage_error(fmt::format("router 'domain' of layer {} needs domain labels, and there are none {}", in.layer,
                              in.mode == Mode::kDecode ? "while decoding" : "in this batch"));
    if (in.rows() == 0) return in.domain_T;
    const int64_t low = in.domain_T.min().item<int64_t>(), high = in.domain_T.max().item<int64_t>();
    if (low < 0 || (bounded_ && high >= domains_))
      usage_error(fmt::format("domain label {} is outside 0 … {}; [moe.router] domains says how many there are",
                              low < 0 ? low : high, domains_ - 1));
    return in.domain_T;
  }

  Tensor hard_choices(const Tensor& label_T) const {
    const Tensor rank_K = at::arange(spec_.k(), at::kLong);
    return label_T.mul(spec_.k()).unsqueeze(1).add(rank_K).remainder(spec_.experts);
  }

  RouteOutput route_learned(const RouteInput& in, const Tensor& label_T) const {
    const at::ScalarType dtype = spec_.dtype == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor present_TE = weight_RE_.to(dtype).slice(1, 0, spec_.experts).index_select(0, label_T);
    require_finite(present_TE, "logits", in);
    const Tensor logits_TE = at::constant_pad_nd(present_TE, {0, spec_.max_experts - spec_.experts}, kAbsentLogit);
    const Tensor probs_TE = logits_TE.softmax(1), choice_TK = chosen_topk(in, logits_TE, spec_.k());
    const Tensor gate_TK = gather_choices(probs_TE, choice_TK);
    return finish_sparse(in, spec_, {choice_TK, gate_TK, gate_TK, {}}, scores_of({logits_TE, logits_TE, {}}, probs_TE));
  }

  int64_t domains_;
  bool bounded_;      // a hard choice has an expert for every label
  Tensor weight_RE_;  // R domains; undefined where the choice is hard
};

const Registration<RouterEntry> registration_domain{{
    .name = "domain",
    .title = "Domain: experts by the data's label",
    .citation = "after Gururangan et al., 2021, arXiv:2108.05036; Kudugunta et al., 2021, arXiv:2110.03742",
    .equation = "hard: experts d·k, …, d·k + k-1 mod E of label d, gate 1/k;  learned: top-k of softmax(weight[d]), gate p",
    .facts = {.learned = false,
              .needs_domain = true,
              .differentiable_gate = false,
              .permutation_equivariant = false,
              .decodes = false,
              .has_scores = false},
    .options = {option("hard", true, "the label is the choice; false: learned from the label"),
                option("domains", 8, "labels are 0 … domains-1; a hard choice knows a bound only where it is given")
                    .at_least(1)
                    .as_rows_of("weight"),
                k_option(1), renormalise_option("none")},
    .probes = {{"logits", "[T,E]", "weight[d], where learned; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of them"}},
    .differences = {"evaluation reads the label too, where the paper mixes experts by an estimate of it (hard)",
                    "no noise and no balance loss of its own (learned)"},
    .verified_with = {{{"k", int64_t{2}}}, {{"hard", false}, {"k", int64_t{2}}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<DomainRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
