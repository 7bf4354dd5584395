// Pieces that several losses share. A loss file holds only what is its own.
#pragma once

#include "core/loss.h"

namespace moelab {

// values_TK laid out by expert: [T,E], zero where an expert was not chosen. Entries of -1 choices are ignored.
Tensor spread_over_experts(const Tensor& values_TK, const Tensor& choice_TK, int64_t experts);

// 1 where the row chose the expert, pairs that were refused or dropped later included; [T,E] without gradient.
Tensor chosen_experts(const Tensor& choice_TK, int64_t experts, at::ScalarType dtype);

// A loss CV²(sums[0]) over all experts: 0 where every one has the same share, E/active - 1 where only the active ones do.
class VariationLoss : public Loss {
 public:
  explicit VariationLoss(const Options& options);
  Tensor value(const LossStatistics& statistics, const Router& router) const override;
  Landmarks landmarks(int64_t experts, int64_t k) const override;
  Landmarks landmarks_among(int64_t active, int64_t experts, int64_t k) const override;

 private:
  bool sample_;  // variance divided by E - 1
};

// CV², variance over mean². Population variance divides by E, sample variance by E - 1. It is 0, with a gradient of 0, for an
// all-zero vector and for E = 1.
Tensor squared_variation(const Tensor& sums_E, bool sample_variance);

// CV² when all rows share the same k of E experts evenly: E/k - 1 (· E/(E - 1) for sample variance). NaN where k varies.
double collapsed_variation(int64_t experts, int64_t k, bool sample_variance);

// Σ over rows divided by the rows; 0 without rows.
Tensor mean_over_rows(const Tensor& sums, int64_t rows);

// Σ_e -p ln p of each row, in nats; 0 ln 0 = 0, also in the gradient.
Tensor entropy_of_rows(const Tensor& probability_TE);

// A convention that follows the router's paper unless the user chose: the option as set, else as in the router's paper_losses
// for this loss, else the declared default.
std::string convention(const Options& options, const RouterEntry& router, const std::string& loss, const std::string& option);

// `tensor`, or an error that says what the loss needs and which layer's router does not give it.
const Tensor& required(const Tensor& tensor, const char* what, const char* loss, const LossInput& input);

OptionSpec variance_option();  // of a VariationLoss

// Reasons to refuse a router, "" = none.
std::string refuses_without_choices(const RouterFacts& facts);
std::string refuses_without_scores(const RouterFacts& facts);

}  // namespace moelab
