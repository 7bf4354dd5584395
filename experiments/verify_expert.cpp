#include "experiments/verify_expert.h"

#include "core/error.h"
#include "experiments/verify_case.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace moelab {
namespace {

ExpertSpec kit_expert_spec(const ExpertSubject& subject, const ExpertCase& at, RandomKey init, int64_t first) {
  ExpertSpec spec;
  spec.width = at.width;
  spec.experts = at.experts;
  spec.dtype = at.dtype;
  spec.init = init;
  spec.first = first;
  spec.options = Options(subject.entry.options);
  for (const OptionSpec& own : subject.entry.options)
    if (const auto given = subject.options.find(own.name); given != subject.options.end()) spec.options.set(own, given->second);
  return spec;
}

std::string label_of_options(const std::map<std::string, OptionValue>& options) {
  std::string label;
  for (const auto& [name, value] : options) label += fmt::format("{}{} = {}", label.empty() ? "" : ", ", name, to_text(value));
  return label;
}

std::vector<ExpertSubject> subjects_of(const ExpertEntry& entry, const VerifySettings& settings) {
  std::vector<std::map<std::string, OptionValue>> chosen{{}};
  if (!settings.defaults_only) {
    for (const OptionSpec& spec : entry.options)
      for (const OptionValue& value : other_values(spec)) chosen.push_back({{spec.name, value}});
    chosen.insert(chosen.end(), entry.verified_with.begin(), entry.verified_with.end());
  }
  std::vector<ExpertSubject> subjects;
  for (const auto& options : chosen) {
    const ExpertSubject subject{entry, label_of_options(options), options, settings.cases, settings.seed};
    if (expert_has_size(subject, {})) subjects.push_back(subject);
  }
  return subjects;
}

std::string failure_of_expert(const ExpertProperty& property, const ExpertSubject& subject) {
  try {
    property.check(subject);
    return "";
  } catch (const std::exception& error) {
    const std::string text = error.what(), line = text.substr(0, text.find('\n'));
    return subject.label.empty() ? line : fmt::format("with {}: {}", subject.label, line);
  }
}

Finding judge_expert(const ExpertProperty& property, const std::vector<ExpertSubject>& subjects) {
  Finding finding{"expert", subjects.front().entry.name, property.name, Verdict::kNotApplicable, ""};
  for (const ExpertSubject& subject : subjects) {
    const std::string outside = property.not_applicable(subject);
    if (!outside.empty() && finding.reason.empty()) finding.reason = outside;
    if (!outside.empty()) continue;
    finding.verdict = Verdict::kPass;
    if (const std::string failure = failure_of_expert(property, subject); !failure.empty())
      return {finding.kind, finding.name, finding.property, Verdict::kFail, failure};
  }
  if (finding.verdict == Verdict::kPass) finding.reason.clear();
  return finding;
}

bool expert_property_wanted(const ExpertProperty& property, const VerifySettings& settings) {
  return settings.only.empty() || std::count(settings.only.begin(), settings.only.end(), property.name) > 0;
}

// k distinct experts for a row; experts below `closed` take nobody.
void choose_experts(std::mt19937_64& draw, const ExpertCase& at, Load load, int64_t* choice, bool* kept, bool* dropped) {
  std::vector<int64_t> order(static_cast<size_t>(at.experts));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), draw);
  if (load == Load::kOneTakesAll) std::iter_swap(order.begin(), std::find(order.begin(), order.end(), at.experts - 1));
  for (int64_t j = 0; j < at.k; ++j) {
    choice[j] = order[static_cast<size_t>(j)];
    const bool closed = load == Load::kSomeEmpty && choice[j] % 2 == 0;
    const bool alone = load == Load::kOneTakesAll && j > 0;
    dropped[j] = closed || alone || (load == Load::kRandom && draw() % 5 == 0);
    kept[j] = !dropped[j];
  }
}

}  // namespace

std::string ExpertCase::text() const {
  return fmt::format("T={} E={} k={} D={} {} seed {}", rows, experts, k, width, dtype == at::kDouble ? "fp64" : "fp32", seed);
}

std::unique_ptr<ExpertBank> initial_bank(const ExpertSubject& subject, const ExpertCase& at, RandomKey init, int64_t first) {
  return make_experts(subject.entry.name, kit_expert_spec(subject, at, init, first));
}

std::unique_ptr<ExpertBank> kit_bank(const ExpertSubject& subject, const ExpertCase& at) {
  auto bank = initial_bank(subject, at, random_key(at.seed, "verify").with("experts"));
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : bank->parameters())
    entry.tensor.add_(normal_tensor(random_key(at.seed, "verify").with(entry.name), entry.tensor.sizes(), 0.3, at.dtype));
  return bank;
}

bool expert_has_size(const ExpertSubject& subject, const ExpertCase& at) {
  if (subject.label.empty()) return true;
  try {
    initial_bank(subject, at, random_key(at.seed, "verify"));
    return true;
  } catch (const Error& error) {
    if (error.code() == ExitCode::kUsage) return false;
    throw;
  }
}

Tensor kit_rows(const ExpertCase& at, const std::string& what, std::vector<int64_t> shape) {
  return normal_tensor(random_key(at.seed, "verify").with(what), shape, 1, at.dtype);
}

KitPlan sparse_plan(const ExpertCase& at, Load load) {
  std::mt19937_64 draw(static_cast<uint64_t>(at.seed) + 1);
  const Assignment chosen{.choice_TK = at::empty({at.rows, at.k}, at::kLong), .kept_TK = at::empty({at.rows, at.k}, at::kBool),
                          .dropped_TK = at::empty({at.rows, at.k}, at::kBool)};
  for (int64_t t = 0; t < at.rows; ++t)
    choose_experts(draw, at, load, chosen.choice_TK.mutable_data_ptr<int64_t>() + t * at.k,
                   chosen.kept_TK.mutable_data_ptr<bool>() + t * at.k, chosen.dropped_TK.mutable_data_ptr<bool>() + t * at.k);
  const Tensor gate_TK = kit_rows(at, "gates", {at.rows, at.k}).requires_grad_(true);
  return {make_sparse_plan(chosen, gate_TK, at.experts), {{"gate", gate_TK}}};
}

KitPlan soft_plan(const ExpertCase& at, const Tensor& x_TD) {
  constexpr int64_t slots = 2;
  SoftPlan plan;
  plan.experts = at.experts;
  plan.slots_per_expert = slots;
  plan.query_TD = x_TD;
  plan.key_SD = kit_rows(at, "keys", {at.experts * slots, at.width}).requires_grad_(true);
  plan.scale = at::ones({1}, x_TD.options().requires_grad(false));
  plan.sequences = 2;
  plan.sequence_T = at::arange(at.rows, at::kLong).remainder(2);
  plan.sequence_key_T = plan.sequence_T;
  plan.position_T = at::arange(at.rows, at::kLong).floor_divide(2);
  return {plan, {{"key", plan.key_SD}}};
}

KitPlan merge_plan(const ExpertCase& at) {
  const Tensor logits_GE = kit_rows(at, "alpha", {3, at.experts}).requires_grad_(true);
  return {MergePlan{logits_GE.softmax(1), at::arange(at.rows, at::kLong).remainder(3)}, {{"alpha", logits_GE}}};
}

void must(bool holds, const std::string& what, const ExpertCase& at) {
  if (!holds) throw std::runtime_error(fmt::format("{} ({})", what, at.text()));
}

void must_agree(const Tensor& a, const Tensor& b, double tolerance, const std::string& what, const ExpertCase& at) {
  const double error = difference(a, b);
  must(error <= tolerance, fmt::format("{}: relative error {:.3g}, allowed {:.0e}", what, error, tolerance), at);  // NaN fails
}

std::vector<ExpertProperty> expert_properties() {
  std::vector<ExpertProperty> all = expert_value_properties();
  const std::vector<ExpertProperty> more = expert_state_properties();
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

std::vector<Finding> verify_expert(const ExpertEntry& entry, const VerifySettings& settings) {
  std::vector<Finding> findings;
  std::vector<ExpertSubject> subjects;
  std::string broken;
  try {
    subjects = subjects_of(entry, settings);
    kit_bank(subjects.front(), {});
  } catch (const std::exception& error) {
    broken = fmt::format("it cannot be built: {}", error.what());
  }
  for (const ExpertProperty& property : expert_properties()) {
    if (!expert_property_wanted(property, settings)) continue;
    if (broken.empty()) findings.push_back(judge_expert(property, subjects));
    else findings.push_back({"expert", entry.name, property.name, Verdict::kFail, broken});
  }
  return findings;
}

}  // namespace moelab
