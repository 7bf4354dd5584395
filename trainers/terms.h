// Routing losses summed over forward passes: what training and evaluation form one value from.
#pragma once

#include "core/model/model.h"

#include <map>
#include <vector>

namespace moelab {

// A routing loss as a step or an evaluation measured it.
struct TermReading {
  double value = 0;     // unscaled
  double weighted = 0;  // times its coefficient: what is added to the loss
};

// A loss term of one site, addressed as (site, term).
struct TermKey {
  size_t site;
  size_t term;
  bool operator<(const TermKey& o) const { return site != o.site ? site < o.site : term < o.term; }
};

using TermTotals = std::map<TermKey, LossStatistics>;

// Formed from the micro-batch at hand alone.
bool is_local(const LossTerm& term);

const LossTerm& term_at(const std::vector<Site*>& sites, const TermKey& key);

// total += share · part, without gradient; a total without sums takes the part's shapes. Rows are not shared.
void add_statistics(LossStatistics& total, const LossStatistics& part, double share);
void all_reduce(LossStatistics& total, Comm& comm);

// Terms whose loss pools its layers share one total: the sum over the sites of one table of the config with the same label.
void pool_layers(TermTotals& totals, const std::vector<Site*>& sites);

// The term that stands for all that share its pool; itself where nothing is pooled. A pool's value is that of its first term's
// router, and is counted once.
TermKey pool_head(const std::vector<Site*>& sites, const TermKey& key);
bool is_pool_head(const std::vector<Site*>& sites, const TermKey& key);

// Whether values of micro-batches add up to the step's. Losses that are sums do, but values per sequence are averaged always.
bool adds_up(const LossTerm& term);

// What one micro-batch's value weighs in that of `rows` rows: 1 where values add up.
double row_weight(const LossTerm& term, int64_t part_rows, int64_t rows);

// Losses that are sums over tokens are divided by the target tokens where they meet the task loss.
double sum_scale(const Loss& loss, int64_t target_tokens);

}  // namespace moelab
