#include "tests/support/route_case.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace moelab {
namespace {

void name_rows(RouteInput& in, const std::vector<int64_t>& sequence_of_row) {
  std::vector<int64_t> length, position;
  for (const int64_t sequence : sequence_of_row) {
    if (sequence >= static_cast<int64_t>(length.size())) length.resize(sequence + 1, 0);
    position.push_back(length[sequence]++);
  }
  in.sequence_T = at::tensor(sequence_of_row, at::kLong);
  in.sequence_key_T = in.sequence_T.clone();
  in.position_T = at::tensor(position, at::kLong);
  in.sequences = std::max<int64_t>(1, static_cast<int64_t>(length.size()));
}

void set_options(Options& options, const OptionSpecs& declared, const std::map<std::string, OptionValue>& values) {
  for (const auto& [name, value] : values) {
    const auto spec = std::find_if(declared.begin(), declared.end(), [&](const OptionSpec& o) { return o.name == name; });
    if (spec == declared.end()) throw std::invalid_argument("the router has no option " + name);
    options.set(*spec, value);
  }
}

}  // namespace

RouteCase::RouteCase(Tensor x_TD) {
  in.x_TD = std::move(x_TD);
  in.mode = Mode::kEval;
  name_rows(in, std::vector<int64_t>(in.rows(), 0));
  static const std::shared_ptr<Comm> alone = single_comm();
  in.comm = alone.get();
  seed(0);
}

RouteCase& RouteCase::train() {
  in.mode = Mode::kTrain;
  return *this;
}

RouteCase& RouteCase::sequences(const std::vector<int64_t>& sequence_of_row) {
  name_rows(in, sequence_of_row);
  return *this;
}

RouteCase& RouteCase::noise(Tensor raw_draw) {
  in.noise = std::move(raw_draw);
  return *this;
}

RouteCase& RouteCase::capacity_noise(Tensor draw_TE) {
  in.capacity_noise_TE = std::move(draw_TE);
  return *this;
}

RouteCase& RouteCase::seed(int64_t seed) {
  in.random = random_key(seed, "test");
  return *this;
}

RouteCase& RouteCase::force(const Assignment& assignment) {
  in.forced = &assignment;
  return *this;
}

RouterSpec router_spec(const RouterCase& wanted) {
  const RouterEntry& entry = Registry<RouterEntry>::instance().find(wanted.name);
  RouterSpec spec;
  spec.width = wanted.width;
  spec.experts = wanted.experts;
  spec.max_experts = std::max(wanted.experts, wanted.max_experts);
  spec.dtype = wanted.dtype;
  spec.init = random_key(wanted.seed, "init");
  spec.options = Options(entry.options);
  set_options(spec.options, entry.options, wanted.options);
  spec.noise = wanted.noise;
  spec.train_capacity = spec.eval_capacity = wanted.capacity;
  return spec;
}

std::unique_ptr<Router> build_router(const RouterCase& wanted) { return make_router(wanted.name, router_spec(wanted)); }

RouteOutput route(const Router& router, const RouteCase& input) {
  RouteState state;
  RouteOutput out = router.route(input.in, state);
  validate(out.plan, input.in.rows(), router.spec().max_experts);
  return out;
}

const SparsePlan& sparse(const RouteOutput& out) { return std::get<SparsePlan>(out.plan); }

Tensor find_tensor(const Module& module, const std::string& name) {
  for (const auto& list : {module.parameters(), module.buffers()})
    for (const NamedTensor& entry : list)
      if (entry.name == name) return entry.tensor;
  throw std::invalid_argument("no tensor is named " + name);
}

void set_tensor(const Module& module, const std::string& name, const Tensor& value) {
  const at::NoGradGuard no_grad;
  find_tensor(module, name).copy_(value);
}

Tensor numbers(const std::vector<std::vector<double>>& rows) {
  std::vector<Tensor> stacked;
  for (const std::vector<double>& row : rows) stacked.push_back(at::tensor(row, at::kDouble));
  return at::stack(stacked);
}

Tensor random_tensor(int64_t seed, at::IntArrayRef shape) {
  return normal_tensor(random_key(seed, "values"), shape, 1.0, at::kDouble);
}

Tensor dense_gates(const SparsePlan& plan) {
  Tensor gate_TE = at::zeros({plan.rows, plan.experts}, plan.gate_N.options().requires_grad(false));
  return gate_TE.index_put({plan.token_N, plan.expert_N}, plan.gate_N.detach());
}

double gradient_error(const std::function<Tensor()>& value, Tensor leaf) {
  leaf.mutable_grad() = Tensor();
  value().backward();
  const Tensor found = leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf);
  const at::NoGradGuard no_grad;
  constexpr double step = 1e-5;
  Tensor expected = at::zeros_like(leaf);
  auto* entry = leaf.mutable_data_ptr<double>();
  for (int64_t i = 0; i < leaf.numel(); ++i) {
    const double kept = entry[i];
    entry[i] = kept + step;
    const double above = value().item<double>();
    entry[i] = kept - step;
    const double below = value().item<double>();
    entry[i] = kept;
    expected.mutable_data_ptr<double>()[i] = (above - below) / (2 * step);
  }
  return relative_error(found, expected);
}

}  // namespace moelab
