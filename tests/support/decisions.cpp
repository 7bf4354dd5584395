#include "tests/support/decisions.h"

#include "core/select.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

namespace moelab::test {
namespace {

template <class Value>
Tensor filled(const std::vector<std::vector<Value>>& rows, at::ScalarType dtype) {
  const int64_t columns = rows.empty() ? 0 : static_cast<int64_t>(rows.front().size());
  Tensor tensor = at::empty({static_cast<int64_t>(rows.size()), columns}, dtype);
  Value* out = tensor.mutable_data_ptr<Value>();
  for (const auto& row : rows) out = std::copy(row.begin(), row.end(), out);
  return tensor;
}

}  // namespace

Tensor tensor_of(const Rows& rows) { return filled(rows, at::kDouble); }
Tensor choices_of(const std::vector<std::vector<int64_t>>& choices) { return filled(choices, at::kLong); }

Rows rows_of(const Tensor& tensor) {
  const Tensor flat = tensor.detach().to(at::kDouble).contiguous();
  Rows rows;
  for (int64_t t = 0; t < flat.size(0); ++t) {
    const double* row = flat.const_data_ptr<double>() + t * flat.size(1);
    rows.emplace_back(row, row + flat.size(1));
  }
  return rows;
}

RouteInput input_of(int64_t rows, std::vector<int64_t> sequence, Mode mode) {
  RouteInput in;
  in.x_TD = at::zeros({rows, 1}, at::kDouble);
  in.sequence_T = at::zeros({rows}, at::kLong);
  std::copy(sequence.begin(), sequence.end(), in.sequence_T.mutable_data_ptr<int64_t>());
  in.sequence_key_T = in.sequence_T;
  in.position_T = at::arange(rows);
  in.sequences = sequence.empty() ? 1 : *std::max_element(sequence.begin(), sequence.end()) + 1;
  in.mode = mode;
  return in;
}

RouteOutput decision_of(const Tensor& choice_TK, const Tensor& gate_TK, Scores scores) {
  RouteOutput out;
  const Tensor chosen_TK = choice_TK.ge(0);
  out.assignment = {choice_TK, chosen_TK, at::zeros_like(chosen_TK)};
  out.gate_TK = gate_TK;
  out.scores = std::move(scores);
  out.k = choice_TK.size(1);
  return out;
}

RouteOutput noisy_topk_decision(const Tensor& clean_TE, const Tensor& std_TE, const Tensor& draw_TE, int64_t k) {
  Scores scores;
  scores.clean_TE = clean_TE;
  scores.noisy_TE = std_TE.defined() ? clean_TE.add(std_TE.mul(draw_TE)) : clean_TE;
  scores.noise_std_TE = std_TE;
  scores.loss_TE = clean_TE.softmax(1);
  const Tensor choice_TK = stable_topk(scores.noisy_TE, k);
  return decision_of(choice_TK, scores.noisy_TE.gather(1, choice_TK).softmax(1), scores);
}

std::unique_ptr<Loss> make_loss(const std::string& name, const std::vector<Setting>& settings, const RouterEntry& router) {
  const LossEntry& entry = Registry<LossEntry>::instance().find(name);
  Options options(entry.options);
  for (const auto& [key, value] : settings) {
    const auto named = [&, wanted = key](const OptionSpec& spec) { return spec.name == wanted; };
    options.set(*std::find_if(entry.options.begin(), entry.options.end(), named), value);
  }
  return entry.make(options, router);
}

Tensor value_of(const Loss& loss, const RouteInput& in, const RouteOutput& out, int64_t experts) {
  const BareRouter router;
  return loss.value(collect_statistics(loss, LossScope::kStep, {in, out, router, experts}).front(), router);
}

Tensor finite_differences(const std::function<double(const Tensor&)>& f, const Tensor& x, double h) {
  const at::NoGradGuard no_grad;
  const Tensor at_x = x.detach().clone(), gradient = at::zeros_like(at_x);
  double* element = at_x.mutable_data_ptr<double>();
  for (int64_t i = 0; i < at_x.numel(); ++i) {
    const double here = element[i];
    element[i] = here + h;
    const double above = f(at_x);
    element[i] = here - h;
    gradient.mutable_data_ptr<double>()[i] = (above - f(at_x)) / (2 * h);
    element[i] = here;
  }
  return gradient;
}

}  // namespace moelab::test
