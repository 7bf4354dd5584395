// Plans carried out on a CUDA device: values and all gradients are those of the reference executor on the CPU, in double. Rows,
// gates and parameters lie on the device, the plan's indices on the CPU.
#include "device.h"
#include "tests/execute/bfloat_cases.h"
#include "tests/execute/kinds_of_banks.h"

#include "core/grouped.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#define NEEDS_CUDA() \
  if (!why_no_cuda().empty()) SKIP("no CUDA device: " << why_no_cuda())

using namespace moelab;
using namespace moelab::testing;

namespace {

constexpr int kPlans = 40;  // of each kind and form, half of them in float
const ExecutorUse kDeviceUses[] = {{"auto", Execution::kAuto},
                                   {"loop", Execution::kLoop},
                                   {"grouped", Execution::kGrouped},
                                   {"bmm", Execution::kBmm},
                                   {"reference", Execution::kReference}};

PlanCase on_cuda(const PlanCase& from) {
  return converted(from, [](const Tensor& t) { return t.detach().to(at::kCUDA).requires_grad_(); });
}

std::vector<Tensor> device_outcomes(const PlanCase& at, const ExpertBank& bank, const Tensor& grad_y_TD, const ExecutorUse& use) {
  std::vector<Tensor> values;
  for (const Tensor& value : outcomes(at, bank, grad_y_TD.to(at::kCUDA), use)) {
    CHECK(value.is_cuda());
    values.push_back(value.cpu());
  }
  return values;
}

struct DeviceCase {
  std::string text;
  PlanCase at;
  std::unique_ptr<ExpertBank> bank, high_bank, device_bank;  // of the same numbers
  Tensor grad_y_TD;
};

// Float is held to the exact numbers as the CPU's executors are: 1e-5, or what cancels in the reference's own sums.
void check(const DeviceCase& one) {
  const bool high = one.at.x_TD.scalar_type() == at::kDouble;
  const auto exact = reference_outcomes(in_double(one.at), *one.high_bank, one.grad_y_TD.to(at::kDouble));
  const auto least = sizes_of_terms(one.at, exact);
  const auto error_of = [&](const std::vector<Tensor>& values) {
    return worst_of(values, exact, high ? kZeroInDouble : kZeroInFloat, least);
  };
  const double rounding = error_of(reference_outcomes(one.at, *one.bank, one.grad_y_TD));
  const PlanCase at = on_cuda(one.at);
  for (const ExecutorUse& use : kDeviceUses) {
    INFO(one.text << (high ? ", double, " : ", float, ") << use.name << "; the reference's rounding " << rounding);
    CHECK(error_of(device_outcomes(at, *one.device_bank, one.grad_y_TD, use)) <= (high ? 1e-10 : std::max(1e-5, 8 * rounding)));
  }
}

int sweep(const std::string& name, const DrawParts& draw_parts, PlanForm form) {
  std::mt19937_64 draw(name.size() + 100 * static_cast<uint64_t>(form));
  int taken = 0;
  for (int i = 0; i < kPlans; ++i) {
    const at::ScalarType dtype = i % 2 == 0 ? at::kDouble : at::kFloat;
    const int64_t experts = between(draw, i % 10 == 0 ? 1 : 2, 6);
    const std::vector<PartCase> parts = draw_parts(draw, experts);
    DeviceCase one{name + ", " + to_string(form) + " plan " + std::to_string(i),
                   {},
                   mixed_bank(parts, kRowWidth, dtype),
                   mixed_bank(parts, kRowWidth, at::kDouble),
                   mixed_bank(parts, kRowWidth, dtype),
                   {}};
    if (!one.bank->refuses(form).empty()) continue;
    ++taken;
    shake(draw, *one.bank);
    copy_parameters(*one.bank, *one.high_bank);
    copy_parameters(*one.bank, *one.device_bank);
    move_to_cuda(*one.device_bank);
    one.at = case_of(draw, form, i, experts, dtype);
    if (auto* soft = std::get_if<SoftPlan>(&one.at.plan); soft && dtype == at::kFloat) soft->noise_std = 0;
    cut_at_plan(one.at);
    one.grad_y_TD = random_leaf(draw, {one.at.x_TD.size(0), one.bank->output_width(0)}, dtype, false);
    check(one);
  }
  return taken;
}

}  // namespace

TEST_CASE("CUDA: every executor is the reference on every kind of experts and every form of plan") {
  NEEDS_CUDA();
  for (const PlanForm form : {PlanForm::kSparse, PlanForm::kSoft, PlanForm::kMerge})
    for (const auto& [name, parts] : all_banks()) {
      const int taken = sweep(name, parts, form);
      if (form != PlanForm::kMerge) CHECK(taken == kPlans);
    }
}

TEST_CASE("CUDA: bfloat16 executors stay within the bound of their roundings") {
  NEEDS_CUDA();
  at::globalContext().setAllowBF16ReductionCuBLAS(false);  // sums in float, as the bound says
  static const char* const activations[] = {"relu", "gelu", "gelu_tanh", "swiglu"};
  for (const PlanForm form : {PlanForm::kSparse, PlanForm::kSoft, PlanForm::kMerge}) {
    std::mt19937_64 draw(16 + static_cast<uint64_t>(form));
    double most = 0;
    for (int i = 0; i < 20; ++i) {
      const char* activation = activations[i / 5];
      const TwoCases at = two_cases(draw, form, i);
      const auto low = low_bank(activation, 1 + i), high = high_bank(*low, activation);
      move_to_cuda(*low);
      const Tensor grad_y_TD = random_leaf(draw, at.low.x_TD.sizes().vec(), at::kBFloat16, false);
      const auto bounds = bfloat_bounds(at.high.plan, *high, activation, at.high.x_TD, grad_y_TD);
      const PlanCase device = on_cuda(at.low);
      for (const ExecutorUse& use : kDeviceUses) {
        if (use.execution == Execution::kReference) continue;  // its sums over D and C are rounded too
        INFO(to_string(form) << " plan " << i << ", " << activation << ", " << use.name);
        const Reached one = reached(device_outcomes(device, *low, grad_y_TD, use), bounds);
        CHECK(one.worst <= 1);
        most = std::max(most, one.worst);
      }
    }
    CHECK(most > 0.05);
  }
}

// The order of every sum is fixed: nothing is added atomically.
TEST_CASE("CUDA: a layer of many rows gives the same bits twice") {
  NEEDS_CUDA();
  std::mt19937_64 draw(5);
  const SparseCase sparse = random_sparse_case(draw, 4096, 64, 8, 0.1, at::kFloat);
  PlanCase host{sparse.plan, random_leaf(draw, {4096, 512}, at::kFloat), {sparse.gate_TK}};
  cut_at_plan(host);
  const Tensor grad_y_TD = random_leaf(draw, {4096, 512}, at::kBFloat16, false);
  const auto bank = ffn_bank(512, 64, 256, "gelu", true, at::kBFloat16);
  move_to_cuda(*bank);
  host.x_TD = host.x_TD.detach().to(at::kBFloat16);
  const PlanCase at = on_cuda(host);
  for (const ExecutorUse& use : kDeviceUses) {
    if (use.execution == Execution::kReference) continue;  // D and C would have 134 million elements
    const auto first = device_outcomes(at, *bank, grad_y_TD, use), second = device_outcomes(at, *bank, grad_y_TD, use);
    for (size_t i = 0; i < first.size(); ++i) {
      INFO(use.name << ", value " << i);
      CHECK(first[i].isfinite().all().item<bool>());
      CHECK(first[i].equal(second[i]));
    }
  }
}

// Above, groups are of a few rows; here of the length that the library's grouped kernel tiles, some of them empty.
TEST_CASE("CUDA: the library's grouped product gives what a product per expert gives, at the size of a layer") {
  NEEDS_CUDA();
  std::mt19937_64 draw(6);
  const SparseCase sparse = random_sparse_case(draw, 4096, 64, 2, 0.1, at::kFloat);
  const Tensor x_ND =
      random_leaf(draw, {sparse.plan.token_N.numel(), 256}, at::kBFloat16).detach().to(at::kCUDA).requires_grad_();
  const Tensor weight_EOD = random_leaf(draw, {64, 512, 256}, at::kBFloat16).detach().to(at::kCUDA).requires_grad_();
  const Tensor grad_NO = random_leaf(draw, {x_ND.size(0), 512}, at::kBFloat16, false).to(at::kCUDA);
  const auto values = [&](GroupedProduct product) {
    const GroupedProductGuard guard(product);
    x_ND.mutable_grad() = weight_EOD.mutable_grad() = Tensor();
    const Tensor y_NO = grouped_linear(x_ND, weight_EOD, {}, sparse.plan.offsets_E1);
    y_NO.backward(grad_NO);
    return std::vector<Tensor>{y_NO.detach(), x_ND.grad(), weight_EOD.grad()};
  };
  const auto grouped = values(GroupedProduct::kGrouped), loop = values(GroupedProduct::kLoop);
  for (size_t i = 0; i < loop.size(); ++i)
    CHECK(relative_error(grouped[i].cpu(), loop[i].cpu()) < 0x1p-7);  // one step of bfloat16
}
