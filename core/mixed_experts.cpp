// Banks of several parts: unequal widths and mixed kinds. Every part is a bank of one registered kind with one group; the whole
// hands each its rows, and names experts by their global ids. A layer of a sparse plan is the sum of its parts' layers; those of
// feed-forward experts of one activation are the groups of a single one.
#include "core/error.h"
#include "core/execute.h"
#include "core/ffn_layer.h"

#include <ATen/ops/cat.h>

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>

namespace moelab {
namespace {

class MixedBank : public ExpertBank {
 public:
  explicit MixedBank(std::vector<std::shared_ptr<ExpertBank>> parts) : parts_(std::move(parts)) {
    int64_t first = 0;
    for (const std::shared_ptr<ExpertBank>& part : parts_) {
      check_invariant(part->groups().size() == 1 && part->stages() == 1, "a part of mixed experts has one group and one stage");
      ExpertGroup group = part->groups().front();
      group.first = first;
      const std::string name =
          group.experts == 1 ? fmt::format("{}", first) : fmt::format("{}-{}", first, first + group.experts - 1);
      group.prefix = name + ".";
      add_child(name, part);
      first += group.experts;
      groups_.push_back(std::move(group));
    }
  }

  Tensor forward(const ExpertContext& context, int stage) const override {
    const int64_t* offset = context.offsets_E1.const_data_ptr<int64_t>();
    std::vector<Tensor> outputs;
    for (size_t p = 0; p < parts_.size(); ++p) {
      const int64_t first = groups_[p].first, experts = groups_[p].experts, begin = offset[first];
      ExpertContext part = context;
      part.rows_ND = context.rows_ND.narrow(0, begin, offset[first + experts] - begin);
      part.offsets_E1 = context.offsets_E1.narrow(0, first, experts + 1).sub(begin);
      part.plan = nullptr;  // its pairs are numbered for the whole
      outputs.push_back(parts_[p]->forward(part, stage));
    }
    return at::cat(outputs);
  }

  Tensor forward_layer(const ExpertContext& context) const override {
    std::vector<Tensor> outputs = together(context);
    for (size_t p = 0; p < parts_.size(); ++p)
      if (!feed_forward(p, context)) outputs.push_back(part_layer(p, context));
    return std::accumulate(outputs.begin() + 1, outputs.end(), outputs.front(),
                           [](const Tensor& a, const Tensor& b) { return a.add(b); });
  }

  Tensor forward_expert(int64_t expert, const std::vector<Tensor>& parameters, const Tensor& rows_ND) const override {
    const size_t p = part_of(expert);
    return parts_[p]->forward_expert(expert - groups_[p].first, parameters, rows_ND);
  }
  bool has_forward_expert() const override {
    return std::all_of(parts_.begin(), parts_.end(), [](const auto& part) { return part->has_forward_expert(); });
  }

  int64_t output_width(int stage) const override { return parts_.front()->output_width(stage); }

  double flops_per_row(int64_t expert) const override {
    const size_t p = part_of(expert);
    return parts_[p]->flops_per_row(expert - groups_[p].first);
  }

  void reset_expert(int64_t expert, RandomKey key) override {
    const size_t p = part_of(expert);
    parts_[p]->reset_expert(expert - groups_[p].first, key);
  }

 private:
  // Null where the part has no such group, or not where the rows are.
  const FfnPart* feed_forward(size_t part, const ExpertContext& context) const {
    return context.input_TD.is_cpu() ? dynamic_cast<const FfnPart*>(parts_[part].get()) : nullptr;
  }

  // One output per activation.
  std::vector<Tensor> together(const ExpertContext& context) const {
    std::map<FfnActivation, std::vector<FfnGroup>> groups;
    for (size_t p = 0; p < parts_.size(); ++p)
      if (const FfnPart* part = feed_forward(p, context)) {
        groups[part->ffn_activation()].push_back(part->ffn_group());
        groups[part->ffn_activation()].back().first = groups_[p].first;
      }
    std::vector<Tensor> outputs;
    for (const auto& [activation, of_one] : groups)
      outputs.push_back(ffn_layer(activation, of_one,
                                  {.x_TD = context.input_TD, .token_N = context.plan->token_N, .gate_N = context.plan->gate_N,
                                   .offsets_E1 = context.offsets_E1}, context.recompute));
    return outputs;
  }

  // The pairs of one part, with its experts and pairs numbered from 0.
  SparsePlan plan_of(size_t part, const SparsePlan& whole) const {
    const int64_t first = groups_[part].first, experts = groups_[part].experts;
    const auto* offset = whole.offsets_E1.const_data_ptr<int64_t>();
    const int64_t begin = offset[first], pairs = offset[first + experts] - begin;
    SparsePlan own;
    own.rows = whole.rows;
    own.experts = experts;
    own.token_N = whole.token_N.narrow(0, begin, pairs);
    own.expert_N = whole.expert_N.narrow(0, begin, pairs).sub(first);
    own.gate_N = whole.gate_N.narrow(0, begin, pairs);
    own.offsets_E1 = whole.offsets_E1.narrow(0, first, experts + 1).sub(begin);
    const Tensor slot_TK = whole.slot_TK.sub(begin);
    own.slot_TK = slot_TK.masked_fill(slot_TK.lt(0).logical_or(slot_TK.ge(pairs)), -1);
    return own;
  }

  Tensor part_layer(size_t part, const ExpertContext& context) const {
    const SparsePlan plan = plan_of(part, *context.plan);
    ExpertContext own = context;
    own.plan = &plan;
    own.offsets_E1 = plan.offsets_E1;
    if (Tensor y_TD = parts_[part]->forward_layer(own); y_TD.defined()) return y_TD;
    own.rows_ND = dispatch_rows(context.input_TD, plan);
    return combine_rows(parts_[part]->forward(own, 0), plan);
  }

  size_t part_of(int64_t expert) const {
    check_invariant(expert >= 0 && expert < experts(), fmt::format("expert {} of a bank of {}", expert, experts()));
    size_t part = parts_.size() - 1;
    while (groups_[part].first > expert) --part;
    return part;
  }

  std::vector<std::shared_ptr<ExpertBank>> parts_;
};

// Widths are left out: shapes are compared by themselves.
std::string kind_text(const std::string& name, const Options& options) {
  std::string text = name;
  for (const auto& [option, value] : options.all())
    if (option != "width" && option != "widths" && option != "name") text += fmt::format(" {}={}", option, to_text(value));
  return text;
}

std::unique_ptr<ExpertBank> one_part(const ExpertPart& part, ExpertSpec spec, int64_t first) {
  const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(part.name);
  spec.experts = part.experts;
  spec.options = part.options;
  spec.first += first;
  if (const std::string reason = entry.refuses ? entry.refuses(spec) : ""; !reason.empty()) usage_error(reason);
  std::unique_ptr<ExpertBank> bank = entry.make(std::move(spec));
  bank->set_name(entry.name);
  bank->set_kind(kind_text(entry.name, part.options));
  return bank;
}

std::string joined_names(const std::vector<ExpertPart>& parts) {
  std::vector<std::string> names;
  for (const ExpertPart& part : parts)
    if (std::count(names.begin(), names.end(), part.name) == 0) names.push_back(part.name);
  return std::accumulate(names.begin() + 1, names.end(), names.front(),
                         [](const auto& a, const auto& b) { return a + " + " + b; });
}

void append_part(std::vector<ExpertPart>& parts, const ExpertPart& more) {
  if (!parts.empty() && parts.back().name == more.name && parts.back().options.all() == more.options.all())
    parts.back().experts += more.experts;
  else if (more.experts > 0) parts.push_back(more);
}

}  // namespace

void ExpertBank::set_kind(const std::string& kind) {
  for (ExpertGroup& group : groups_)
    if (group.kind.empty()) group.kind = kind;
}

std::vector<ExpertPart> uniform_parts(const std::vector<ExpertPart>& parts, const ExpertSpec& spec) {
  std::vector<ExpertPart> uniform;
  for (const ExpertPart& part : parts) {
    const ExpertEntry& entry = Registry<ExpertEntry>::instance().find(part.name);
    ExpertSpec own = spec;
    own.experts = part.experts;
    own.options = part.options;
    if (const std::string reason = entry.refuses ? entry.refuses(own) : ""; !reason.empty()) usage_error(reason);
    if (!entry.per_expert) append_part(uniform, part);
    else for (const Options& options : entry.per_expert(own)) append_part(uniform, {part.name, 1, options});
  }
  return uniform;
}

std::unique_ptr<ExpertBank> make_mixed_experts(const std::vector<ExpertPart>& parts, const ExpertSpec& spec) {
  const std::vector<ExpertPart> uniform = uniform_parts(parts, spec);
  if (uniform.size() == 1) return one_part(uniform.front(), spec, 0);
  std::vector<std::shared_ptr<ExpertBank>> banks;
  int64_t first = 0;
  for (const ExpertPart& part : uniform) {
    banks.push_back(one_part(part, spec, first));
    first += part.experts;
  }
  check_invariant(first == spec.experts, fmt::format("the parts of mixed experts hold {} experts, not {}", first, spec.experts));
  auto bank = std::make_unique<MixedBank>(std::move(banks));
  bank->set_name(joined_names(uniform));
  return bank;
}

std::unique_ptr<ExpertBank> make_experts(const std::string& name, ExpertSpec spec) {
  return make_mixed_experts({{name, spec.experts, spec.options}}, spec);
}

}  // namespace moelab
