// Balance loss of GShard (Lepikhin et al. 2020, 2006.16668) and Switch Transformers (Fedus et al. 2021, 2101.03961):
//
//   E · Σ_e f_e · P_e,   f_e = rows that chose e / T (no gradient),   P_e = mean probability of e
//
// Conventions, each with its value at perfect balance and with all rows on the same k experts:
//   counts = first_choice                  1   E/k   Switch, GShard, V-MoE's gshard loss: only a row's first choice counts
//   counts = any_choice                    k   E     flaxformer and Mixtral-style code: every choice counts, Σ f = k
//   counts = any_choice, divide_by_k       1   E/k   Megatron, DeepSpeed top-k, OLMo-core; f / Σ f where k varies (top-p)
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
        pooled_(options.text("layers") == "pooled") {}

  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Tensor probability_TE = probabilities(input);
    return {counted(input, probability_TE.scalar_type()), probability_TE};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    const Tensor& count_E = statistics.sums[0];
    const Tensor share_E = divide_by_k_ ? count_E.div(count_E.sum().clamp_min(1)) : mean_over_rows(count_E, statistics.rows);
    const Tensor probability_E = mean_over_rows(statistics.sums[1], statistics.rows);
    return share_E.mul(probability_E).sum().mul(share_E.size(0));
  }

  bool pooled_over_layers() const override { return pooled_; }

  Landmarks landmarks(int64_t experts, int64_t k) const override { return landmarks_among(experts, experts, k); }

  Landmarks landmarks_among(int64_t active, int64_t experts, int64_t k) const override {
    const double choices = k > 0 ? static_cast<double>(k) : std::numeric_limits<double>::quiet_NaN();
    const double all = static_cast<double>(experts), even = all / static_cast<double>(active);
    if (!any_choice_ || divide_by_k_) return {even, all / choices};
    return {choices * even, all};
  }

 private:
  Tensor probabilities(const LossInput& input) const {
    const Scores& scores = input.out.scores;
    if (noisy_) return required(scores.noisy_TE, "noisy logits", "balance", input).softmax(1);
    return required(scores.loss_TE, "probabilities", "balance", input);
  }

  // [T,E], 1 where a choice of the row counts.
  Tensor counted(const LossInput& input, at::ScalarType dtype) const {
    const Tensor& choice_TK = input.out.assignment.choice_TK;
    return chosen_experts(any_choice_ ? choice_TK : choice_TK.slice(1, 0, 1), input.experts, dtype);
  }

  bool any_choice_, divide_by_k_, noisy_, pooled_;
};

std::string balance_refuses(const RouterFacts& facts) {
  const std::string reason = refuses_without_choices(facts);
  return reason.empty() ? refuses_without_scores(facts) : reason;
}

const Registration<LossEntry> balance_registration{{
    .name = "balance",
    .title = "Balance loss of GShard and Switch",
    .citation = "Lepikhin et al. 2020, 2006.16668; Fedus et al. 2021, 2101.03961",
    .equation = "E · Σ_e f_e · P_e, f = share of rows that chose e (before drops, no gradient), P = mean probability",
    .options =
        {
            option("counts", "first_choice", "which choices of a row count: its first one, or each (then Σ f = k)")
                .one_of({"first_choice", "any_choice"}),
            option("divide_by_k", false, "any_choice only: divide f by the mean number of choices, so that Σ f = 1"),
            option("probabilities", "clean", "P from probabilities without noise, or softmax of the noisy logits")
                .one_of({"clean", "noisy"}),
            option("layers", "each", "one value per layer, or one value from the counts of all layers together")
                .one_of({"each", "pooled"}),
        },
    .make = [](const Options& options, const RouterEntry&) { return std::make_unique<BalanceLoss>(options); },
    .refuses = balance_refuses,
}};

}  // namespace
}  // namespace moelab
