// Banks in one line: registered kinds with some options set, alone and mixed, biases drawn so that they are seen.
#pragma once

#include "core/expert.h"
#include "tests/support/sparse_cases.h"

#include <ATen/core/grad_mode.h>

namespace moelab::testing {

using GivenOptions = std::map<std::string, OptionValue>;

inline Options options_of(const std::string& kind, const GivenOptions& given) {
  const OptionSpecs& specs = Registry<ExpertEntry>::instance().find(kind).options;
  Options options(specs);
  for (const OptionSpec& spec : specs)
    if (const auto found = given.find(spec.name); found != given.end()) options.set(spec, found->second);
  return options;
}

struct PartCase {
  std::string kind;
  int64_t experts = 1;
  GivenOptions options = {};
};

inline std::unique_ptr<ExpertBank> mixed_bank(const std::vector<PartCase>& cases, int64_t width,
                                              at::ScalarType dtype = at::kDouble, int64_t seed = 1) {
  ExpertSpec spec;
  spec.width = width;
  spec.dtype = dtype;
  spec.init = random_key(seed, "experts");
  std::vector<ExpertPart> parts;
  for (const PartCase& part : cases) {
    parts.push_back({part.kind, part.experts, options_of(part.kind, part.options)});
    spec.experts += part.experts;
  }
  auto bank = make_mixed_experts(parts, spec);
  const at::NoGradGuard no_grad;
  std::mt19937_64 draw(static_cast<uint64_t>(seed));
  for (const ExpertGroup& group : bank->groups())
    for (const NamedTensor& entry : group.stacked)
      if (entry.name.starts_with("b_")) entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), dtype, false));
  return bank;
}

inline std::unique_ptr<ExpertBank> bank_of(const std::string& kind, int64_t width, int64_t experts,
                                           const GivenOptions& options = {}, at::ScalarType dtype = at::kDouble) {
  return mixed_bank({{kind, experts, options}}, width, dtype);
}

}  // namespace moelab::testing
