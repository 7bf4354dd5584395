// Properties of outputs and gradients: the executors agree, finite differences agree, unused experts get a gradient of zero.
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace moelab {
namespace {

struct Values {
  Tensor y_TD;
  std::map<std::string, Tensor> own;  // gradients of x and of the experts, each compared by itself
  std::map<std::string, Tensor> decision;  // of gates and router: where sums cancel, the gates' tell the size of the parts
};

Tensor gradient_or_zeros(const Tensor& tensor) { return tensor.grad().defined() ? tensor.grad() : at::zeros_like(tensor); }

// Where a plan hands gradients to the router; none where its gates do not depend on anything.
std::vector<NamedTensor> doors_of(const Plan& plan) {
  std::vector<NamedTensor> doors;
  if (const auto* p = std::get_if<SparsePlan>(&plan)) doors = {{"gate", p->gate_N}};
  else if (const auto* soft = std::get_if<SoftPlan>(&plan)) doors = {{"query", soft->query_TD}, {"key", soft->key_SD}};
  else doors = {{"alpha", std::get<MergePlan>(plan).alpha_GE}};
  std::erase_if(doors, [](const NamedTensor& door) { return !door.tensor.requires_grad(); });
  for (const NamedTensor& door : doors) door.tensor.retain_grad();
  return doors;
}

Values values_of(const KitLayer& layer, const KitCase& at, Execution execution) {
  layer.zero_grad();
  const RouteInput in = kit_input(at);
  const RouteOutput out = layer.route(in);
  const std::vector<NamedTensor> doors = doors_of(out.plan);
  Values values{layer.run(out, in, execution), {}, {}};
  values.y_TD.backward(kit_grad_y(at));
  values.own["x"] = gradient_or_zeros(in.x_TD);
  for (const auto& [name, gradient] : gradients_of(layer))
    (name.starts_with("router.") ? values.decision : values.own)[name] = gradient;
  for (const NamedTensor& door : doors) values.decision[door.name] = gradient_or_zeros(door.tensor);
  return values;
}

double largest(const std::map<std::string, Tensor>& tensors) {
  double most = 0;
  for (const auto& [name, tensor] : tensors)
    if (tensor.numel() > 0) most = std::max(most, tensor.abs().max().item<double>());
  return most;
}

void compare_executors(const Subject& subject, const KitCase& at) {
  const double allowed = at.dtype == at::kDouble ? 1e-10 : 1e-5;
  const KitLayer layer = kit_layer(subject, at);
  const Values fast = values_of(layer, at, Execution::kAuto), plain = values_of(layer, at, Execution::kReference);
  must_agree(fast.y_TD, plain.y_TD, allowed, "output of the fast and the reference executor", at);
  for (const auto& [name, gradient] : plain.own)
    must_agree(fast.own.at(name), gradient, allowed, "gradient of " + name + " by the fast and the reference executor", at);
  const double scale = std::max(largest(plain.decision), 1e-30);
  for (const auto& [name, gradient] : plain.decision)
    must(gradient.numel() == 0 || fast.decision.at(name).sub(gradient).abs().max().item<double>() <= allowed * scale,
         "gradient of " + name + " by the fast and the reference executor differ", at);
}

// Small sizes are as likely as large ones: most mistakes live there.
KitCase executor_case(std::mt19937_64& draw) {
  static const char* const activations[] = {"relu", "gelu", "gelu_tanh", "swiglu"};
  KitCase at{.rows = pick(draw, 0, 3) == 0 ? pick(draw, 0, 257) : pick(draw, 0, 33),
             .sequences = pick(draw, 1, 6),
             .width = pick(draw, 1, 19),
             .experts = pick(draw, 1, 16)};
  at.k = pick(draw, 1, at.experts);
  if (pick(draw, 0, 3) > 0) at.capacity = random_capacity(draw);
  at.mode = pick(draw, 0, 2) < 2 ? Mode::kTrain : Mode::kEval;
  at.activation = activations[pick(draw, 0, 3)];
  at.bias = pick(draw, 0, 1) == 1;
  at.seed = pick(draw, 0, 1'000'000);
  return at;
}

void check_executors(const Subject& subject) {
  const std::vector<Variant> variants = variants_of(subject.entry);
  std::mt19937_64 draw(subject.seed + 2);
  for (int64_t i = 0; i < subject.cases; ++i) {
    KitCase at = executor_case(draw);
    Subject varied = subject;
    varied.variant = variants[static_cast<size_t>(pick(draw, 0, static_cast<int64_t>(variants.size()) - 1))];
    if (!has_size(varied, at)) continue;
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
      at.dtype = dtype;
      compare_executors(varied, at);
    }
  }
}

// The scalar with the selection held where it was, and with it what the router declares to have no gradient; draws are the same
// by their key. Of a straight-through router it is the surrogate, whose gradient is the router's where it was made.
struct FrozenScalar {
  const KitLayer& layer;
  const KitCase& at;
  RouteInput in;
  Assignment selection;
  std::map<std::string, Tensor> held;

  FrozenScalar(const KitLayer& of, const KitCase& where) : layer(of), at(where), in(kit_input(where)) {
    in.held = &held;
    selection = layer.route(in).assignment;
    if (selection.defined()) in.forced = &selection;
  }
  FrozenScalar(const FrozenScalar&) = delete;
  Tensor value() const { return kit_scalar(layer, in, layer.route(in), at); }
};

// (f(θ + hv) - f(θ - hv)) / 2h along a random v.
double central_difference(const FrozenScalar& scalar, const Tensor& leaf, const Tensor& direction) {
  const at::NoGradGuard no_grad;
  constexpr double h = 1e-5;
  const Tensor kept = leaf.clone();
  leaf.copy_(kept.add(direction, h));
  const double above = scalar.value().item<double>();
  leaf.copy_(kept.sub(direction, h));
  const double below = scalar.value().item<double>();
  leaf.copy_(kept);
  return (above - below) / (2 * h);
}

void compare_slope(const FrozenScalar& scalar, const NamedTensor& leaf, double size_of_scalar, int64_t direction_seed) {
  const Tensor direction = normal_tensor(random_key(direction_seed, leaf.name), leaf.tensor.sizes(), 1, at::kDouble);
  const Tensor gradient = gradient_or_zeros(leaf.tensor);
  const double slope = gradient.mul(direction).sum().item<double>();
  const double exact = central_difference(scalar, leaf.tensor, direction);
  const double scale = std::max(std::abs(exact), gradient.norm().item<double>());
  const bool near = std::abs(slope - exact) <= 1e-6 * scale + 1e-8 * (1 + size_of_scalar);
  must(near,
       fmt::format("the gradient of {} along a random direction is {:.9g}, finite differences say {:.9g}", leaf.name, slope,
                   exact),
       scalar.at);
}

// A surrogate is declared where there is one, and nowhere else: a gate without gradient is none.
void check_declared_surrogate(const Subject& subject, const std::set<std::string>& held, const KitCase& at) {
  must(subject.facts.straight_through || held.empty(),
       fmt::format("it keeps '{}' out of its gradient, but does not say that this is a surrogate", fmt::join(held, "', '")), at);
  must(!subject.facts.straight_through || !held.empty(),
       "it says that its gradient is a surrogate, but stop_gradient() names nothing that has none", at);
}

void check_differences(const Subject& subject) {
  std::set<std::string> held;
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    const KitCase at{
        .rows = 11, .capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = 1.5}, .mode = mode, .seed = subject.seed};
    const KitLayer layer = kit_layer(subject, at);
    const FrozenScalar scalar(layer, at);
    for (const auto& [name, value] : scalar.held) held.insert(name);
    const Tensor value = scalar.value();
    value.backward();
    std::vector<NamedTensor> leaves = layer.trainable();
    leaves.push_back({"x", scalar.in.x_TD});
    for (const NamedTensor& leaf : leaves)
      for (const int64_t seed : {1, 2}) compare_slope(scalar, leaf, std::abs(value.item<double>()), seed);
    if (mode == Mode::kEval) check_declared_surrogate(subject, held, at);
  }
}

double largest_router_gradient(const KitLayer& layer, const Tensor& scalar) {
  layer.zero_grad();
  scalar.backward();
  double most = 0;
  for (const NamedTensor& entry : layer.site.router->trainable())
    most = std::max(most, gradient_or_zeros(entry.tensor).abs().max().item<double>());
  return most;
}

// By the output alone where gates depend on scores, whatever the losses do.
void check_learning(const Subject& subject) {
  const KitCase at;
  const KitLayer layer = kit_layer(subject, at);
  must(subject.facts.learned || layer.site.router->trainable().empty(),
       "it says that it does not learn, but has trainable parameters", at);
  if (!subject.facts.learned) return;
  const RouteInput in = kit_input(at);
  must(largest_router_gradient(layer, kit_scalar(layer, in, layer.route(in), at)) > 0,
       "it says that it learns, but no gradient reaches its parameters", at);
  if (!subject.facts.differentiable_gate) return;
  const Tensor task = layer.run(layer.route(in), in).mul(kit_grad_y(at)).sum();
  must(largest_router_gradient(layer, task) > 0,
       "its gates depend on scores, but the output gives its parameters no gradient", at);
}

// Of a sparse plan, the experts without rows; of the others, all where there is no row and none elsewhere.
std::vector<bool> unused_experts(const KitLayer& layer, const RouteOutput& out) {
  std::vector<bool> unused(static_cast<size_t>(layer.max_experts()), layer.at.rows == 0);
  const auto* sparse = std::get_if<SparsePlan>(&out.plan);
  for (size_t e = 0; sparse && e < unused.size(); ++e) {
    const auto* offsets = sparse->offsets_E1.const_data_ptr<int64_t>() + e;
    unused[e] = offsets[0] == offsets[1];
  }
  return unused;
}

void check_unused(const Subject& subject) {
  for (const int64_t rows : {0, 1}) {
    const KitCase at{.rows = rows, .experts = 8};
    const KitLayer layer = kit_layer(subject, at);
    const RouteInput in = kit_input(at);
    const RouteOutput out = layer.route(in);
    layer.run(out, in).mul(kit_grad_y(at)).sum().backward();
    const std::vector<bool> unused = unused_experts(layer, out);
    for (const NamedTensor& entry : layer.site.bank->trainable()) {
      must(entry.tensor.grad().defined(), "the gradient of experts." + entry.name + " is missing where experts got no row", at);
      for (size_t e = 0; e < unused.size(); ++e)
        must(!unused[e] || !entry.tensor.grad()[static_cast<int64_t>(e)].any().item<bool>(),
             fmt::format("expert {} got no row, but its gradient of experts.{} is not zero", e, entry.name), at);
    }
  }
}

}  // namespace

std::vector<Property> value_properties() {
  return {
      {"executors",
       "fast executor = reference executor, outputs and gradients, over random sizes, options and capacities",
       always_applies, check_executors, /*once=*/true},
      {"finite_differences",
       "gradients of output and losses = central differences in fp64, the selection frozen (straight-through: of the surrogate)",
       always_applies, check_differences},
      {"learning", "a gradient reaches the router's parameters, from the output where gates have one, or there are none to train",
       always_applies, check_learning},
      {"unused_expert", "an expert without rows gets a gradient of zero, not a missing one", always_applies, check_unused},
  };
}

}  // namespace moelab
