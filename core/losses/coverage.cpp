// Coverage loss of Mesh TensorFlow's expert choice (code beside Shazeer et al. 2018, 1811.02084): the experts together are to
// want each row of a group alike, so that no row is left behind.
//
//   mean over groups of n · Σ_t ā_t²,   ā_t = mean_e q_te,   q_·e = softmax of expert e's logits over the n rows of the group
//
// Σ_t ā_t = 1 in each group, so the value is 1 where all rows are wanted alike, n/m where m of the n rows share all that the
// experts want, and n where they all want one row. It compares rows: that all rows choose the same experts, which other balance
// losses punish, is 1 here too.
//
// A softmax over rows has to see its rows together. So `group` says which rows are compared (its default is that of
// expert_choice; set both alike), and the scope of the loss says only over which groups the mean is taken, all groups weighing
// the same. Groups that are sequences lie within a micro-batch: their mean does not depend on the split of a step. Those of
// group = micro and time_step are the rows of one micro-batch of one rank, whatever the scope.
#include "core/losses/parts.h"
#include "core/select.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

namespace moelab {
namespace {

// [T,1], the number of rows in the row's group.
Tensor group_sizes(const std::vector<Tensor>& groups, const Tensor& like_TE) {
  Tensor size_T1 = at::empty({like_TE.size(0), 1}, like_TE.options().requires_grad(false));
  for (const Tensor& row_N : groups) size_T1.index_fill_(0, row_N, static_cast<double>(row_N.numel()));
  return size_T1;
}

class CoverageLoss : public Loss {
 public:
  explicit CoverageLoss(const Options& options) : group_(options.text("group")), noisy_(options.text("logits") == "noisy") {}

  // Rows sum to Σ over groups of n · Σ_t ā_t², and to the number of groups.
  std::vector<Tensor> row_statistics(const LossInput& input) const override {
    const Scores& scores = input.out.scores;
    const Tensor& logits_TE = required(noisy_ ? scores.noisy_TE : scores.clean_TE, "logits", "coverage", input);
    const std::vector<Tensor> groups = rows_by_key(group_of_rows(input.in));
    const Tensor share_TE = softmax_over_rows(logits_TE, groups), active_E = input.router.active_experts_E();
    const Tensor counted_TA = active_E.defined() ? share_TE.index_select(1, active_E.nonzero().squeeze(1)) : share_TE;
    const Tensor size_T1 = group_sizes(groups, logits_TE);
    return {counted_TA.mean(1, /*keepdim=*/true).square().mul(size_T1), size_T1.reciprocal()};
  }

  Tensor value(const LossStatistics& statistics, const Router&) const override {
    const Tensor groups = statistics.sums[1].squeeze();
    return statistics.sums[0].squeeze().div(groups.masked_fill(groups.eq(0), 1));
  }

  Landmarks landmarks(int64_t, int64_t) const override { return {1, 1}; }
  Landmarks landmarks_among(int64_t, int64_t, int64_t) const override { return {1, 1}; }

 private:
  Tensor group_of_rows(const RouteInput& in) const {
    if (group_ == "sequence") return in.sequence_T;
    return group_ == "time_step" ? in.position_T : at::zeros_like(in.sequence_T);
  }

  std::string group_;
  bool noisy_;
};

const Registration<LossEntry> coverage_registration{{
    .name = "coverage",
    .title = "Coverage: experts want every row of a group alike",
    .citation = "Shazeer et al. 2018, 1811.02084 (the code of Mesh TensorFlow)",
    .equation = "mean over groups of n · Σ_t ā_t², ā_t = mean_e softmax over the group's n rows; n where experts want one row, "
                "blind to which experts are chosen",
    .options =
        {
            option("group", "sequence",
                   "rows that the softmax compares: of a sequence, of a micro-batch, or of equal position in it")
                .one_of({"sequence", "micro", "time_step"}),
            option("logits", "noisy", "with the noise that the choice saw, or without").one_of({"noisy", "clean"}),
        },
    .make = [](const Options& options, const RouterEntry&) { return std::make_unique<CoverageLoss>(options); },
    .refuses = refuses_without_scores,
}};

}  // namespace
}  // namespace moelab
