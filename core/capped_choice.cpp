#include "core/capped_choice.h"

#include <ATen/ops/logsumexp.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace moelab {
namespace {

// Orders pairs as the entropy-regularised assignment A does: ln A, but above 0 where A = 1. Each cap keeps the correction that
// its last projection made (Dykstra); the sums per expert, being equalities, need none. The entropy's weight starts at 0.1 and
// falls by a tenth per round down to lambda, where alone the projections would crawl; a new one rescales the dual prices.
Tensor capped_assignment(const Tensor& score_NE, double places, double cap, double lambda, int64_t iterations) {
  double now = std::max(lambda, 0.1);
  Tensor log_NE = score_NE.to(at::kDouble).div(now);
  Tensor row_N1 = at::zeros({score_NE.size(0), 1}, at::kDouble), entry_NE = at::zeros_like(log_NE);
  for (int64_t i = 0; i < iterations; ++i) {
    const Tensor excess_1E = at::logsumexp(log_NE, {0}, /*keepdim=*/true).sub(std::log(places));
    if (i > 0 && now == lambda && excess_1E.abs().max().item<double>() < 1e-6) break;
    log_NE = log_NE.sub(excess_1E).add(row_N1);
    row_N1 = at::logsumexp(log_NE, {1}, /*keepdim=*/true).sub(std::log(cap)).clamp_min(0);
    log_NE = log_NE.sub(row_N1).add(entry_NE);
    entry_NE = log_NE.clamp_min(0);
    log_NE = log_NE.sub(entry_NE);
    const double next = std::max(lambda, 0.9 * now);
    for (Tensor* price : {&log_NE, &row_N1, &entry_NE}) *price = price->mul(now / next);
    now = next;
  }
  return log_NE.add(entry_NE);
}

// Experts ask rows in their order; a full row keeps the experts it ranks highest, and a refused expert asks on. At the optimum
// of A nobody is refused. An expert that all rows refused takes its best ones over their cap.
class CappedChoice {
 public:
  CappedChoice(const Tensor& order_NE, int64_t places, int64_t cap)
      : order_NE_(order_NE.contiguous()),
        best_EN_(std::get<1>(order_NE.t().sort(/*stable=*/true, /*dim=*/1, /*descending=*/true)).contiguous()),
        asked_E_(order_NE.size(1), 0),
        holders_N_(order_NE.size(0)),
        cap_(static_cast<size_t>(cap)) {
    for (int64_t e = 0; e < order_NE.size(1); ++e)
      for (int64_t i = 0; i < places; ++i) find_row(e);
    for (const int64_t e : short_of_rows_) take_over_cap(e);
  }

  Tensor chosen_NE() const {
    Tensor chosen_NE = at::zeros(order_NE_.sizes(), at::kBool);
    for (size_t t = 0; t < holders_N_.size(); ++t)
      for (const int64_t e : holders_N_[t]) chosen_NE.mutable_data_ptr<bool>()[static_cast<int64_t>(t) * experts() + e] = true;
    return chosen_NE;
  }

 private:
  int64_t experts() const { return order_NE_.size(1); }
  int64_t rows() const { return order_NE_.size(0); }
  double rank(int64_t row, int64_t expert) const { return order_NE_.const_data_ptr<double>()[row * experts() + expert]; }
  int64_t wish(int64_t expert, int64_t i) const { return best_EN_.const_data_ptr<int64_t>()[expert * rows() + i]; }

  // Whoever is turned out asks on, until one is taken in or has nobody left to ask.
  void find_row(int64_t expert) {
    while (asked_E_[expert] < rows()) {
      const int64_t row = wish(expert, asked_E_[expert]++);
      std::vector<int64_t>& holders = holders_N_[row];
      holders.push_back(expert);
      if (holders.size() <= cap_) return;
      const auto before = [&](int64_t a, int64_t b) {
        return rank(row, a) != rank(row, b) ? rank(row, a) > rank(row, b) : a < b;
      };
      const auto last = std::max_element(holders.begin(), holders.end(), before);
      expert = *last;
      holders.erase(last);
    }
    short_of_rows_.push_back(expert);
  }

  void take_over_cap(int64_t expert) {
    for (int64_t i = 0; i < rows(); ++i) {
      std::vector<int64_t>& holders = holders_N_[wish(expert, i)];
      if (std::count(holders.begin(), holders.end(), expert) > 0) continue;
      holders.push_back(expert);
      return;
    }
  }

  Tensor order_NE_, best_EN_;         // best_EN_: each expert's rows, best first
  std::vector<int64_t> asked_E_;      // rows that have been asked
  std::vector<std::vector<int64_t>> holders_N_;
  std::vector<int64_t> short_of_rows_;  // an entry per missing row
  size_t cap_;
};

}  // namespace

Tensor capped_choice(const Tensor& score_NE, int64_t places, int64_t cap, double lambda, int64_t iterations) {
  const Tensor order_NE =
      capped_assignment(score_NE, static_cast<double>(places), static_cast<double>(cap), lambda, iterations);
  return CappedChoice(order_NE, places, cap).chosen_NE();
}

}  // namespace moelab
