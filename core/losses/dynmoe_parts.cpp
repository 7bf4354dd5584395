#include "core/losses/dynmoe_parts.h"

namespace moelab {

Tensor indicator_rows(const LossInput& input) {
  const auto given = input.out.statistics.find("indicator");
  if (given != input.out.statistics.end()) return given->second;
  return chosen_experts(input.out.assignment.choice_TK, input.experts, input.out.gate_TK.scalar_type());
}

Tensor router_matrix(const LossInput& input, const char* loss) {
  Tensor weight_ED;
  for (const NamedTensor& parameter : input.router.parameters())
    if (parameter.name == "weight" && parameter.tensor.dim() == 2) weight_ED = parameter.tensor;
  required(weight_ED, "a matrix 'weight' with one row per expert", loss, input);
  return weight_ED.scalar_type() == at::kDouble ? weight_ED : weight_ED.to(at::kFloat);
}

Tensor same_for_every_row(const Tensor& value, const LossInput& input) { return value.expand({input.in.rows(), 1}); }

std::string refuses_without_indicators(const RouterFacts& facts) {
  if (facts.variable_k && facts.straight_through) return "";
  return "it is for routers that activate a variable number of experts with a straight-through gradient, as dynmoe does";
}

}  // namespace moelab
