#include "sparse_cases.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <numeric>

namespace moelab::testing {
namespace {

double uniform(std::mt19937_64& draw) { return std::uniform_real_distribution<double>(0, 1)(draw); }

void choose_row(std::mt19937_64& draw, int64_t k, double drop, const std::vector<bool>& closed, int64_t* choice, bool* kept,
                bool* dropped) {
  std::vector<int64_t> order(closed.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), draw);
  for (int64_t i = 0; i < k; ++i) {
    choice[i] = order[static_cast<size_t>(i)];
    dropped[i] = closed[static_cast<size_t>(choice[i])] || uniform(draw) < drop;
    kept[i] = !dropped[i];
  }
}

}  // namespace

Tensor random_leaf(std::mt19937_64& draw, std::vector<int64_t> shape, at::ScalarType dtype, bool requires_grad) {
  Tensor values = at::empty(shape, at::kDouble);
  std::normal_distribution<double> normal;
  std::generate_n(values.mutable_data_ptr<double>(), values.numel(), [&] { return normal(draw); });
  return values.to(dtype).requires_grad_(requires_grad);
}

SparseCase random_sparse_case(std::mt19937_64& draw, int64_t rows, int64_t experts, int64_t k, double drop,
                              at::ScalarType dtype) {
  std::vector<bool> closed(static_cast<size_t>(experts));
  for (auto&& expert : closed) expert = uniform(draw) < 0.15;
  const Assignment assignment{.choice_TK = at::empty({rows, k}, at::kLong), .kept_TK = at::empty({rows, k}, at::kBool),
                              .dropped_TK = at::empty({rows, k}, at::kBool)};
  for (int64_t t = 0; t < rows; ++t)
    choose_row(draw, k, drop, closed, assignment.choice_TK.mutable_data_ptr<int64_t>() + t * k,
               assignment.kept_TK.mutable_data_ptr<bool>() + t * k, assignment.dropped_TK.mutable_data_ptr<bool>() + t * k);
  const Tensor gate_TK = random_leaf(draw, {rows, k}, dtype);
  return {.plan = make_sparse_plan(assignment, gate_TK, experts), .gate_TK = gate_TK};
}

std::unique_ptr<ExpertBank> ffn_bank(int64_t width, int64_t experts, int64_t hidden, const std::string& activation, bool bias,
                                     at::ScalarType dtype, int64_t seed) {
  const OptionSpecs& specs = Registry<ExpertEntry>::instance().find("ffn").options;
  Options options(specs);
  for (const OptionSpec& spec : specs) {
    if (spec.name == "activation") options.set(spec, activation);
    if (spec.name == "width") options.set(spec, hidden);
    if (spec.name == "bias") options.set(spec, bias);
  }
  auto bank = make_experts("ffn", {.width = width, .experts = experts, .dtype = dtype, .init = random_key(seed, "experts"),
                                   .output_scale = 1, .options = options});
  const at::NoGradGuard no_grad;
  std::mt19937_64 draw(static_cast<uint64_t>(seed));
  for (const NamedTensor& entry : bank->parameters())
    if (entry.name[0] == 'b') entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), dtype, false));
  return bank;
}

}  // namespace moelab::testing
