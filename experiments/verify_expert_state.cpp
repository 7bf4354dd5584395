// Properties of experts: what they hold, what it costs, and what surgery does to it.
#include "core/error.h"
#include "core/io/safetensors.h"
#include "experiments/verify_case.h"
#include "experiments/verify_expert.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <unistd.h>

#ifndef NDEBUG
#error "LibTorch is built with NDEBUG; without it at::RecordFunction, read below, has another layout"
#endif

namespace moelab {
namespace {

std::string always_for_experts(const ExpertSubject&) { return ""; }

std::string needs_state(const ExpertSubject& subject) {
  return kit_bank(subject, {})->parameters().empty() ? "it has no parameters" : "";
}

bool equal_experts(const ExpertBank& a, int64_t expert_a, const ExpertBank& b, int64_t expert_b) {
  const std::vector<Tensor> left = a.parameters_of(expert_a), right = b.parameters_of(expert_b);
  return std::equal(left.begin(), left.end(), right.begin(), right.end(),
                    [](const Tensor& x, const Tensor& y) { return at::equal(x, y); });
}

void check_counts(const ExpertSubject& subject) {
  const ExpertCase at{.seed = subject.seed};
  const auto bank = kit_bank(subject, at);
  int64_t sum = 0;
  for (int64_t e = 0; e < at.experts; ++e) {
    int64_t own = 0;
    for (const Tensor& tensor : bank->parameters_of(e)) own += tensor.numel();
    must(bank->parameters_per_expert(e) == own,
         fmt::format("expert {} counts {} parameters and holds {}", e, bank->parameters_per_expert(e), own), at);
    sum += own;
  }
  must(bank->experts() == at.experts, fmt::format("the bank has {} experts", bank->experts()), at);
  must(bank->parameter_count() == sum, fmt::format("the bank holds {} parameters, its experts {}", bank->parameter_count(), sum),
       at);
}

// A multiply-add counts as two.
double product_flops(const Tensor& left, const Tensor& right) {
  return 2.0 * static_cast<double>(left.numel()) * static_cast<double>(right.size(-1));
}

thread_local double counted_flops = 0;

std::unique_ptr<at::ObserverContext> count_product(const at::RecordFunction& call) {
  const std::string name = call.name();
  const bool plain = name == "aten::mm" || name == "aten::bmm", added = name == "aten::addmm" || name == "aten::baddbmm";
  if (!plain && !added) return nullptr;  // inputs of other calls may not be there
  const auto inputs = call.inputs();
  counted_flops += product_flops(inputs[plain ? 0 : 1].toTensor(), inputs[plain ? 1 : 2].toTensor());
  return nullptr;
}

// Matrix products that really ran; what is done element by element is not counted.
template <class Work>
double flops_of(Work work) {
  const at::NoGradGuard no_grad;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(&count_product).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  counted_flops = 0;
  work();
  at::removeCallback(handle);
  return counted_flops;
}

// Every stage of a row that this expert alone gets.
double flops_of_stages(const ExpertBank& bank, int64_t expert, const ExpertCase& at) {
  const Tensor offsets_E1 = at::arange(at.experts + 1, at::kLong).gt(expert).to(at::kLong);
  return flops_of([&] {
    for (int stage = 0; stage < bank.stages(); ++stage) {
      const int64_t width = stage == 0 ? at.width : bank.output_width(stage - 1);
      bank.forward({.rows_ND = kit_rows(at, "x", {1, width}), .offsets_E1 = offsets_E1}, stage);
    }
  });
}

// What a row costs in a layer, without the base that it passes whichever experts it has.
double flops_beside_base(const ExpertBank& bank, int64_t expert, const ExpertCase& at) {
  ExecuteInput input;
  input.x_TD = kit_rows(at, "x", {1, at.width});
  const Assignment chosen{.choice_TK = at::full({1, 1}, expert, at::kLong),
                          .kept_TK = at::ones({1, 1}, at::kBool),
                          .dropped_TK = at::zeros({1, 1}, at::kBool)};
  const Plan plan = make_sparse_plan(chosen, at::ones({1, 1}, at.dtype), at.experts);
  const double base = flops_of([&] { bank.base_output(input.x_TD); });
  const double beside = flops_of([&] { execute(plan, bank, input); });
  bool whole = false;
  const double layer = flops_of([&] { whole = bank.run(plan, input).defined(); });
  return whole ? layer - base : beside;
}

double flops_of_one_row(const ExpertBank& bank, int64_t expert, const ExpertCase& at) {
  if (bank.base()) return flops_beside_base(bank, expert, at);
  if (bank.stages() > 1 || !bank.has_forward_expert()) return flops_of_stages(bank, expert, at);
  return flops_of([&] { bank.forward_expert(expert, bank.parameters_of(expert), kit_rows(at, "x", {1, at.width})); });
}

void check_flops(const ExpertSubject& subject) {
  const ExpertCase at{.rows = 1, .seed = subject.seed};
  const auto bank = kit_bank(subject, at);
  for (int64_t e = 0; e < at.experts; ++e) {
    const double counted = flops_of_one_row(*bank, e, at);
    must(bank->flops_per_row(e) == counted,
         fmt::format("expert {} says {} FLOPs per row, its matrix products take {}", e, bank->flops_per_row(e), counted), at);
  }
}

void check_save_load(const ExpertSubject& subject) {
  const ExpertCase at{.dtype = at::kFloat, .seed = subject.seed}, other{.dtype = at::kFloat, .seed = subject.seed + 1};
  const auto bank = kit_bank(subject, at), restored = kit_bank(subject, other);
  const std::string path =
      std::filesystem::temp_directory_path() / fmt::format("moelab-verify-{}-{}.safetensors", subject.entry.name, getpid());
  std::vector<NamedTensor> saved = bank->parameters();
  for (NamedTensor& entry : saved) entry.tensor = entry.tensor.detach();
  write_safetensors(path, saved);
  const std::vector<NamedTensor> read = read_safetensors(path).tensors;
  std::filesystem::remove(path);
  const at::NoGradGuard no_grad;
  for (const NamedTensor& live : restored->parameters()) {
    const auto found = std::find_if(read.begin(), read.end(), [&](const NamedTensor& entry) { return entry.name == live.name; });
    must(found != read.end(), fmt::format("'{}' is not in the file", live.name), at);
    live.tensor.copy_(found->tensor);
  }
  for (int64_t e = 0; e < at.experts; ++e)
    must(equal_experts(*bank, e, *restored, e), fmt::format("expert {} differs after saving and loading", e), at);
}

// Experts change places with those like them; the plan's experts are renamed alike.
void check_permutation(const ExpertSubject& subject) {
  const ExpertCase at{.rows = 6, .seed = subject.seed};
  const auto bank = kit_bank(subject, at), moved = kit_bank(subject, at);
  std::vector<int64_t> old_of_new(static_cast<size_t>(at.experts)), inverse(static_cast<size_t>(at.experts));
  for (int64_t e = 0; e < at.experts; ++e) {
    int64_t source = e;
    for (int64_t step = 1; step <= at.experts; ++step)  // the next one of the same kind and shape
      if (bank->alike(e, (e + step) % at.experts)) {
        source = (e + step) % at.experts;
        break;
      }
    old_of_new[static_cast<size_t>(e)] = source;
    inverse[static_cast<size_t>(source)] = e;
  }
  moved->permute(old_of_new);
  const at::NoGradGuard no_grad;
  const Tensor row_1D = kit_rows(at, "x", {1, at.width});
  for (int64_t e = 0; e < at.experts; ++e) {
    const int64_t source = old_of_new[static_cast<size_t>(e)];
    must(equal_experts(*moved, e, *bank, source), fmt::format("expert {} is not what expert {} was", e, source), at);
    if (bank->stages() == 1 && bank->has_forward_expert())
      must(at::equal(moved->forward_expert(e, moved->parameters_of(e), row_1D),
                     bank->forward_expert(source, bank->parameters_of(source), row_1D)),
           fmt::format("expert {} computes something else than expert {} did", e, source), at);
  }
  moved->permute(inverse);
  for (int64_t e = 0; e < at.experts; ++e)
    must(equal_experts(*moved, e, *bank, e), fmt::format("permuted back, expert {} differs", e), at);
}

void check_surgery(const ExpertSubject& subject) {
  const ExpertCase at{.seed = subject.seed};
  const RandomKey init = random_key(at.seed, "verify").with("experts");
  const auto initial = initial_bank(subject, at, init), bank = kit_bank(subject, at);
  for (int64_t e = 0; e < at.experts; ++e) {
    bank->reset_expert(e, init);
    must(equal_experts(*bank, e, *initial, e),
         fmt::format("reset with the key of its start, expert {} is not what it started from", e), at);
    for (int64_t later = e + 1; later < at.experts; ++later)
      must(!equal_experts(*bank, later, *initial, later), fmt::format("resetting expert {} touched expert {}", e, later), at);
  }
  for (int64_t from = 0; from < at.experts; ++from)
    for (int64_t to = 0; to < at.experts; ++to) {
      if (from == to || !bank->alike(from, to)) continue;
      bank->clone_expert(from, to);
      must(equal_experts(*bank, to, *bank, from), fmt::format("expert {} is no copy of {}", to, from), at);
      bank->reset_expert(to, init);
    }
}

// An expert starts the same whatever the number of the others, and whichever of them stand in another bank: of another kind, or
// on another rank.
void check_initial_draw(const ExpertSubject& subject) {
  const ExpertCase at{.seed = subject.seed}, more{.experts = 7, .seed = subject.seed};
  const RandomKey init = random_key(at.seed, "verify").with("experts");
  const auto few = initial_bank(subject, at, init);
  if (expert_has_size(subject, more)) {
    const auto many = initial_bank(subject, more, init);
    for (int64_t e = 0; e < at.experts; ++e)
      must(equal_experts(*few, e, *many, e),
           fmt::format("expert {} starts otherwise among {} experts than among {}", e, more.experts, at.experts), at);
  }
  const ExpertCase two{.experts = 2, .seed = subject.seed};
  if (!expert_has_size(subject, two)) return;
  const auto part = initial_bank(subject, two, init, /*first=*/2);
  for (int64_t e = 0; e < two.experts; ++e)
    must(equal_experts(*part, e, *few, e + 2),
         fmt::format("expert {} starts otherwise in a bank that is a part, with expert 2 as its first", e + 2), at);
}

}  // namespace

std::vector<ExpertProperty> expert_state_properties() {
  return {
      {"counts", "parameters_per_expert() counts what its tensors hold, and all of them the bank's", always_for_experts,
       check_counts},
      {"flops", "flops_per_row() is what the matrix products of one row take, a base aside", always_for_experts, check_flops},
      {"save_load", "saved and loaded, every expert is the same bit for bit", needs_state, check_save_load},
      {"permutation", "permuted experts are the others' bit for bit, and back again", always_for_experts, check_permutation},
      {"surgery", "reset gives the start again and touches no other; a clone is a copy", needs_state, check_surgery},
      {"initial_draw", "an expert starts the same whatever the number of the others", needs_state, check_initial_draw},
  };
}

}  // namespace moelab
