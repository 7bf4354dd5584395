// Properties of experts: what they compute, whoever carries it out, and its gradient.
#include "core/error.h"
#include "experiments/verify_case.h"
#include "experiments/verify_expert.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

constexpr double kExecutorTolerance = 1e-10;    // fp64, whatever the order of the sums
constexpr double kDifferenceTolerance = 1e-6;   // central differences of step 1e-5 in fp64
constexpr double kBfloatTolerance =
    32 * 0x1p-9;  // some ten roundings of half a unit in the last place, each amplified up to threefold

struct ExpertRun {
  Tensor y_TD;
  std::vector<NamedTensor> gradients;
};

// Values, and gradients of Σ y·weight, zero where none arrives.
ExpertRun run_plan(const KitPlan& plan, const ExpertBank& bank, const Tensor& x_TD, const ExpertCase& at, Execution execution) {
  std::vector<NamedTensor> leaves = plan.leaves;
  leaves.push_back({"x", x_TD});
  for (const NamedTensor& entry : bank.parameters()) leaves.push_back(entry);
  for (NamedTensor& leaf : leaves) leaf.tensor.mutable_grad() = Tensor();
  ExecuteInput input;
  input.x_TD = x_TD;
  ExpertRun run{execute(plan.plan, bank, input, execution), {}};
  const Tensor scalar = run.y_TD.mul(kit_rows(at, "weights", run.y_TD.sizes().vec())).sum();
  if (scalar.requires_grad()) scalar.backward({}, /*retain_graph=*/true);
  for (const NamedTensor& leaf : leaves)
    run.gradients.push_back({leaf.name, leaf.tensor.grad().defined() ? leaf.tensor.grad().clone() : at::zeros_like(leaf.tensor)});
  return run;
}

Tensor leaf_rows(const ExpertCase& at) { return kit_rows(at, "x", {at.rows, at.width}).requires_grad_(true); }

double largest_of(const Tensor& tensor) { return tensor.numel() == 0 ? 0 : tensor.abs().max().item<double>(); }

// A gradient this much smaller than the others is zero but for rounding: each executor rounds in its own way.
constexpr double kZeroGradient = 1e-5;

void executors_must_agree(const KitPlan& plan, const ExpertBank& bank, const Tensor& x_TD, const ExpertCase& at) {
  const ExpertRun fast = run_plan(plan, bank, x_TD, at, Execution::kAuto),
                  slow = run_plan(plan, bank, x_TD, at, Execution::kReference);
  must_agree(fast.y_TD, slow.y_TD, kExecutorTolerance, "y of the fast and the reference executor", at);
  double largest = 0;
  for (const NamedTensor& gradient : slow.gradients) largest = std::max(largest, largest_of(gradient.tensor));
  for (size_t i = 0; i < fast.gradients.size(); ++i) {
    const Tensor& expected = slow.gradients[i].tensor;
    const double error = largest_of(fast.gradients[i].tensor.sub(expected));
    const double size = std::max(largest_of(expected), kZeroGradient * largest);
    must(error <= kExecutorTolerance * size,  // NaN fails
         fmt::format("gradient of {} by the fast and the reference executor: error {:.3g}, allowed {:.0e} of {:.3g}",
                     fast.gradients[i].name, error, kExecutorTolerance, size), at);
  }
}

std::string refusal_of(const ExpertSubject& subject, PlanForm form) { return kit_bank(subject, {})->refuses(form); }

std::string needs_one_stage(const ExpertSubject& subject) { return refusal_of(subject, PlanForm::kSparse); }
std::string needs_soft(const ExpertSubject& subject) { return refusal_of(subject, PlanForm::kSoft); }
std::string needs_merge(const ExpertSubject& subject) { return refusal_of(subject, PlanForm::kMerge); }

std::string needs_row_function(const ExpertSubject& subject) {
  const auto bank = kit_bank(subject, {});
  return bank->stages() == 1 && bank->has_forward_expert() ? ""
                                                           : "its rows are no function of themselves alone (no forward_expert)";
}

std::string needs_parameters(const ExpertSubject& subject) {
  if (const std::string stages = needs_one_stage(subject); !stages.empty()) return stages;
  return kit_bank(subject, {})->parameters().empty() ? "it has no parameters" : "";
}

// Random loads and the four corners: no rows, one expert, empty experts, one takes all.
void check_sparse(const ExpertSubject& subject) {
  for (int64_t i = 0; i < std::max<int64_t>(subject.cases, 8); ++i) {
    ExpertCase at{.seed = subject.seed + i};
    if (i % 8 == 1) at.rows = 0;
    if (i % 8 == 2) at.experts = at.k = 1;
    if (i % 8 == 5) at.k = at.experts;
    if (!expert_has_size(subject, at)) continue;
    const Load load = i % 8 == 3 ? Load::kOneTakesAll : i % 8 == 4 ? Load::kSomeEmpty : Load::kRandom;
    executors_must_agree(sparse_plan(at, load), *kit_bank(subject, at), leaf_rows(at), at);
  }
}

void check_soft(const ExpertSubject& subject) {
  for (const int64_t rows : {9, 2, 0}) {
    const ExpertCase at{.rows = rows, .seed = subject.seed};
    const Tensor x_TD = leaf_rows(at);
    executors_must_agree(soft_plan(at, x_TD), *kit_bank(subject, at), x_TD, at);
  }
}

void check_merge(const ExpertSubject& subject) {
  for (const int64_t rows : {9, 1, 0}) {
    const ExpertCase at{.rows = rows, .seed = subject.seed};
    executors_must_agree(merge_plan(at), *kit_bank(subject, at), leaf_rows(at), at);
  }
}

bool refused_with(const KitPlan& plan, const ExpertBank& bank, const ExpertCase& at, const std::string& reason) {
  try {
    ExecuteInput input;
    input.x_TD = leaf_rows(at);
    execute(plan.plan, bank, input);
  } catch (const Error& error) {
    return error.code() == ExitCode::kUsage && error.what() == reason;
  }
  return false;
}

void check_refusals(const ExpertSubject& subject) {
  const ExpertCase at{.seed = subject.seed};
  const auto bank = kit_bank(subject, at);
  const std::vector<std::pair<PlanForm, KitPlan>> plans{{PlanForm::kSparse, sparse_plan(at, Load::kRandom)},
                                                        {PlanForm::kSoft, soft_plan(at, leaf_rows(at))},
                                                        {PlanForm::kMerge, merge_plan(at)}};
  for (const auto& [form, plan] : plans) {
    const std::string reason = bank->refuses(form);
    must(reason.find('\n') == std::string::npos, fmt::format("the refusal of a {} plan is no single line", to_string(form)), at);
    must(reason.empty() || refused_with(plan, *bank, at, reason),
         fmt::format("a {} plan is not refused with the reason that refuses() gives", to_string(form)), at);
  }
}

std::string needs_refusal(const ExpertSubject& subject) {
  for (const PlanForm form : {PlanForm::kSparse, PlanForm::kSoft, PlanForm::kMerge})
    if (!refusal_of(subject, form).empty()) return "";
  return "it takes every form of plan";
}

// forward() against forward_expert() with the expert's own parameters, one row at a time.
void check_rows_apart(const ExpertSubject& subject) {
  const ExpertCase at{.rows = 8, .seed = subject.seed};
  const auto bank = kit_bank(subject, at);
  const Tensor rows_ND = kit_rows(at, "x", {at.rows, at.width}), offsets_E1 = at::tensor({0, 3, 3, 7, 8}, at::kLong);
  const at::NoGradGuard no_grad;
  const Tensor y_ND = bank->forward({.rows_ND = rows_ND, .offsets_E1 = offsets_E1}, 0);
  must(y_ND.sizes() == at::IntArrayRef({at.rows, bank->output_width(0)}),
       "forward() gives another shape than output_width() says", at);
  std::vector<Tensor> alone;
  for (int64_t n = 0; n < at.rows; ++n) {
    const int64_t expert = n < 3 ? 0 : n < 7 ? 2 : 3;
    alone.push_back(bank->forward_expert(expert, bank->parameters_of(expert), rows_ND.narrow(0, n, 1)));
  }
  must_agree(y_ND, at::cat(alone), kExecutorTolerance, "rows together and one by one", at);
}

// In random directions, all leaves at once.
void check_differences(const ExpertSubject& subject) {
  constexpr double step = 1e-5;
  const ExpertCase at{.rows = 5, .seed = subject.seed};
  const auto bank = kit_bank(subject, at);
  const KitPlan plan = sparse_plan(at, Load::kRandom);
  const Tensor x_TD = leaf_rows(at);
  const ExpertRun run = run_plan(plan, *bank, x_TD, at, Execution::kAuto);
  std::vector<NamedTensor> leaves = bank->parameters();
  leaves.push_back({"x", x_TD});
  const auto gradient_of = [&](const std::string& name) {
    return std::find_if(run.gradients.begin(), run.gradients.end(), [&](const NamedTensor& one) { return one.name == name; })
        ->tensor;
  };
  const at::NoGradGuard no_grad;
  const auto value_at = [&](const Tensor& leaf, const Tensor& direction, double by) {
    leaf.add_(direction, by);
    ExecuteInput input;
    input.x_TD = x_TD;
    const Tensor y_TD = execute(plan.plan, *bank, input);
    leaf.sub_(direction, by);
    return y_TD.mul(kit_rows(at, "weights", y_TD.sizes().vec())).sum().item<double>();
  };
  for (const NamedTensor& leaf : leaves) {
    const Tensor direction = kit_rows(at, "direction of " + leaf.name, leaf.tensor.sizes().vec());
    const double slope = (value_at(leaf.tensor, direction, step) - value_at(leaf.tensor, direction, -step)) / (2 * step);
    const double expected = gradient_of(leaf.name).mul(direction).sum().item<double>();
    must(std::abs(slope - expected) <= kDifferenceTolerance * (1 + std::abs(slope)),
         fmt::format("gradient of {}: {:.9g} along a direction, differences give {:.9g}", leaf.name, expected, slope), at);
  }
}

void check_zero_gradients(const ExpertSubject& subject) {
  const ExpertCase at{.seed = subject.seed};
  for (const bool any_rows : {true, false}) {
    const auto bank = kit_bank(subject, at);
    const Tensor rows_ND = kit_rows(at, "x", {any_rows ? 3 : 0, at.width}).requires_grad_(true);
    const Tensor offsets_E1 = any_rows ? at::tensor({0, 0, 3, 3, 3}, at::kLong) : at::tensor({0, 0, 0, 0, 0}, at::kLong);
    bank->forward({.rows_ND = rows_ND, .offsets_E1 = offsets_E1}, 0).sum().backward();
    for (int64_t e = 0; e < at.experts; ++e)
      for (const ExpertBank::Slice& slice : bank->slices(e)) {
        must(slice.stacked.grad().defined(),
             fmt::format("expert {} has no gradient where it got {} rows", e, e == 1 && any_rows ? 3 : 0), at);
        if (e == 1 && any_rows) continue;
        must(slice.stacked.grad().select(0, slice.slot).count_nonzero().item<int64_t>() == 0,
             fmt::format("the gradient of expert {}, which got no row, is not zero", e), at);
      }
  }
}

// ‖a - b‖ / ‖b‖: where rounding carries a value over the kink of a ReLU, one entry of the gradient changes by its whole size.
double norm_difference(const Tensor& a, const Tensor& b) {
  return a.sub(b).norm().item<double>() / std::max(b.norm().item<double>(), 1e-30);
}

void check_bfloat(const ExpertSubject& subject) {
  const ExpertCase at{.rows = 16, .dtype = at::kFloat, .seed = subject.seed};
  const auto bank = kit_bank(subject, at);
  const Tensor x_TD = leaf_rows(at);
  const KitPlan plan = sparse_plan(at, Load::kRandom);
  const ExpertRun exact = run_plan(plan, *bank, x_TD, at, Execution::kAuto);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  ExpertRun rounded;
  try {
    rounded = run_plan(plan, *bank, x_TD, at, Execution::kAuto);
  } catch (...) {
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
    throw;
  }
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  must_agree(rounded.y_TD, exact.y_TD, kBfloatTolerance, "y under bf16 autocast", at);
  for (size_t i = 0; i < exact.gradients.size(); ++i) {
    must(rounded.gradients[i].tensor.scalar_type() == at::kFloat,
         fmt::format("gradient of {} is not float32", exact.gradients[i].name), at);
    const double error = norm_difference(rounded.gradients[i].tensor, exact.gradients[i].tensor);
    must(error <= 2 * kBfloatTolerance,
         fmt::format("gradient of {} under bf16 autocast: relative error {:.3g} in norm, allowed {:.0e}", exact.gradients[i].name,
                     error, 2 * kBfloatTolerance),
         at);
  }
}

}  // namespace

std::vector<ExpertProperty> expert_value_properties() {
  return {
      {"sparse",
       "sparse plans: the fast executor is the reference one, values and gradients; no rows, one expert, empty experts, "
       "one takes all, k = E",
       needs_one_stage, check_sparse},
      {"soft", "soft plans: the same", needs_soft, check_soft},
      {"merge", "merge plans: the same", needs_merge, check_merge},
      {"refusals", "a plan that does not fit is refused in one line, the one that refuses() gives", needs_refusal,
       check_refusals},
      {"rows_apart", "rows together give what each gives alone through forward_expert()", needs_row_function, check_rows_apart},
      {"finite_differences", "gradients are central differences, fp64", needs_one_stage, check_differences},
      {"zero_gradients", "an expert without rows has a gradient, and it is zero", needs_parameters, check_zero_gradients},
      {"bf16", "under autocast values and (in norm) gradients stay near those of float32", needs_one_stage,
       check_bfloat},
  };
}

}  // namespace moelab
