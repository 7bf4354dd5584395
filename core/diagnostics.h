// What is measured of a routing decision. Everything kept is a sum of integers, or of per-row values in double: records add up
// over micro-batches and ranks, and ratios are formed last. Recomputation never records; padding is not there to be counted.
#pragma once

#include "core/comm.h"
#include "core/router.h"

#include <map>
#include <string>
#include <vector>

namespace moelab {

// Additive counters of one site (spec ids in brackets refer to the balance metrics B1–B21 of the diagnostics literature).
struct RoutingRecord {
  int64_t experts = 0;              // not summed: equal in all records of a site
  std::vector<int64_t> active_E;    // rows that could have chosen each expert: 0 = it was not there at any time
  std::vector<int64_t> chosen_E;    // pairs per expert before the capacity, without refused ones; empty: no sparse plan
  std::vector<int64_t> accepted_E;  // after it
  std::vector<double> weight_E;  // Σ over rows of each expert's share in the output, where a plan mixes all; empty: a sparse plan
  int64_t rows = 0;
  int64_t left_behind = 0;          // rows without any accepted expert
  int64_t dropped = 0;              // pairs that did not fit
  int64_t first_chosen = 0;         // pairs that are their row's first choice, before the capacity
  int64_t first_dropped = 0;        // of those, the ones that did not fit
  int64_t places = 0;               // Σ capacity; 0 = no capacity
  double entropy_sum = 0;           // Σ_t H(p_t) in nats
  int64_t entropy_rows = 0;         // 0 where the router has no probabilities

  int64_t active_experts() const;   // how many were there at some time
  void add(const RoutingRecord& other);
  void all_reduce(Comm& comm);
};

// `active_E` is Router::active_experts_E(): undefined = all.
RoutingRecord record_of(const RouteInput& in, const RouteOutput& out, int64_t experts, const Tensor& active_E = {});

// Ratios of a record over the experts that were active at some time (E is their number): load_cv2, max_violation,
// max_over_mean, min_over_mean, load_entropy (normalised), effective_experts, inverse_simpson, dead (count), dead_share, dropped
// (share of pairs), dropped_first and dropped_later (share of first and of later choices), left_behind (share of rows),
// capacity_used, weight_max_over_mean, weight_effective_experts, router_entropy (normalised). What cannot be formed (no rows, no
// capacity, no mixture) is NaN.
std::map<std::string, double> metrics_of(const RoutingRecord& record);

struct MetricDoc {
  std::string name;
  std::string equation;
  std::string range;
  std::string doc;
};
const std::vector<MetricDoc>& metric_docs();  // for `list metrics` and the generated tables

}  // namespace moelab
