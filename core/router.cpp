#include "core/router.h"

#include "core/error.h"
#include "core/registry_impl.h"

#include <ATen/ops/arange.h>

#include <fmt/format.h>

namespace moelab {

Router::Router(RouterSpec spec) : spec_(std::move(spec)) {}
Router::~Router() = default;

void Router::prepare(const CorpusStatistics&) {}
std::vector<Event> Router::end_step(const std::map<std::string, Tensor>&, int64_t) { return {}; }
RouterFacts Router::facts() const { return entry().facts; }
std::string Router::noise_shape(Mode) const { return entry().noise_shape; }

Tensor Router::active_experts_E() const {
  if (spec_.max_experts == spec_.experts) return {};
  return at::arange(spec_.max_experts, at::kLong).lt(spec_.experts);
}

int64_t Router::active_experts() const {
  const Tensor active_E = active_experts_E();
  return active_E.defined() ? active_E.sum().item<int64_t>() : spec_.max_experts;
}

// Parameters and buffers with one row per expert; routers with other layouts say so themselves.
std::vector<Tensor> Router::per_expert_tensors() const {
  std::vector<Tensor> rows;
  for (const auto& list : {parameters(), buffers()})
    for (const NamedTensor& entry : list)
      if (entry.tensor.dim() > 0 && entry.tensor.size(0) == spec_.max_experts) rows.push_back(entry.tensor);
  return rows;
}

const char* to_string(Mode mode) {
  switch (mode) {
    case Mode::kTrain: return "training";
    case Mode::kEval: return "evaluation";
    case Mode::kDecode: return "decoding";
  }
  return "?";
}

const char* to_string(ProbabilityRule rule) {
  switch (rule) {
    case ProbabilityRule::kSoftmax: return "softmax";
    case ProbabilityRule::kSigmoidShare: return "sigmoid share";
    case ProbabilityRule::kOwn: return "own";
  }
  return "?";
}

const char* to_string(InEvaluation what) {
  switch (what) {
    case InEvaluation::kAsInTraining: return "as in training";
    case InEvaluation::kAllExperts: return "all experts";
    case InEvaluation::kMergedExperts: return "merged experts";
  }
  return "?";
}

PlanForm RouterFacts::plan_in(Mode mode) const {
  return mode != Mode::kTrain && in_evaluation == InEvaluation::kMergedExperts ? PlanForm::kMerge : plan;
}

Renormalise RouterSpec::renormalise() const {
  if (!options.declared("renormalise")) return Renormalise::kNone;
  const std::string& word = options.text("renormalise");
  if (word == "before_drop") return Renormalise::kBeforeDrop;
  return word == "after_drop" ? Renormalise::kAfterDrop : Renormalise::kNone;
}

OptionSpecs noise_options() {
  return {
      option("kind", "paper", "the router's noise in training: the paper's, none, normal on the logits, jitter on the input")
          .one_of({"paper", "none", "normal", "jitter"}),
      option("std", 1.0, "standard deviation of normal noise on the logits").at_least(0).read_when("kind", {"paper", "normal"}),
      option("epsilon", 0.01, "jitter multiplies the input by a uniform draw from [1-epsilon, 1+epsilon]")
          .at_least(0)
          .read_when("kind", {"paper", "jitter"}),
  };
}

NoiseSpec noise_spec(const Options& options) {
  NoiseSpec noise;
  const std::string& kind = options.text("kind");
  if (kind == "none") noise.kind = NoiseSpec::Kind::kNone;
  if (kind == "normal") noise.kind = NoiseSpec::Kind::kNormal;
  if (kind == "jitter") noise.kind = NoiseSpec::Kind::kJitter;
  noise.std = options.real("std");
  noise.epsilon = options.real("epsilon");
  noise.std_given = options.was_set("std");
  noise.epsilon_given = options.was_set("epsilon");
  return noise;
}

std::unique_ptr<Router> make_router(const std::string& name, RouterSpec spec) {
  const RouterEntry& entry = Registry<RouterEntry>::instance().find(name);
  std::unique_ptr<Router> router = entry.make(std::move(spec));
  router->set_entry(&entry);
  return router;
}

Causality causality(const RouterFacts& facts, const CapacityPolicy& policy, Mode mode, int64_t k, int64_t prompt) {
  if (facts.looks_ahead) return {false, "it reads later tokens by construction"};
  const bool prompted = facts.reads_prompt && mode == Mode::kEval && prompt > 0;
  const bool independent = mode == Mode::kTrain ? facts.batch_independent : facts.batch_independent_eval || prompted;
  if (!independent && facts.time_ordered) return {true, "the rows that a decision depends on are never later ones"};
  if (!independent) return {false, fmt::format("in {} a row's decision depends on later rows", to_string(mode))};
  if (policy.mode == CapacityPolicy::Mode::kNone)
    return {true, prompted ? fmt::format("the prompt of {} tokens decides, and only what follows it is judged", prompt)
                  : facts.plan == PlanForm::kMerge ? "each segment is decided by earlier ones"
                                                   : "each row decides for itself"};
  if (policy.priority != CapacityPolicy::Priority::kPosition)
    return {false, "the capacity serves by priority, so a later row can take an earlier one's place"};
  if (policy.lets_the_future_in(k))
    return {false, "all first choices are served before any second one (order = \"k_major\"), so a later row's first choice "
                   "can evict an earlier row's second"};
  return {true, "the capacity serves rows in their order"};
}

OptionSpec k_option(int default_value) { return option("k", default_value, "experts per row").at_least(1); }

OptionSpec renormalise_option(const char* default_value) {
  return option("renormalise", default_value, "divide a row's gates by their sum: never, over all choices, or over the survivors")
      .one_of({"none", "before_drop", "after_drop"});
}

template class Registry<RouterEntry>;

}  // namespace moelab
