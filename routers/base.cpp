// BASE Layers: Simplifying Training of Large, Sparse Models
// Lewis, Bhosale, Dettmers, Goyal, Zettlemoyer, 2021, arXiv:2103.16716
//
//   s = W x;  training: a = argmax Σ_t s[t, a_t] over assignments that give every expert T/E rows, without gradient
//   evaluation: a_t = argmax_e s[t,e];  y_t = σ(s[t, a_t]) · f_{a_t}(x_t), with gradient through σ
//   W: orthogonal rows of norm 0.1 (orthogonal columns where E > D)
//
// solver = "exact" is exact for scores rounded to 2^-28 of the largest spread of a row or finer (core/assignment.h): the sum
// of the scores is within T of these steps of the best. The probe `gap` is the dual bound minus the value on that grid, 0 =
// proven. `prices`, the dual solution, start the next step's search and serve `eval = "greedy_with_prices"`; a step's prices
// are the mean over its problems, weighted by their rows.
// Other solvers approximate: experts bid for rows, Sinkhorn (Clark et al., 2022, arXiv:2202.01169), expert by expert.
//
// scope = "local" (the paper's): each rank solves the problem of its own rows, or with `shuffle` of an equal share of all ranks'
// rows, drawn at random; "global": one problem over all ranks' rows. On one rank the order that a shuffle gives the rows decides
// ties only. Scores travel between ranks, not rows.
//
// Differences from the paper: its solver is an auction that stops early, this one is exact; T need not be a multiple of E.
#include "core/assignment.h"
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

Tensor base_weight(const RouterSpec& spec) {
  const Tensor normal_ED = normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 1, at::kDouble);
  const bool tall = spec.max_experts > spec.width;
  const auto [q, r] = at::linalg_qr(tall ? normal_ED : normal_ED.t());
  const Tensor uniform = q.mul(r.diagonal().sign());  // without this, the directions would depend on the algorithm
  return (tall ? uniform : uniform.t()).mul(0.1).to(spec.dtype).contiguous();
}

std::vector<double> base_doubles(const Tensor& values) {
  const Tensor wide = values.to(at::kCPU, at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

template <class Value>
Tensor base_tensor(std::vector<Value> values, at::ScalarType dtype) {
  return at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, dtype).clone();
}

GridScores base_grid(const Tensor& score_TE) {
  const auto count = static_cast<size_t>(score_TE.numel());
  if (score_TE.scalar_type() == at::kDouble)
    return grid_scores(std::span(score_TE.const_data_ptr<double>(), count), score_TE.size(0), score_TE.size(1));
  return grid_scores(std::span(score_TE.const_data_ptr<float>(), count), score_TE.size(0), score_TE.size(1));
}

ExtraSlots base_extra_slots(const std::string& name) {
  if (name == "lowest") return ExtraSlots::kLowest;
  return name == "rotate" ? ExtraSlots::kRotate : ExtraSlots::kBest;
}

// Where each row goes: row order[i] to place i. As real numbers, like the draws that they replace.
Tensor base_places(const Tensor& order_T) {
  const Tensor place_T = at::arange(order_T.numel(), at::kLong);
  if (!std::get<0>(order_T.sort()).equal(place_T)) usage_error("noise of the router 'base' is not a permutation of 0 … T-1");
  return at::empty_like(place_T).index_copy_(0, order_T, place_T).to(at::kDouble);
}

class BaseRouter : public LinearRouter {
 public:
  explicit BaseRouter(const RouterSpec& spec)
      : LinearRouter(spec, base_weight(spec), resolved_noise(spec.noise, NoiseSpec::Kind::kNone)),
        solver_(spec.options.text("solver")), extra_(base_extra_slots(spec.options.text("extra_slots"))),
        global_(spec.options.text("scope") == "global"), shuffle_(spec.options.flag("shuffle")),
        eval_with_prices_(spec.options.text("eval") == "greedy_with_prices") {
    prices_E_ = add_buffer("prices", at::zeros({spec_.max_experts}, spec_.dtype));
  }

  RouterFacts facts() const override {
    RouterFacts facts = LinearRouter::facts();
    facts.noisy_in_training = facts.noisy_in_training || shuffle_;
    facts.needs_global_batch = global_;
    facts.mixes_ranks = shuffle_ && !global_;
    facts.permutation_equivariant = solver_ == "exact" && extra_ == ExtraSlots::kBest;
    return facts;
  }

  std::string noise_shape(Mode mode) const override { return shuffle_ ? LinearRouter::noise_shape(mode) : ""; }

  RouteOutput route(const RouteInput& in, RouteState&) const override {
    const NoisyLogits logits = score(logit_input(in));
    Solved solved;
    if (in.forced) solved.choice_TK = in.forced->choice_TK;
    else if (in.training()) solved = solve(in, logits.noisy_TE.detach());
    else solved.choice_TK = choose(in, eval_with_prices_ ? logits.noisy_TE.sub(prices_E_) : logits.noisy_TE, 1);
    const Tensor gate_TE = logits.noisy_TE.sigmoid();
    const Tensor gate_TK = gather_choices(gate_TE, solved.choice_TK);
    Scores scores = scores_of(logits, logits.noisy_TE.softmax(1));
    scores.gate_TE = gate_TE;
    RouteOutput out = finish_sparse(in, spec_, {solved.choice_TK, gate_TK, gate_TK, {}}, std::move(scores));
    if (solved.gap.defined()) out.probes["gap"] = solved.gap;
    out.deltas = std::move(solved.deltas);
    return out;
  }

  std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t) override {
    const auto rows = deltas.find("price_rows");
    if (rows == deltas.end() || rows->second.item<double>() == 0) return {};
    const at::NoGradGuard no_grad;
    prices_E_.copy_(deltas.at("rows_times_price").div(rows->second));
    return {};
  }

 private:
  struct Solved {
    Tensor choice_TK;
    Tensor gap;  // [1]
    std::map<std::string, Tensor> deltas;
  };

  // A given `noise` is the permutation where there is one; noise on the logits then comes from the stream.
  RouteInput logit_input(const RouteInput& in) const {
    RouteInput logit_in = in;
    if (shuffle_) logit_in.noise = Tensor();
    return logit_in;
  }

  Tensor active_index() const {
    return mask_E_.defined() ? mask_E_.nonzero().squeeze(1) : at::arange(spec_.max_experts, at::kLong);
  }

  // The rows of one problem are those of this micro-batch, or of all ranks' micro-batches in rank order; or, where a shuffle
  // deals out the rows of all ranks, this rank's share of them.
  Solved solve(const RouteInput& in, const Tensor& score_TE) const {
    const at::NoGradGuard no_grad;
    const Tensor active_A = active_index();
    const Tensor score_NA = gathered(in, score_TE.index_select(1, active_A));
    const Tensor order_N = shuffle_ ? gathered(in, shuffle_ranks(in)).argsort(/*stable=*/true, 0, false) : Tensor();
    const Tensor mine_M = deals_out(in) ? share_of(*in.comm, order_N) : order_N;
    const Tensor score_MA = (shuffle_ ? score_NA.index_select(0, mine_M) : score_NA).to(at::kCPU).contiguous();
    const BalancedAssignment found = assigned(base_grid(score_MA), in.step, base_doubles(prices_E_.index_select(0, active_A)));
    Tensor choice_N = active_A.index_select(0, base_tensor(found.expert_T, at::kLong));
    if (deals_out(in)) choice_N = in.comm->all_gather(choice_N);
    if (shuffle_) choice_N = at::empty_like(choice_N).index_copy_(0, order_N, choice_N);
    const int64_t weight = deals_out(in) ? mine_M.numel() : in.rows();
    return {own_rows(in, choice_N).unsqueeze(1).to(score_TE.device()), at::full({1}, found.gap, score_TE.options()),
            price_deltas(weight, active_A, found.price_E)};
  }

  bool deals_out(const RouteInput& in) const { return shuffle_ && !global_ && in.comm->size() > 1; }

  static Tensor share_of(const Comm& comm, const Tensor& order_N) {
    return order_N.slice(0, comm.rank() * order_N.numel() / comm.size(), (comm.rank() + 1) * order_N.numel() / comm.size());
  }

  Tensor shuffle_ranks(const RouteInput& in) const {
    if (in.noise.defined()) return base_places(in.noise.to(at::kCPU, at::kLong).reshape({-1}));
    RouteInput draw_in = in;
    draw_in.random = in.random.with("shuffle");
    return raw_uniform(draw_in, 1).select(1, 0).to(at::kDouble);
  }

  BalancedAssignment assigned(const GridScores& grid, int64_t step, const std::vector<double>& price_A) const {
    const ExpertLoads loads = expert_loads(grid.rows, grid.experts, extra_, step);
    if (solver_ == "auction") return assign_by_auction(grid, loads);
    if (solver_ == "sinkhorn") return assign_by_sinkhorn(grid, loads);
    if (solver_ == "greedy") return assign_greedily(grid, loads, price_A);
    return assign_exactly(grid, loads, price_A);
  }

  Tensor gathered(const RouteInput& in, const Tensor& rows) const {
    return global_ || deals_out(in) ? in.comm->all_gather(rows.contiguous()) : rows;
  }

  Tensor own_rows(const RouteInput& in, const Tensor& choice_T) const {
    if (!global_ && !deals_out(in)) return choice_T;
    const Tensor count_R = in.comm->all_gather(at::full({1}, in.rows(), at::kLong));
    const int64_t before = count_R.slice(0, 0, in.comm->rank()).sum().item<int64_t>();
    return choice_T.slice(0, before, before + in.rows());
  }

  // Both are sums over rows, so that micro-batches and ranks add up.
  std::map<std::string, Tensor> price_deltas(int64_t weight, const Tensor& active_A, const std::vector<double>& price_A) const {
    const auto rows = static_cast<double>(weight);
    Tensor sum_E = at::zeros({spec_.max_experts}, at::kDouble);
    sum_E.index_copy_(0, active_A.to(at::kCPU), base_tensor(price_A, at::kDouble).mul(rows));
    return {{"rows_times_price", sum_E}, {"price_rows", at::full({1}, rows, at::kDouble)}};
  }

  std::string solver_;
  ExtraSlots extra_;
  bool global_, shuffle_, eval_with_prices_;
  Tensor prices_E_;
};

const Registration<RouterEntry> registration_base{{
    .name = "base",
    .title = "BASE: a balanced assignment in training, greedy in evaluation",
    .citation = "Lewis et al., 2021, arXiv:2103.16716",
    .equation = "a = argmax Σ_t s[t, a_t] with T/E rows per expert, s = W x on a grid of at most 2^-28 of the largest spread "
                "of a row: within T grid steps of the best;  evaluation: a_t = argmax_e s[t,e];  y = σ(s_a) · f_a(x)",
    .facts = {.stateful = true, .batch_independent = false, .fixed_k = 1},
    .options =
        {option("solver", "exact",
                "exact (on the stated grid, with a certificate); approximate ones: auction (experts bid for rows, at "
                "most 100 rounds), sinkhorn (14 passes, then argmax and repair), greedy (expert by expert)")
             .one_of({"exact", "auction", "sinkhorn", "greedy"}),
         option("scope", "local", "one problem per rank and micro-batch, or one over all ranks").one_of({"local", "global"}),
         option("shuffle", false,
                "scope = local: deal the rows of all ranks out to them at random; on one rank, and in one "
                "problem over all, their random order decides ties"),
         option("extra_slots", "best",
                "who gets the T mod E extra rows: the best total (approximate solvers: the experts most in demand), the "
                "lowest indices, or T mod E experts from step mod E on")
             .one_of({"best", "lowest", "rotate"}),
         option("eval", "greedy", "evaluation takes the argmax of s, or of s - prices").one_of({"greedy", "greedy_with_prices"}),
         renormalise_option("none")},
    .noise_shape = "int64 permutation [T], with shuffle: the rows in the order of their places",
    .probes = {{"logits", "[T,E]", "s; -1e9 for inactive experts"},
               {"probs", "[T,E]", "softmax of s; the gates are σ(s)"},
               {"gap", "[1]", "dual bound minus value on the grid, in the scores' units; 0 = proven best; training only"}},
    .differences = {"its solver is an auction that stops early, this one is exact", "T need not be a multiple of E",
                    "a [moe.capacity] with priority = \"batch\" or \"score\" serves by σ(s)"},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<BaseRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
