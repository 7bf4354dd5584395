#include "core/model/model.h"

#include "core/error.h"
#include "core/registry_impl.h"

#include <ATen/core/Reduction.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nll_loss.h>

#include <fmt/format.h>

namespace moelab {
namespace {

constexpr const char* kDefaultModel = "decoder";

OptionSpecs options_of_model(const ModelEntry& entry) {
  OptionSpecs specs{option("name", kDefaultModel, "the backbone")};
  specs.insert(specs.end(), entry.options.begin(), entry.options.end());
  return specs;
}

}  // namespace

template class Registry<ModelEntry>;

Model::~Model() = default;

Tensor Model::decode(const Tensor&, DecodeState&) const { usage_error("only a model that reads tokens can continue a text"); }

const ModelEntry& model_entry(const Table& root) {
  const Table table = root.child("model");
  const std::string name = table.options({option("name", kDefaultModel, "the backbone")}, table.keys()).text("name");
  try {
    return Registry<ModelEntry>::instance().find(name);
  } catch (const Error& error) {
    table.fail("name", error.what());
  }
}

Options model_options(const Table& root) { return root.child("model").options(options_of_model(model_entry(root))); }

std::shared_ptr<Model> make_model(const ModelSpec& spec) {
  const ModelEntry& entry = model_entry(spec.root);
  check_invariant(spec.data.kind == entry.reads, fmt::format("model '{}' was given {}", entry.name, to_string(spec.data.kind)));
  check_invariant(spec.data.classes > 0, "a model needs something to predict");
  return entry.make(spec, model_options(spec.root));
}

Tensor cross_entropy_sum(const Tensor& logits_BLV, const Tensor& targets_BL) {
  const at::ScalarType dtype = logits_BLV.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor logits_TV = logits_BLV.reshape({-1, logits_BLV.size(-1)});
  const Tensor log_probs_TV = at::log_softmax(logits_TV, 1, dtype);
  return at::nll_loss(log_probs_TV, targets_BL.reshape({-1}).to(logits_TV.device()), {}, at::Reduction::Sum, /*ignore_index=*/-1);
}

}  // namespace moelab
