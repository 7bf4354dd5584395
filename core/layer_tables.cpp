#include "core/layer_tables.h"

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

OptionSpecs shared_options() {
  return {
      option("count", 0, "shared experts that every row uses").at_least(0),
      option("width", 0, "width of each shared expert; 0 = as the routed ones").at_least(0).read_unless("count", "0"),
      option("gate", false, "scale the shared output by sigmoid(x·gate_weight)").read_unless("count", "0"),
      option("residual", false, "mix routed and shared output by softmax(x·coefficient_weight) instead of adding them (PR-MoE)"),
  };
}

// A group says what differs from [moe.expert], where both are of one kind.
Options group_options(const Table& group, const ExpertEntry& entry, const LayerSettings& settings) {
  OptionSpecs specs = with_name(entry.options);
  specs.push_back(option("count", 1, "experts of this group").at_least(1));
  if (entry.name == settings.expert)
    for (OptionSpec& spec : specs)
      if (settings.expert_spec.options.was_set(spec.name)) spec.default_value = settings.expert_spec.options.all().at(spec.name);
  return group.options(specs);
}

// What the factory sees: the entry's own options, so that groups that say the same in two ways are one.
Options own_options(const OptionSpecs& specs, const Options& given) {
  Options own(specs);
  for (const OptionSpec& spec : specs) own.set(spec, given.all().at(spec.name));
  return own;
}

std::vector<ExpertPart> read_groups(const Table& table, const LayerSettings& settings) {
  std::vector<ExpertPart> parts;
  int64_t count = 0;
  for (const Table& group : table.array("group")) {
    const std::string name = plugin_name(group, settings.expert.c_str());
    const auto& entry = find_plugin<ExpertEntry>(group, name);
    if (entry.place != ExpertPlace::kFeedForward || settings.place != ExpertPlace::kFeedForward)
      group.fail("name", fmt::format("experts '{}' stand in for no feed-forward layer: they cannot be mixed with others",
                                     entry.place != ExpertPlace::kFeedForward ? name : settings.expert));
    const Options options = group_options(group, entry, settings);
    parts.push_back({name, options.integer("count"), own_options(entry.options, options)});
    count += parts.back().experts;
  }
  const int64_t experts = settings.expert_spec.experts;
  if (!parts.empty() && count != experts)
    table.fail("group",
               fmt::format("the groups hold {} experts, but the layer has {}; their counts must add up to it", count, experts));
  return parts;
}

std::vector<ExpertPart> parts_of(const LayerSettings& settings) {
  if (!settings.mixed.empty()) return settings.mixed;
  return {{settings.expert, settings.expert_spec.experts, settings.expert_spec.options}};
}

// One expert of each kind and shape: what a plan may be refused for, without the memory of all.
std::shared_ptr<ExpertBank> sample_bank(std::vector<ExpertPart> uniform, ExpertSpec spec) {
  for (ExpertPart& part : uniform) part.experts = 1;
  spec.experts = static_cast<int64_t>(uniform.size());
  return make_mixed_experts(uniform, spec);
}

// The kinds of the layer's experts, "'a', 'b'", where none of them reads `recompute`; else "".
std::string kinds_that_keep_nothing(const LayerSettings& settings) {
  std::string kinds;
  for (const ExpertPart& part : parts_of(settings)) {
    const std::string quoted = "'" + part.name + "'";
    if (Registry<ExpertEntry>::instance().find(part.name).recomputes) return "";
    if (kinds.find(quoted) == std::string::npos) kinds += (kinds.empty() ? "" : ", ") + quoted;
  }
  return kinds;
}

// The kind that shared experts are of, and its option for the width.
const OptionSpec& shared_width_option(const LayerSettings& settings) {
  const OptionSpec* width = find_option(Registry<ExpertEntry>::instance().find(settings.expert).options, "width");
  check_invariant(width != nullptr, "experts '" + settings.expert + "' cannot be shared: they have no width");
  return *width;
}

void read_shared(const Table& table, LayerSettings& settings) {
  const Options shared = table.options(shared_options());
  settings.shared_count = shared.integer("count");
  settings.shared_width = shared.integer("width");
  settings.shared_gate = shared.flag("gate");
  settings.shared_residual = shared.flag("residual");
  if (settings.shared_residual && settings.shared_gate)
    table.fail("residual", "gate and residual are two ways to weigh the shared output; set one of them");
  if (settings.shared_count > 0 && settings.place != ExpertPlace::kFeedForward)
    table.fail("count", fmt::format("experts '{}' stand in for no feed-forward layer, and none can be shared", settings.expert));
  if (settings.shared_count > 0 && !find_option(Registry<ExpertEntry>::instance().find(settings.expert).options, "width"))
    table.fail("count",
               fmt::format("experts '{}' cannot be shared: they have no width; name a kind with one in [moe.expert] and the "
                           "routed kinds in [[moe.expert.group]]",
                           settings.expert));
  if (settings.shared_residual && settings.shared_count == 0)
    table.fail("residual", "residual mixes with shared experts, and there are none; set count");
}

}  // namespace

const OptionSpec* find_option(const OptionSpecs& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const OptionSpec& spec) { return spec.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

std::string plugin_name(const Table& table, const char* fallback) {
  return table.options({option("name", fallback, "which plugin")}, table.keys()).text("name");
}

std::string refused_plan(ExpertPlace place, const ExpertBank& bank, PlanForm form) {
  const bool by_module = place != ExpertPlace::kFeedForward && form == PlanForm::kSparse;
  return by_module ? "" : bank.refuses(form);
}

void refuse_unfit_plans(const Table& table, const std::string& key, const LayerSettings& settings, const RouterFacts& facts,
                        const std::function<std::shared_ptr<ExpertBank>()>& sample) {
  const bool sparse = facts.plan_in(Mode::kTrain) == PlanForm::kSparse && facts.plan_in(Mode::kEval) == PlanForm::kSparse;
  if (sparse && settings.place != ExpertPlace::kFeedForward) return;
  const std::shared_ptr<ExpertBank> bank = sample();
  for (const Mode mode : {Mode::kTrain, Mode::kEval})
    if (const std::string reason = refused_plan(settings.place, *bank, facts.plan_in(mode)); !reason.empty())
      table.fail(key, fmt::format("router '{}' {} in {}: {}", settings.router,
                                  facts.plan_in(mode) == PlanForm::kMerge ? "mixes the parameters of experts"
                                                                          : "cannot use these experts",
                                  to_string(mode), reason));
}

OptionSpecs with_name(const OptionSpecs& own) {
  OptionSpecs all{option("name", "", "which plugin")};
  all.insert(all.end(), own.begin(), own.end());
  return all;
}

void fail_with_place(const Table& moe, const std::string& table, const std::string& complaint) {
  Table named = moe.child(table);
  for (const char* other : {"router", "noise", "capacity", "expert", "shared"})
    if (complaint.starts_with(fmt::format("[moe.{}] ", other))) named = moe.child(other);
  const std::string own = complaint.starts_with("[moe.") ? fmt::format("[{}{}", moe.path(), complaint.substr(4)) : complaint;
  usage_error(fmt::format("{}: {}", place_of_complaint(named, complaint.substr(complaint.find(']') + 1), "name"), own));
}

void read_experts(const Table& moe, ExpertSpec spec, LayerSettings& settings, const RouterFacts& facts,
                  const char* default_kind) {
  const Table table = moe.child("expert");
  settings.expert = plugin_name(table, default_kind);
  const auto& entry = find_plugin<ExpertEntry>(table, settings.expert);
  settings.place = entry.place;
  spec.options = table.options(with_name(entry.options), {"group"});
  settings.expert_spec = std::move(spec);
  settings.mixed = read_groups(table, settings);
  try {
    routed_parts(settings);
  } catch (const Error& error) {
    table.fail("name", error.what());
  }
  const auto sample = [&] {
    return with_place(moe, "expert", [&] { return sample_bank(routed_parts(settings), settings.expert_spec); });
  };
  if (settings.place != ExpertPlace::kLinears) refuse_unfit_plans(table, "name", settings, facts, sample);  // else not known yet
  read_shared(moe.child("shared"), settings);
}

void refuse_unread_execution(const Table& moe, const LayerSettings& settings, const RouterFacts& facts) {
  const bool merges = facts.plan_in(Mode::kTrain) == PlanForm::kMerge && facts.plan_in(Mode::kEval) == PlanForm::kMerge;
  const std::string word = execution_words().at(static_cast<size_t>(settings.execution));
  const bool plain = settings.execution == Execution::kAuto || settings.execution == Execution::kReference;
  if (!plain && merges)
    moe.fail("execution", fmt::format("execution = \"{}\" is not read: router '{}' mixes experts, and a mixed expert has its "
                                      "rows to itself; use \"auto\" or \"reference\"", word, settings.router));
  if (!settings.recompute) return;
  if (settings.execution != Execution::kAuto)
    moe.fail("recompute", fmt::format("recompute = true is not read with execution = \"{}\"; use \"auto\"", word));
  if (const std::string kinds = kinds_that_keep_nothing(settings); !kinds.empty())
    moe.fail("recompute", fmt::format("recompute = true is not read: experts {} keep no pre-activations that could be made "
                                      "again; remove it", kinds));
  if (merges)
    moe.fail("recompute", fmt::format("recompute = true is not read: router '{}' mixes experts, and mixed experts are made again "
                                      "anyway; remove it", settings.router));
}

std::vector<ExpertPart> routed_parts(const LayerSettings& settings) {
  return uniform_parts(parts_of(settings), settings.expert_spec);
}

std::shared_ptr<ExpertBank> routed_bank(const LayerSettings& settings) {
  return make_mixed_experts(routed_parts(settings), settings.expert_spec);
}

// The shared experts are one expert of width count·width: the same function, in one product.
std::shared_ptr<ExpertBank> shared_bank(const LayerSettings& settings) {
  if (settings.shared_count == 0) return nullptr;
  ExpertSpec spec = settings.expert_spec;
  spec.experts = 1;
  spec.init = spec.init.with("shared");
  const int64_t routed = hidden_width(spec.options.integer("width"), spec.width);
  const int64_t each = settings.shared_width > 0 ? settings.shared_width : routed;
  spec.options.set(shared_width_option(settings), settings.shared_count * each);
  if (const OptionSpec* widths = find_option(Registry<ExpertEntry>::instance().find(settings.expert).options, "widths"))
    spec.options.set(*widths, widths->default_value);
  return make_experts(settings.expert, spec);
}

}  // namespace moelab
