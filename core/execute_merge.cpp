#include "core/execute_merge.h"

#include "core/autocast_scope.h"
#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>

namespace moelab {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kCopies = 4;  // merged at once

// Groups that have rows; the rows lie group by group.
struct MergeJob : torch::CustomClassHolder {
  const ExpertBank* bank = nullptr;
  std::vector<int64_t> group, first, rows;
  AutocastScope::State autocast{false, at::kFloat};

  int64_t groups() const { return static_cast<int64_t>(group.size()); }
};

Tensor flat_experts(const Tensor& stacked) { return stacked.reshape({stacked.size(0), -1}); }

// Parameters of `count` groups from `from` on, each [count, …]: one product per kind of parameter.
std::vector<Tensor> merged_copies(at::TensorList stacked, const Tensor& alpha_gE) {
  std::vector<Tensor> copies;
  for (const Tensor& parameter : stacked) {
    std::vector<int64_t> shape = parameter.sizes().vec();
    shape[0] = alpha_gE.size(0);
    copies.push_back(alpha_gE.to(parameter.scalar_type()).mm(flat_experts(parameter)).view(shape));
  }
  return copies;
}

std::vector<Tensor> copy_of(const std::vector<Tensor>& copies, int64_t which) {
  std::vector<Tensor> parameters;
  for (const Tensor& copy : copies) parameters.push_back(copy.select(0, which));
  return parameters;
}

// visit(first job, merged copies of up to kCopies groups, their alpha).
template <class Visit>
void for_copies(const MergeJob& job, const Tensor& alpha_GE, at::TensorList stacked, Visit visit) {
  for (int64_t from = 0; from < job.groups(); from += kCopies) {
    const int64_t count = std::min(kCopies, job.groups() - from);
    const Tensor alpha_gE = alpha_GE.narrow(0, from, count);
    visit(from, count, alpha_gE, merged_copies(stacked, alpha_gE));
  }
}

// alpha_GE has the rows of the job's groups alone.
struct MergedExperts : torch::autograd::Function<MergedExperts> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows_TD, const Tensor& alpha_GE, at::TensorList stacked,
                        const c10::intrusive_ptr<MergeJob>& job) {
    std::vector<Tensor> outputs;
    for_copies(*job, alpha_GE, stacked, [&](int64_t from, int64_t count, const Tensor&, const std::vector<Tensor>& copies) {
      for (int64_t i = 0; i < count; ++i)
        outputs.push_back(job->bank->forward_with(copy_of(copies, i), rows_TD.narrow(0, job->first[from + i],
                                                                                     job->rows[from + i])));
    });
    variable_list saved{rows_TD, alpha_GE};
    saved.insert(saved.end(), stacked.begin(), stacked.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["job"] = c10::IValue::make_capsule(job);
    return at::cat(outputs);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (at::GradMode::is_enabled()) usage_error("merged experts: second derivatives are not supported; use create_graph = false");
    const variable_list saved = ctx->get_saved_variables();
    const auto job = c10::static_intrusive_pointer_cast<MergeJob>(ctx->saved_data["job"].toCapsule());
    const Tensor &rows_TD = saved[0], &alpha_GE = saved[1];
    const at::TensorList stacked = at::TensorList(saved).slice(2);
    variable_list out{at::empty_like(rows_TD), at::zeros_like(alpha_GE)};
    for (const Tensor& parameter : stacked) out.push_back(at::zeros(parameter.sizes(), parameter.options()));
    for_copies(*job, alpha_GE, stacked, [&](int64_t from, int64_t count, const Tensor& alpha_gE, std::vector<Tensor> copies) {
      for (Tensor& copy : copies) copy.requires_grad_();
      const variable_list grad_copies = run_again(*job, from, count, rows_TD, copies, grads[0], out[0]);
      for (size_t p = 0; p < copies.size(); ++p) {
        if (!grad_copies[p].defined()) continue;
        const Tensor grad_gP = flat_experts(grad_copies[p]);
        out[1].narrow(0, from, count).add_(grad_gP.mm(flat_experts(stacked[p]).t()));
        flat_experts(out[2 + p]).addmm_(alpha_gE.to(grad_gP.scalar_type()).t(), grad_gP);
      }
    });
    out.emplace_back();  // the job
    return out;
  }

  // Gradients of the copies; that of the rows is written into grad_rows_TD.
  static variable_list run_again(const MergeJob& job, int64_t from, int64_t count, const Tensor& rows_TD,
                                 const std::vector<Tensor>& copies,
                                 const Tensor& grad_TD, const Tensor& grad_rows_TD) {
    const at::AutoGradMode graph(true);
    const AutocastScope scope(rows_TD.device().type(), job.autocast);
    const int64_t first = job.first[from], rows = job.first[from + count - 1] + job.rows[from + count - 1] - first;
    const Tensor input_MD = rows_TD.narrow(0, first, rows).detach().requires_grad_();
    std::vector<Tensor> outputs;
    for (int64_t i = 0; i < count; ++i)
      outputs.push_back(job.bank->forward_with(copy_of(copies, i), input_MD.narrow(0, job.first[from + i] - first,
                                                                                   job.rows[from + i])));
    variable_list inputs = copies;
    inputs.push_back(input_MD);
    variable_list grads = torch::autograd::grad({at::cat(outputs)}, inputs, {grad_TD.narrow(0, first, rows)},
                                                /*retain_graph=*/false,
                                                /*create_graph=*/false, /*allow_unused=*/true);
    const at::NoGradGuard no_grad;
    if (grads.back().defined()) grad_rows_TD.narrow(0, first, rows).copy_(grads.back());
    else grad_rows_TD.narrow(0, first, rows).zero_();
    grads.pop_back();
    return grads;
  }
};

c10::intrusive_ptr<MergeJob> merge_job(const MergePlan& plan, const ExpertBank& bank, at::DeviceType device) {
  auto job = c10::make_intrusive<MergeJob>();
  job->bank = &bank;
  job->autocast = AutocastScope::current(device);
  const Tensor count_G = at::bincount(plan.group_of_token_T, {}, plan.alpha_GE.size(0)).cpu();
  const auto* count = count_G.const_data_ptr<int64_t>();
  for (int64_t g = 0, first = 0; g < count_G.numel(); first += count[g++])
    if (count[g] > 0) job->group.push_back(g), job->first.push_back(first), job->rows.push_back(count[g]);
  return job;
}

// On the graph: for plans whose copies may all stay, and banks that make them in a way of their own.
Tensor merged_directly(const MergeJob& job, const Tensor& alpha_GE, const ExpertBank& bank, const Tensor& rows_TD) {
  std::vector<Tensor> outputs;
  for (int64_t i = 0; i < job.groups(); ++i)
    outputs.push_back(bank.forward_with(bank.merge(alpha_GE.select(0, job.group[static_cast<size_t>(i)])),
                                        rows_TD.narrow(0, job.first[i], job.rows[i])));
  return at::cat(outputs);
}

}  // namespace

Tensor execute_merge(const MergePlan& plan, const ExpertBank& bank, const ExecuteInput& input) {
  const Tensor order_T = plan.group_of_token_T.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor rows_TD = input.x_TD.index_select(0, order_T.to(input.x_TD.device()));
  const auto job = merge_job(plan, bank, input.x_TD.device().type());
  const Tensor back_T = order_T.argsort().to(rows_TD.device());
  const auto* own = dynamic_cast<const OwnMerge*>(&bank);
  if (job->groups() <= kCopies || (own != nullptr && own->merges_its_own_way()))
    return merged_directly(*job, plan.alpha_GE, bank, rows_TD).index_select(0, back_T);
  if (bank.groups().size() != 1) bank.merge(plan.alpha_GE.select(0, 0));  // refuses, with the reason
  std::vector<Tensor> stacked;
  for (const NamedTensor& entry : bank.groups().front().stacked) stacked.push_back(entry.tensor);
  const Tensor used_G = at::tensor(job->group, plan.alpha_GE.options().dtype(at::kLong).requires_grad(false));
  return MergedExperts::apply(rows_TD, plan.alpha_GE.index_select(0, used_G), at::TensorList(stacked), job).index_select(0,
      back_T);
}

}  // namespace moelab
