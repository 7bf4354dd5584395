// The table of experts/README.md, cell by cell: trained for two steps and evaluated, or refused with exactly that reason.
#include "core/error.h"
#include "experiments/expert_compat.h"
#include "experiments/experiment.h"
#include "tests/support/program.h"
#include "trainers/observer.h"
#include "trainers/trainer.h"

#include <ATen/ops/equal.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>
#include <map>
#include <optional>
#include <set>

using namespace moelab;

namespace {

const char* const kVectors = R"(
[model]
name = "mlp"
layers = 1
width = 32
[data]
name = "clusters"
[train]
steps = 2
batch = 16
[eval]
sequences = 16
)";

// Attention heads need a model with attention. It is causal, which is another matter.
const char* const kTokens = R"(
[model]
layers = 1
width = 32
heads = 2
context = 16
[data]
name = "markov"
validation_documents = 4
[train]
steps = 2
batch = 4
allow_noncausal_training = true
)";

// Routers whose groups are sequences would see one row each.
CompatFact with_row_groups(CompatFact fact) {
  const Options options(Registry<RouterEntry>::instance().find(fact.router).options);
  if (options.declared("group") && std::holds_alternative<std::string>(options.all().at("group")))
    fact.options["group"] = std::string("micro");
  return fact;
}

// A causal model refuses routers that look ahead in evaluation; where experts choose rows, thresholds do not.
CompatFact with_causal_evaluation(CompatFact fact) {
  if (Registry<RouterEntry>::instance().find(fact.router).facts.capacity_is_choice)
    fact.options["eval"] = std::string("thresholds");
  return fact;
}

std::string experiment_of(const CompatExperts& experts, const CompatFact& fact) {
  if (experts.table == "attention") return kTokens + compat_tables(experts, with_causal_evaluation(fact));
  return kVectors + compat_tables(experts, with_row_groups(fact));
}

Tensor parameter(const Model& model, const std::string& name) {
  for (const NamedTensor& entry : model.parameters())
    if (entry.name == name) return entry.tensor;
  FAIL("no parameter " << name);
  return {};
}

using Values = std::vector<std::pair<std::string, Tensor>>;

Values values_of(const Model& model) {
  Values all;
  for (const NamedTensor& entry : model.parameters()) all.emplace_back(entry.name, entry.tensor.detach().clone());
  return all;
}

// Experts that have parameters have learned, and what training may not move stands still.
void check_moved(const Model& model, const Values& before) {
  std::set<std::string> may_move;
  for (const NamedTensor& entry : model.optimised()) may_move.insert(entry.name);
  for (const Site* site : model.sites()) {
    bool moved = site->bank->parameters().empty();
    for (const auto& [name, value] : before)
      if (name.starts_with(site->path + ".experts.")) moved |= !at::equal(value, parameter(model, name));
    CAPTURE(site->path);
    CHECK(moved);
  }
  for (const auto& [name, value] : before) {
    CAPTURE(name);
    if (!may_move.contains(name)) CHECK(at::equal(value, parameter(model, name)));
  }
}

struct CountedChanges : Observer {
  void on_event(const std::string&, const Event& event, int64_t) override {
    changes += event.kind == Event::Kind::kExpertAdded || event.kind == Event::Kind::kExpertRemoved ? 1 : 0;
  }
  int64_t changes = 0;
};

// "" where it trains and evaluates with finite losses, else what it was refused with before any training.
std::string outcome_of(const std::string& text, const CompatFact& fact = {}) {
  std::optional<Experiment> e;
  try {
    e = load_experiment(parse_config(text, "cell.toml"));
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  const Values before = values_of(*e->model);
  CountedChanges counted;
  Trainer trainer(e->train, e->model, e->data, single_comm(), "", {&counted});
  CHECK(trainer.run() == Outcome::kDone);
  CHECK(std::isfinite(trainer.last_evaluation().loss));
  check_moved(*e->model, before);
  CAPTURE(text, counted.changes);
  CHECK((counted.changes > 0) == fact.grows);
  return "";
}

}  // namespace

TEST_CASE("the table of experts and routers tells the truth in every cell") {
  std::map<std::string, int64_t> rows_of_kind;
  int64_t refused = 0;
  for (const CompatExperts& experts : compat_experts()) {
    CHECK(compat_facts().size() == 10);
    ++rows_of_kind[experts.groups.front().first];
    for (const CompatFact& fact : compat_facts()) {
      const std::string reason = compat_refusal(experts, fact), outcome = outcome_of(experiment_of(experts, fact), fact);
      CAPTURE(experts.label, fact.label, fact.router, reason, outcome);
      CHECK(reason.empty() == outcome.empty());
      CHECK((outcome.ends_with(reason) && outcome.find('\n') == std::string::npos));
      CHECK((reason.empty() || outcome.starts_with("cell.toml:")));
      refused += reason.empty() ? 0 : 1;
    }
  }
  for (const ExpertEntry& entry : Registry<ExpertEntry>::instance().all()) {
    CAPTURE(entry.name);
    const bool many = entry.name == "ffn" || entry.place != ExpertPlace::kFeedForward;  // alone, unequal, mixed; places; styles
    CHECK(rows_of_kind[entry.name] == (many ? 3 : 1));
  }
  // Two columns of merging for zero, identity, and the two banks of several groups; soft plans too for the three styles of heads
  // and for adapters under one decision.
  CHECK(refused == 4 * 2 + 4 * 3);
}

TEST_CASE("adapters say at their own table what they cannot do with a router, before anything is trained") {
  const std::string head = std::string(kVectors) + "[adapters]\nexperts = 4\n";
  const std::string soft = "[adapters.router]\nname = \"soft_moe\"\n", expert = "[adapters.expert]\n";
  CHECK(outcome_of(head + soft + expert + "targets = \"dense\"\ndecision = \"layer\"\n") ==
        "cell.toml:19:1: router 'soft_moe' cannot use these experts in training: one decision for several linear maps takes a "
        "router with a sparse plan; use decision = \"linear\"");
  const std::string no_dropout =
      "experts 'lora': dropout is drawn per row of the layer, which takes a router with a sparse plan and execution = \"auto\"; "
      "set dropout = 0";
  CHECK(outcome_of(head + soft + expert + "dropout = 0.5\n") == "cell.toml:18:1: " + no_dropout);
  CHECK(outcome_of(head + "execution = \"loop\"\n" + expert + "dropout = 0.5\n") == "cell.toml:17:1: " + no_dropout);
  CHECK(outcome_of(head + expert + "dropout = 0.5\n").empty());
  CHECK(outcome_of(head + "execution = \"loop\"\n" + expert + "targets = \"dense\"\ndecision = \"layer\"\ndropout = 0.5\n")
            .empty());
}

TEST_CASE("heads that a router would average in evaluation hear that, and nothing of their stages") {
  CHECK(outcome_of(std::string(kTokens) +
                   "[attention]\nexperts = 4\n[attention.router]\nname = \"thor\"\ninference = \"averaged\"\n") ==
        "cell.toml:14:1: router 'thor' mixes the parameters of experts in evaluation: attention heads are chosen row by row; use "
        "a router with a sparse plan");
}

TEST_CASE("a layer that cannot mix its experts says so with its place before anything is built") {
  const std::string text = std::string(kVectors) +
                           "[moe]\nexperts = 4\n[moe.router]\nname = \"smear\"\n[moe.expert]\nwidths = [4, 4, 8, 8]\n";
  CHECK(outcome_of(text) ==
        "cell.toml:17:1: router 'smear' mixes the parameters of experts in training: the experts of 'ffn' form 2 "
        "groups of different kinds or shapes, whose parameters have no mean; use experts of one kind and width");
}

TEST_CASE("groups that do not add up, and shared experts of a kind without a width, are refused with their place") {
  const std::string head = std::string(kVectors) + "[moe]\nexperts = 4\n";
  CHECK(outcome_of(head + "[[moe.expert.group]]\ncount = 3\n")
            .find("the groups hold 3 experts, but the layer has 4; their counts must add up to it") != std::string::npos);
  CHECK(outcome_of(head + "[moe.expert]\nname = \"identity\"\n[moe.shared]\ncount = 1\n")
            .find("experts 'identity' cannot be shared: they have no width") != std::string::npos);
  CHECK(outcome_of(head + "[moe.shared]\ncount = 1\ngate = true\nresidual = true\n")
            .find("gate and residual are two ways to weigh the shared output") != std::string::npos);
  CHECK(outcome_of(head + "[moe.shared]\nresidual = true\n").find("there are none; set count") != std::string::npos);
  CHECK(outcome_of(head + "[moe.expert]\nwidths = [4, 4]\n").find("cell.toml:15:1: widths lists 2 widths for 4 experts") == 0);
}
