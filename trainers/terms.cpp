#include "trainers/terms.h"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <string>
#include <utility>

namespace moelab {

bool is_local(const LossTerm& term) { return term.scope == LossScope::kMicro || term.scope == LossScope::kSequence; }

const LossTerm& term_at(const std::vector<Site*>& sites, const TermKey& key) { return sites[key.site]->losses[key.term]; }

void add_statistics(LossStatistics& total, const LossStatistics& part, double share) {
  if (total.sums.empty())
    for (const Tensor& sum : part.sums) total.sums.push_back(at::zeros_like(sum.detach()));
  for (size_t i = 0; i < part.sums.size(); ++i) total.sums[i].add_(part.sums[i].detach(), share);
  total.rows += part.rows;
}

void all_reduce(LossStatistics& total, Comm& comm) {
  for (const Tensor& sum : total.sums) comm.all_reduce(sum);
  const Tensor rows = at::tensor({total.rows}, at::kLong);
  comm.all_reduce(rows);
  total.rows = rows.item<int64_t>();
}

void pool_layers(TermTotals& totals, const std::vector<Site*>& sites) {
  std::map<std::pair<std::string, std::string>, LossStatistics> pooled;  // by (table, label)
  for (const auto& [key, total] : totals)
    if (const LossTerm& term = term_at(sites, key); term.loss->pooled_over_layers())
      add_statistics(pooled[{sites[key.site]->table, term.label}], total, 1);
  for (auto& [key, total] : totals)
    if (const LossTerm& term = term_at(sites, key); term.loss->pooled_over_layers())
      total = pooled.at({sites[key.site]->table, term.label});
}

TermKey pool_head(const std::vector<Site*>& sites, const TermKey& key) {
  const LossTerm& term = term_at(sites, key);
  if (!term.loss->pooled_over_layers()) return key;
  for (size_t s = 0; s < key.site; ++s)
    for (size_t t = 0; t < sites[s]->losses.size(); ++t) {
      const LossTerm& other = sites[s]->losses[t];
      const bool together = other.label == term.label && sites[s]->table == sites[key.site]->table;
      if (other.loss->pooled_over_layers() && together) return {s, t};
    }
  return key;
}

bool is_pool_head(const std::vector<Site*>& sites, const TermKey& key) { return pool_head(sites, key).site == key.site; }

bool adds_up(const LossTerm& term) { return term.loss->reduces_by_sum() && term.scope != LossScope::kSequence; }

double row_weight(const LossTerm& term, int64_t part_rows, int64_t rows) {
  return adds_up(term) ? 1 : static_cast<double>(part_rows) / static_cast<double>(std::max<int64_t>(1, rows));
}

double sum_scale(const Loss& loss, int64_t target_tokens) {
  return loss.reduces_by_sum() ? 1.0 / static_cast<double>(std::max<int64_t>(1, target_tokens)) : 1;
}

}  // namespace moelab
