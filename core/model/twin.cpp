#include "core/model/twin.h"

#include "core/error.h"
#include "core/layer_tables.h"

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

const OptionSpec* declared_option(const ExpertEntry& entry, const std::string& name) {
  for (const OptionSpec& spec : entry.options)
    if (spec.name == name) return &spec;
  return nullptr;
}

void set_declared(Options& options, const ExpertEntry& entry, const std::string& name, OptionValue value) {
  const OptionSpec* spec = declared_option(entry, name);
  check_invariant(spec != nullptr, "experts '" + entry.name + "' have no option '" + name + "'");
  options.set(*spec, std::move(value));
}

// Hidden units of all routed experts; kinds without a width have none.
int64_t routed_width(const LayerSettings& layer) {
  int64_t sum = 0;
  for (const ExpertPart& part : routed_parts(layer))
    if (part.options.declared("width"))
      sum += part.experts * hidden_width(part.options.integer("width"), layer.expert_spec.width);
  return sum;
}

int64_t active_experts(const Table& tables, const LayerSettings& layer) {
  const RouterFacts facts = make_router(layer.router, layer.router_spec)->facts();
  const int64_t k = choices_per_row(facts, layer.router_spec);
  if (k > 0) return k;
  const char* why = facts.plan == PlanForm::kSparse ? "its number of experts per row varies"
                                                    : "its experts are blended, not chosen";
  tables.child("moe").child("router").fail("name", fmt::format(
      "twin = \"dense_active\" has no width for router '{}' of layer {}: {}; use twin = \"dense_total\", or set dense_width with "
      "moe_layers = \"none\"", layer.router, layer.router_spec.layer, why));
}

}  // namespace

DenseSettings dense_expert(const std::string& name, ExpertSpec spec, int64_t width, const std::string& activation) {
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(name);
  Options options(entry.options);
  for (const OptionSpec& own : entry.options)
    if (spec.options.declared(own.name) && own.name != "widths") options.set(own, spec.options.all().at(own.name));
  set_declared(options, entry, "width", width);
  if (!activation.empty()) set_declared(options, entry, "activation", activation);
  spec.options = std::move(options);
  spec.experts = 1;
  return {name, std::move(spec)};
}

DenseSettings dense_twin(const Table& tables, const LayerSettings& layer, const std::string& twin) {
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(layer.expert);
  if (!declared_option(entry, "width"))
    tables.child("moe").child("expert").fail("name",
                                             fmt::format("experts '{}' have no width, so they have no dense twin", layer.expert));
  const ExpertSpec& expert = layer.expert_spec;
  const int64_t each = hidden_width(expert.options.integer("width"), expert.width);
  const int64_t shared = layer.shared_count * (layer.shared_width > 0 ? layer.shared_width : each);
  int64_t routed = routed_width(layer);
  if (twin == "dense_active") routed = active_experts(tables, layer) * routed / layer.router_spec.max_experts;
  return dense_expert(layer.expert, expert, std::max<int64_t>(1, routed + shared));
}

}  // namespace moelab
