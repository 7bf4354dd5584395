// What the readers of a layer's tables share; the layer and its dense twin use it.
#pragma once

#include "core/config.h"
#include "core/error.h"
#include "core/moe_layer.h"
#include "core/registry.h"

#include <functional>
#include <memory>
#include <string>

namespace moelab {

// The option of this name; null where there is none.
const OptionSpec* find_option(const OptionSpecs& specs, const std::string& name);

// The plugin that a table names, read before its other keys can be checked.
std::string plugin_name(const Table& table, const char* fallback);

OptionSpecs with_name(const OptionSpecs& own);

[[noreturn]] void fail_with_place(const Table& moe, const std::string& table, const std::string& complaint);

template <class Entry>
const Entry& find_plugin(const Table& table, const std::string& name) {
  try {
    return Registry<Entry>::instance().find(name);
  } catch (const Error& error) {
    table.fail("name", error.what());
  }
}

// Reads [moe.expert] with its [[moe.expert.group]]s and [moe.shared] into `settings`, whose router is read already, with these
// facts. `spec` is what every expert shares. Refused with its place: experts that the router's plans cannot use.
void read_experts(const Table& moe, ExpertSpec spec, LayerSettings& settings, const RouterFacts& facts,
                  const char* default_kind = "ffn");

// What `make` gives. Its refusals, "[moe.router] groups = 3 does not …", get the place of the option that they name, in the table
// below `moe` that they begin with or else in `table`.
template <class Make>
auto with_place(const Table& moe, const std::string& table, const Make& make) {
  try {
    return make();
  } catch (const Error& error) {
    if (error.code() != ExitCode::kUsage) throw;
    fail_with_place(moe, table, error.what());
  }
}

// Why experts at this place cannot carry out plans of this form, in one line; "" = they can. Sparse plans of experts that stand
// in for no feed-forward layer are their module's to carry out, stage by stage.
std::string refused_plan(ExpertPlace place, const ExpertBank& bank, PlanForm form);

// Complains at `key` of `table` where the experts cannot carry out the router's plans. `sample` makes one or a few experts to
// ask; it is not called for sparse plans whose experts stand in for no feed-forward layer.
void refuse_unfit_plans(const Table& table, const std::string& key, const LayerSettings& settings, const RouterFacts& facts,
                        const std::function<std::shared_ptr<ExpertBank>()>& sample);

// Refuses `execution` and `recompute` where nothing would read them. `settings` is complete but for the losses.
void refuse_unread_execution(const Table& moe, const LayerSettings& settings, const RouterFacts& facts);

std::vector<ExpertPart> routed_parts(const LayerSettings& settings);  // uniform ones
std::shared_ptr<ExpertBank> routed_bank(const LayerSettings& settings);
std::shared_ptr<ExpertBank> shared_bank(const LayerSettings& settings);  // null without shared experts

}  // namespace moelab
