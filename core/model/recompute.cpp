#include "core/model/recompute.h"

#include "core/autocast_scope.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the second pass needs beside tensors of the graph.
struct RecomputeJob : torch::CustomClassHolder {
  std::shared_ptr<const Block> block;
  std::shared_ptr<const BatchRows> rows;
  RouteInput in;
  std::vector<bool> carries;            // per site
  std::vector<Assignment> assignments;  // per site, made by the first pass
  AutocastScope::State autocast{false, at::kFloat};
  BlockOutput first;                    // of the first pass; taken by forward_recomputed

  // Inputs before the parameters: x, and the carries that there are.
  size_t activations() const { return 1 + static_cast<size_t>(std::count(carries.begin(), carries.end(), true)); }

  BlockOutput run(at::TensorList inputs) const {
    const AutocastScope scope(inputs[0].device().type(), autocast);
    std::vector<SiteShare> shares(carries.size());
    for (size_t s = 0, next = 1; s < shares.size(); ++s) {
      if (carries[s]) shares[s].carry = inputs[static_cast<int64_t>(next++)];
      if (assignments[s].defined()) shares[s].forced = &assignments[s];
    }
    return block->forward(inputs[0], *rows, in, std::move(shares));
  }
};

// Every tensor of an output that a gradient may come back to, in a fixed order.
std::vector<Tensor*> differentiable_parts(BlockOutput& out) {
  std::vector<Tensor*> parts{&out.x_BLD};
  for (SiteResult& site : out.sites) {
    if (site.carry.defined()) parts.push_back(&site.carry);
    for (TermStatistics& term : site.statistics)
      for (LossStatistics& scope : term.per_scope)
        for (Tensor& sum : scope.sums) parts.push_back(&sum);
  }
  return parts;
}

// Inputs are x, the carries, and every parameter of the block, so that the engine accumulates their gradients
// as it does without recomputation. (An undefined tensor must not be among them: the engine asks each for its device.)
struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const c10::intrusive_ptr<RecomputeJob>& job) {
    job->first = job->run(inputs);
    for (size_t s = 0; s < job->first.sites.size(); ++s) job->assignments[s] = job->first.sites[s].assignment;
    ctx->save_for_backward(inputs.vec());
    ctx->saved_data["job"] = c10::IValue::make_capsule(job);
    variable_list outputs;
    // A sum may be a view of another (scope = "sequence"); outputs must stand alone.
    for (const Tensor* part : differentiable_parts(job->first)) outputs.push_back(part->is_view() ? part->clone() : *part);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto job = c10::static_intrusive_pointer_cast<RecomputeJob>(ctx->saved_data["job"].toCapsule());
    variable_list inputs = ctx->get_saved_variables();
    for (size_t i = 0; i < job->activations(); ++i) inputs[i] = inputs[i].detach().requires_grad_(inputs[i].requires_grad());
    const at::AutoGradMode with_graph(true);
    BlockOutput again = job->run(inputs);
    variable_list result = gradients_of(differentiable_parts(again), gradients, inputs);
    result.emplace_back();  // the job
    return result;
  }

 private:
  static variable_list gradients_of(const std::vector<Tensor*>& parts, const variable_list& gradients,
                                    const variable_list& inputs) {
    variable_list roots, root_gradients, leaves;
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!gradients[i].defined() || !parts[i]->requires_grad()) continue;
      roots.push_back(*parts[i]);
      root_gradients.push_back(gradients[i]);
    }
    for (const Tensor& input : inputs)
      if (input.requires_grad()) leaves.push_back(input);
    variable_list found;
    if (!roots.empty()) found = torch::autograd::grad(roots, leaves, root_gradients, std::nullopt, false, /*allow_unused=*/true);
    variable_list result(inputs.size());
    for (size_t i = 0, next = 0; i < inputs.size() && !found.empty(); ++i)
      if (inputs[i].requires_grad()) result[i] = found[next++];
    return result;
  }
};

}  // namespace

BlockOutput forward_recomputed(const std::shared_ptr<const Block>& block, const Tensor& x_BLD,
                               const std::shared_ptr<const BatchRows>& rows, const RouteInput& in,
                               const std::vector<SiteShare>& shares) {
  const auto job = c10::make_intrusive<RecomputeJob>();
  job->block = block;
  job->rows = rows;
  job->in = in;
  job->autocast = AutocastScope::current(x_BLD.device().type());
  variable_list inputs{x_BLD};
  for (const SiteShare& share : shares) {
    job->assignments.push_back(share.forced ? *share.forced : Assignment{});  // `forced` points into the caller's memory
    job->carries.push_back(share.carry.defined());
    if (share.carry.defined()) inputs.push_back(share.carry);  // saved by the graph
  }
  for (const NamedTensor& parameter : block->parameters()) inputs.push_back(parameter.tensor);
  const variable_list outputs = RecomputeFunction::apply(at::TensorList(inputs), job);
  BlockOutput out = std::move(job->first);
  const std::vector<Tensor*> parts = differentiable_parts(out);
  for (size_t i = 0; i < parts.size(); ++i) *parts[i] = outputs[i];
  return out;
}

}  // namespace moelab
