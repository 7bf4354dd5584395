// Balance loss of GShard (Lepikhin et al. 2020, 2006.16668) and Switch Transformers (Fedus et al. 2021, 2101.03961):
//
//   E · Σ_e f_e · P_e,   f_e = rows that chose e / T (no gradient),   P_e = mean probability of e
//
// Conventions, each with its value at perfect balance and with all rows on the same k experts:
//   counts = first_choice                  1   E/k   Switch, GShard, V-MoE's gshard loss: only a row's first choice counts
//   counts = any_choice                    k   E     flaxformer and Mixtral-style code: every choice counts, Σ f = k
//   counts = any_choice, divide_by_k       1   E/k   Megatron, DeepSpeed top-k, OLMo-core; f / Σ f where k varies (top-p)
//   coefficient divided by E²           1/E²  1/(kE) fairscale: the mean over experts of f_e · P_e
//   second_place = 0.5                   1.5   E/k + E/2(k-1)  Mesh TensorFlow's option for GShard: adds half of the same sum
//                                                    over second choices, P without the first choice, renormalised (1e-9)
//   layers = pooled                                  Mixtral-style code: counts and probabilities of all layers form one value
//   probabilities = noisy                            V-MoE's gshard loss: softmax of the noisy logits
// With room to grow E is max_experts: balance over A active experts is E/A times the value above.
// Choices are counted before any drop, and before a policy refuses a second expert. 1 is no lower bound: where f and P run
// against each other the value is smaller.
#include "core/losses/parts.h"

#include <limits>

namespace moelab {
namespace {

class BalanceLoss : public Loss {
 public:
  explicit BalanceLoss(const Options& options)
      : any_choice_(options.text("counts") == "any_choice"),
        divide_by_k_(any_choice_ && options.flag("divide_by_k")),
        noisy_(options.text("probabilities") == "noisy"),
        pooled_(options.text("layers") == "pooled"),
        second_place_(options.real("second_place")) {}

  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Tensor probability_TE = probabilities(input);
    std::vector<Tensor> rows{counted(input, probability_TE.scalar_type()), probability_TE};
    if (second_place_ > 0) add_second_place(input, probability_TE, rows);
    return rows;
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    const Tensor& count_E = statistics.sums[0];
    const Tensor share_E = divide_by_k_ ? count_E.div(count_E.sum().clamp_min(1)) : mean_over_rows(count_E, statistics.rows);
    const Tensor first = agreement(share_E, statistics.sums[1], statistics.rows);
    if (second_place_ == 0) return first;
    const Tensor second_share_E = mean_over_rows(statistics.sums[2], statistics.rows);
    return first.add(agreement(second_share_E, statistics.sums[3], statistics.rows), second_place_);
  }

  bool pooled_over_layers() const override { return pooled_; }

  Landmarks landmarks(int64_t experts, int64_t k) const override { return landmarks_among(experts, experts, k); }

  Landmarks landmarks_among(int64_t active, int64_t experts, int64_t k) const override {
    const double choices = k > 0 ? static_cast<double>(k) : std::numeric_limits<double>::quiet_NaN();
    const double all = static_cast<double>(experts), even = all / static_cast<double>(active);
    const double second = k == 1 ? 0 : second_place_;
    if (!any_choice_ || divide_by_k_) return {(1 + second) * even, all / choices + second_collapsed(all, choices)};
    return {(choices + second) * even, all + second_collapsed(all, choices)};
  }

 private:
  Tensor probabilities(const LossInput& input) const {
    const Scores& scores = input.out.scores;
    if (noisy_) return required(scores.noisy_TE, "noisy logits", "balance", input).softmax(1);
    return required(scores.loss_TE, "probabilities", "balance", input);
  }

  // E · Σ_e f_e P_e from shares and the sums of probabilities.
  static Tensor agreement(const Tensor& share_E, const Tensor& probability_sum_E, int64_t rows) {
    return share_E.mul(mean_over_rows(probability_sum_E, rows)).sum().mul(share_E.size(0));
  }

  // All rows on the same k experts, each with the other k - 1 behind its first.
  double second_collapsed(double experts, double choices) const {
    return second_place_ == 0 || choices == 1 ? 0 : second_place_ * experts / (choices - 1);
  }

  // Which expert is a row's second choice, and its probabilities without the first one.
  static void add_second_place(const LossInput& input, const Tensor& probability_TE, std::vector<Tensor>& rows) {
    const Tensor& choice_TK = input.out.assignment.choice_TK;
    const at::ScalarType dtype = probability_TE.scalar_type();
    const Tensor first_TE = chosen_experts(choice_TK.slice(1, 0, 1), input.experts, dtype);
    const Tensor rest_TE = probability_TE.mul(first_TE.neg().add(1));
    rows.push_back(chosen_experts(choice_TK.slice(1, 1, 2), input.experts, dtype));
    rows.push_back(rest_TE.div(rest_TE.sum(1, /*keepdim=*/true).add(1e-9)));
  }

  // [T,E], 1 where a choice of the row counts.
  Tensor counted(const LossInput& input, at::ScalarType dtype) const {
    const Tensor& choice_TK = input.out.assignment.choice_TK;
    return chosen_experts(any_choice_ ? choice_TK : choice_TK.slice(1, 0, 1), input.experts, dtype);
  }

  bool any_choice_, divide_by_k_, noisy_, pooled_;
  double second_place_;
};

std::string balance_refuses(const RouterFacts& facts) {
  const std::string reason = refuses_without_choices(facts);
  return reason.empty() ? refuses_without_scores(facts) : reason;
}

const Registration<LossEntry> balance_registration{{
    .name = "balance",
    .title = "Balance loss of GShard and Switch",
    .citation = "Lepikhin et al. 2020, 2006.16668; Fedus et al. 2021, 2101.03961",
    .equation = "E · Σ_e f_e · P_e, f = share of rows that chose e (before drops, no gradient), P = mean probability; "
                "fairscale's mean_e f_e·P_e is 1/E² of it",
    .options =
        {
            option("counts", "first_choice", "which choices of a row count: its first one, or each (then Σ f = k)")
                .one_of({"first_choice", "any_choice"}),
            option("divide_by_k", false, "any_choice only: divide f by the mean number of choices, so that Σ f = 1")
                .read_when("counts", {"any_choice"}),
            option("probabilities", "clean",
                   "P from probabilities without noise, or softmax of the noisy logits, of sigmoid routers too")
                .one_of({"clean", "noisy"}),
            option("layers", "each", "one value per layer, or one value from the counts of all layers together")
                .one_of({"each", "pooled"}),
            option("second_place", 0.0,
                   "weight of the same sum over second choices, with probabilities renormalised without "
                   "the first (Mesh TensorFlow's option for GShard: 0.5)")
                .at_least(0),
        },
    .make = [](const Options& options, const RouterEntry&) { return std::make_unique<BalanceLoss>(options); },
    .refuses = balance_refuses,
}};

}  // namespace
}  // namespace moelab
