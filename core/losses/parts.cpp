#include "core/losses/parts.h"

#include "core/error.h"

#include <ATen/ops/scatter_add.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <cmath>
#include <limits>

namespace moelab {

Tensor spread_over_experts(const Tensor& values_TK, const Tensor& choice_TK, int64_t experts) {
  const Tensor chosen_TK = values_TK.masked_fill(choice_TK.lt(0), 0);
  const Tensor empty_TE = at::zeros({choice_TK.size(0), experts}, values_TK.options().requires_grad(false));
  return empty_TE.scatter_add(1, choice_TK.clamp_min(0), chosen_TK);
}

Tensor chosen_experts(const Tensor& choice_TK, int64_t experts, at::ScalarType dtype) {
  return spread_over_experts(choice_TK.ge(0).to(dtype), choice_TK, experts);
}

// Dividing by the mean first keeps tiny sums from underflowing when squared; an all-zero vector is left as it is.
Tensor squared_variation(const Tensor& sums_E, bool sample_variance) {
  const int64_t experts = sums_E.size(-1);
  const Tensor mean = sums_E.mean();
  const Tensor ratio_E = sums_E.div(mean.masked_fill(mean.eq(0), 1));
  const int64_t divisor = sample_variance && experts > 1 ? experts - 1 : experts;
  return ratio_E.sub(ratio_E.mean()).square().sum().div(divisor);
}

double collapsed_variation(int64_t experts, int64_t k, bool sample_variance) {
  if (k <= 0) return std::numeric_limits<double>::quiet_NaN();
  const double population = static_cast<double>(experts) / k - 1;
  return sample_variance && experts > 1 ? population * experts / (experts - 1) : population;
}

Tensor mean_over_rows(const Tensor& sums, int64_t rows) { return sums.div(rows > 0 ? rows : 1); }

// The clamp keeps ln 0 out of the gradient, where softmax would turn it into 0·∞.
Tensor entropy_of_rows(const Tensor& probability_TE) {
  const bool wide = probability_TE.scalar_type() == at::kDouble;
  const double smallest = wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  return probability_TE.mul(probability_TE.clamp_min(smallest).log()).sum(1).neg();
}

std::string convention(const Options& options, const RouterEntry& router, const std::string& loss, const std::string& option) {
  if (options.was_set(option)) return options.text(option);
  for (const PaperLoss& paper : router.paper_losses)
    if (paper.name == loss && paper.options.count(option)) return std::get<std::string>(paper.options.at(option));
  return options.text(option);
}

const Tensor& required(const Tensor& tensor, const char* what, const char* loss, const LossInput& input) {
  if (!tensor.defined())
    usage_error(fmt::format("loss '{}' reads {}, which the router of layer {} does not have: remove this [[loss]] there", loss,
                            what, input.in.layer));
  return tensor;
}

OptionSpec variance_option() {
  return option("variance", "population", "divisor of the variance in CV²: E (population) or E - 1 (sample)")
      .one_of({"population", "sample"});
}

VariationLoss::VariationLoss(const Options& options) : sample_(options.text("variance") == "sample") {}

Tensor VariationLoss::value(const LossStatistics& statistics, const Router&) const {
  return squared_variation(statistics.sums[0], sample_);
}

Landmarks VariationLoss::landmarks(int64_t experts, int64_t k) const { return landmarks_among(experts, experts, k); }

Landmarks VariationLoss::landmarks_among(int64_t active, int64_t experts, int64_t k) const {
  return {collapsed_variation(experts, active, sample_), collapsed_variation(experts, k, sample_)};
}

std::string refuses_without_choices(const RouterFacts& facts) {
  if (facts.plan == PlanForm::kSparse) return "";
  return fmt::format("it counts which experts rows chose, and a {} plan chooses none", to_string(facts.plan));
}

std::string refuses_without_scores(const RouterFacts& facts) {
  return facts.has_scores ? "" : "it reads the router's logits or probabilities, and this router has none";
}

}  // namespace moelab
