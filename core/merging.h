// Shared steps of routers whose plans merge experts: sums over groups of rows, and the plan that each group's logits make.
#pragma once

#include "core/select.h"

namespace moelab {

struct GroupSums {
  Tensor sum_GD;   // float32 or better, on the graph of x
  Tensor count_G;  // rows per group, as sum_GD's dtype
  Tensor mean_GD() const;  // 0 for a group without rows
};
GroupSums sums_over_groups(const Tensor& x_TD, const Tensor& group_T, int64_t groups);

// Rows of group g run through Σ_e softmax(logits_GE[g])_e · θ_e. The scores of a row are those of its group.
RouteOutput finish_merge(const Tensor& logits_GE, const Tensor& group_T);

// Refuses [moe.noise] for routers that draw none.
void require_no_noise(const RouterSpec& spec, const char* router);

}  // namespace moelab
