#include "core/diagnostics.h"

#include "core/error.h"
#include "core/execute.h"
#include "core/losses/parts.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace moelab {
namespace {

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

std::vector<int64_t> pairs_per_expert(const Tensor& choice_TK, const Tensor& counted_TK, int64_t experts) {
  const Tensor counts_E = at::bincount(choice_TK.masked_select(counted_TK), {}, experts).cpu();
  return {counts_E.const_data_ptr<int64_t>(), counts_E.const_data_ptr<int64_t>() + counts_E.numel()};
}

void record_assignment(RoutingRecord& record, const Assignment& assignment) {
  const Tensor competed_TK = assignment.kept_TK.logical_or(assignment.dropped_TK);
  record.chosen_E = pairs_per_expert(assignment.choice_TK, competed_TK, record.experts);
  record.accepted_E = pairs_per_expert(assignment.choice_TK, assignment.kept_TK, record.experts);
  record.left_behind = record.rows - assignment.kept_TK.any(1).sum().item<int64_t>();
  record.dropped = assignment.dropped_TK.sum().item<int64_t>();
  if (competed_TK.size(1) == 0) return;
  record.first_chosen = competed_TK.select(1, 0).sum().item<int64_t>();
  record.first_dropped = assignment.dropped_TK.select(1, 0).sum().item<int64_t>();
}

template <class Number>
void add_counts(std::vector<Number>& to, const std::vector<Number>& from) {
  if (to.empty()) to.resize(from.size());
  check_invariant(from.empty() || to.size() == from.size(), "records of different numbers of experts are added");
  for (size_t e = 0; e < from.size(); ++e) to[e] += from[e];
}

std::vector<int64_t> rows_while_active(const Tensor& active_E, int64_t experts, int64_t rows) {
  std::vector<int64_t> rows_E(static_cast<size_t>(experts), rows);
  if (!active_E.defined()) return rows_E;
  const Tensor flags_E = active_E.to(at::kBool).cpu().contiguous();
  for (int64_t e = 0; e < experts; ++e)
    if (!flags_E.const_data_ptr<bool>()[e]) rows_E[static_cast<size_t>(e)] = 0;
  return rows_E;
}

// Experts that were never there hold no places either.
int64_t places_of_active(int64_t places, const Tensor& active_E) {
  return active_E.defined() ? places / active_E.numel() * active_E.ne(0).sum().item<int64_t>() : places;
}

// The counts of the experts that were there.
template <class Number>
std::vector<Number> active_only(const std::vector<Number>& counts_E, const RoutingRecord& record) {
  std::vector<Number> counts;
  for (size_t e = 0; e < counts_E.size(); ++e)
    if (record.active_E[e] > 0) counts.push_back(counts_E[e]);
  return counts;
}

// Every integer of a record, so that one collective carries them.
std::vector<int64_t*> integers_of(RoutingRecord& record) {
  std::vector<int64_t*> all;
  for (int64_t& count : record.active_E) all.push_back(&count);
  for (int64_t& count : record.chosen_E) all.push_back(&count);
  for (int64_t& count : record.accepted_E) all.push_back(&count);
  for (int64_t* count : {&record.rows, &record.left_behind, &record.dropped, &record.first_chosen, &record.first_dropped,
                         &record.places, &record.entropy_rows})
    all.push_back(count);
  return all;
}

double ratio(double part, double whole) { return whole > 0 ? part / whole : kUnknown; }

// In nats, over ln E: 1 where all experts are alike, and for E = 1.
double normalised(double entropy, int64_t experts) {
  return experts == 1 ? 1 : entropy / std::log(static_cast<double>(experts));
}

double pairs_in(const std::vector<int64_t>& counts_E) { return std::accumulate(counts_E.begin(), counts_E.end(), int64_t{0}); }

template <class Number>
double load_entropy_nats(const std::vector<Number>& counts_E, double total) {
  double entropy = 0;
  for (const Number count : counts_E)
    if (count > 0) entropy -= count / total * std::log(count / total);
  return entropy;
}

double load_cv2(const std::vector<int64_t>& counts_E, double mean) {
  double sum = 0;
  for (const int64_t count : counts_E) sum += (count / mean - 1) * (count / mean - 1);
  return sum / counts_E.size();
}

void add_load_metrics(std::map<std::string, double>& metrics, const std::vector<int64_t>& counts_E) {
  const double total = pairs_in(counts_E);
  if (total == 0) return;
  const double mean = total / counts_E.size();
  const auto [least, most] = std::minmax_element(counts_E.begin(), counts_E.end());
  const double entropy = load_entropy_nats(counts_E, total);
  metrics["load_cv2"] = load_cv2(counts_E, mean);
  metrics["max_over_mean"] = *most / mean;
  metrics["max_violation"] = *most / mean - 1;
  metrics["min_over_mean"] = *least / mean;
  metrics["load_entropy"] = normalised(entropy, counts_E.size());
  metrics["effective_experts"] = std::exp(entropy);
  metrics["inverse_simpson"] = counts_E.size() / (1 + metrics["load_cv2"]);
}

void add_sparse_metrics(std::map<std::string, double>& metrics, const RoutingRecord& record) {
  if (record.rows == 0) return;
  const std::vector<int64_t> chosen_A = active_only(record.chosen_E, record);
  add_load_metrics(metrics, chosen_A);
  metrics["dead"] = std::count(chosen_A.begin(), chosen_A.end(), 0);
  metrics["dead_share"] = ratio(metrics["dead"], chosen_A.size());
  metrics["dropped"] = ratio(record.dropped, pairs_in(chosen_A));
  metrics["dropped_first"] = ratio(record.first_dropped, record.first_chosen);
  metrics["dropped_later"] = ratio(record.dropped - record.first_dropped, pairs_in(chosen_A) - record.first_chosen);
  metrics["left_behind"] = ratio(record.left_behind, record.rows);
  metrics["capacity_used"] = ratio(pairs_in(record.accepted_E), record.places);
}

void add_mixture_metrics(std::map<std::string, double>& metrics, const std::vector<double>& weight_A) {
  const double total = std::accumulate(weight_A.begin(), weight_A.end(), 0.0);
  if (total == 0) return;
  metrics["weight_max_over_mean"] = *std::max_element(weight_A.begin(), weight_A.end()) * weight_A.size() / total;
  metrics["weight_effective_experts"] = std::exp(load_entropy_nats(weight_A, total));
}

}  // namespace

int64_t RoutingRecord::active_experts() const {
  return std::count_if(active_E.begin(), active_E.end(), [](int64_t rows_active) { return rows_active > 0; });
}

void RoutingRecord::add(const RoutingRecord& other) {
  experts = std::max(experts, other.experts);
  add_counts(active_E, other.active_E);
  add_counts(chosen_E, other.chosen_E);
  add_counts(accepted_E, other.accepted_E);
  add_counts(weight_E, other.weight_E);
  rows += other.rows;
  left_behind += other.left_behind;
  dropped += other.dropped;
  first_chosen += other.first_chosen;
  first_dropped += other.first_dropped;
  places += other.places;
  entropy_sum += other.entropy_sum;
  entropy_rows += other.entropy_rows;
}

void RoutingRecord::all_reduce(Comm& comm) {
  const std::vector<int64_t*> fields = integers_of(*this);
  std::vector<int64_t> packed;
  for (const int64_t* field : fields) packed.push_back(*field);
  comm.all_reduce(at::from_blob(packed.data(), {static_cast<int64_t>(packed.size())}, at::kLong));
  for (size_t i = 0; i < fields.size(); ++i) *fields[i] = packed[i];
  comm.all_reduce(at::from_blob(&entropy_sum, {1}, at::kDouble));
  if (!weight_E.empty()) comm.all_reduce(at::from_blob(weight_E.data(), {static_cast<int64_t>(weight_E.size())}, at::kDouble));
}

RoutingRecord record_of(const RouteInput& in, const RouteOutput& out, int64_t experts, const Tensor& active_E) {
  const at::NoGradGuard no_grad;
  RoutingRecord record;
  record.experts = experts;
  record.rows = in.rows();
  record.active_E = rows_while_active(active_E, experts, in.rows());
  record.places = places_of_active(out.places, active_E);
  if (out.assignment.defined()) record_assignment(record, out.assignment);
  if (const Tensor weight_E = expert_weights_E(out.plan); weight_E.defined())
    record.weight_E.assign(weight_E.const_data_ptr<double>(), weight_E.const_data_ptr<double>() + weight_E.numel());
  if (!out.scores.loss_TE.defined()) return record;
  record.entropy_sum = entropy_of_rows(out.scores.loss_TE.to(at::kDouble)).sum().item<double>();
  record.entropy_rows = out.scores.loss_TE.size(0);
  return record;
}

std::map<std::string, double> metrics_of(const RoutingRecord& record) {
  std::map<std::string, double> metrics;
  for (const MetricDoc& doc : metric_docs()) metrics[doc.name] = kUnknown;
  if (!record.chosen_E.empty()) add_sparse_metrics(metrics, record);
  if (!record.weight_E.empty()) add_mixture_metrics(metrics, active_only(record.weight_E, record));
  if (record.entropy_rows > 0)
    metrics["router_entropy"] = normalised(record.entropy_sum / record.entropy_rows, record.active_experts());
  return metrics;
}

// c_e pairs that chose e before the capacity, a_e accepted ones, C_e places, f_e = c_e / Σc, T rows, w_e the share of e in the
// rows' outputs, E the experts that were active at some time in the window.
const std::vector<MetricDoc>& metric_docs() {
  static const std::vector<MetricDoc> docs = {
      {"load_cv2", "Var(c)/mean(c)²", "0 … E/k-1", "imbalance; uniform random routing gives (E-k)/(kT), never 0 [B1]"},
      {"max_violation", "(max c - mean c)/mean c", "0 … E/k-1",
       "excess of the fullest expert; random routing: about √(2 ln E · CV²) [B5]"},
      {"max_over_mean", "max c/mean c", "1 … E/k", "how much longer the fullest expert works than an even share [B6]"},
      {"min_over_mean", "min c/mean c", "0 … 1", "near 0: an expert starves [B7]"},
      {"load_entropy", "-Σ f ln f/ln E", "ln k/ln E … 1", "evenness of the load; 1 for E = 1 [B9]"},
      {"effective_experts", "exp(-Σ f ln f)", "k … E", "how many evenly loaded experts would be as uneven [B10]"},
      {"inverse_simpson", "1/Σ f²", "k … E", "the same by the sum of squares: E/(1 + load_cv2) [B10]"},
      {"dead", "#{e: c_e = 0}", "0 … E-k", "active experts that no row chose in this window"},
      {"dead_share", "#{e: c_e = 0}/E", "0 … (E-k)/E", "the same as a share of the active experts [B11]"},
      {"dropped", "(Σc - Σa)/Σc", "0 … 1", "share of pairs that did not fit [B14]"},
      {"dropped_first", "of first choices", "0 … 1", "share of the rows' first choices that did not fit [B14, rank 1]"},
      {"dropped_later", "of the others", "0 … 1", "share of all later choices that did not fit [B14, ranks 2 … k]"},
      {"left_behind", "#{t without accepted expert}/T", "0 … 1", "share of rows that the layer passes by [B15]"},
      {"capacity_used", "Σa/ΣC", "0 … 1", "share of places filled; not a number without a capacity [B16]"},
      {"weight_max_over_mean", "max w/mean w", "1 … E",
       "of plans that mix all experts: the heaviest expert against an even share"},
      {"weight_effective_experts", "exp(-Σ w ln w)", "1 … E",
       "of plans that mix all experts: how many equally heavy experts would be as uneven [R16]"},
      {"router_entropy", "mean_t H(p_t)/ln E", "0 … 1", "1: undecided, 0: certain; without noise; 1 for E = 1 [R3]"},
  };
  return docs;
}

}  // namespace moelab
