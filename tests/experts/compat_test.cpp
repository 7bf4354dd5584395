// The table of experts/README.md, cell by cell: trained for two steps and evaluated, or refused with exactly that reason.
#include "core/error.h"
#include "experiments/expert_compat.h"
#include "experiments/experiment.h"
#include "tests/support/program.h"
#include "trainers/trainer.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <optional>

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

// Routers whose groups are sequences would see one row each.
std::string row_groups(const CompatFact& fact) {
  const Options options(Registry<RouterEntry>::instance().find(fact.router).options);
  return options.declared("group") && std::holds_alternative<std::string>(options.all().at("group")) ? "group = \"micro\"\n" : "";
}

std::string experiment_of(const CompatExperts& experts, const CompatFact& fact) {
  std::string tables = compat_tables(experts, fact);
  const size_t group = tables.find("[[moe.expert.group]]");
  tables.insert(group, row_groups(fact));
  return kVectors + tables;
}

// "" where it trains and evaluates with finite losses, else what it was refused with before any training.
std::string outcome_of(const std::string& text) {
  std::optional<Experiment> e;
  try {
    e = load_experiment(parse_config(text, "cell.toml"));
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  Trainer trainer(e->train, e->model, e->data, single_comm(), "", {});
  CHECK(trainer.run() == Outcome::kDone);
  CHECK(std::isfinite(trainer.last_evaluation().loss));
  return "";
}

}  // namespace

TEST_CASE("the table of experts and routers tells the truth in every cell") {
  int64_t cells = 0, refused = 0;
  for (const CompatExperts& experts : compat_experts())
    for (const CompatFact& fact : compat_facts()) {
      const std::string reason = compat_refusal(experts, fact), outcome = outcome_of(experiment_of(experts, fact));
      CAPTURE(experts.label, fact.label, fact.router, reason, outcome);
      CHECK(reason.empty() == outcome.empty());
      CHECK((outcome.ends_with(reason) && outcome.find('\n') == std::string::npos));
      ++cells;
      refused += reason.empty() ? 0 : 1;
    }
  const auto& kinds = Registry<ExpertEntry>::instance().all();
  const auto stands_in = [](const ExpertEntry& entry) { return entry.place == ExpertPlace::kFeedForward; };
  CHECK(cells == (std::count_if(kinds.begin(), kinds.end(), stands_in) + 2) * 7);
  CHECK(refused >= 8);  // two columns of merging for zero, identity, and the two banks of several groups
}

TEST_CASE("a layer that cannot mix its experts says so with its place before anything is built") {
  const std::string text =
      std::string(kVectors) + "[moe]\nexperts = 4\n[moe.router]\nname = \"smear\"\n[moe.expert]\nwidths = [4, 4, 8, 8]\n";
  CHECK(outcome_of(text) ==
        "cell.toml:17:1: router 'smear' mixes the parameters of experts in training: the experts of 'ffn' form 2 "
        "groups of different kinds or shapes, whose parameters have no mean; use experts of one kind and width");
}

TEST_CASE("groups that do not add up, and shared experts of a kind without a width, are refused with their place") {
  const std::string head = std::string(kVectors) + "[moe]\nexperts = 4\n";
  CHECK(outcome_of(head + "[[moe.expert.group]]\ncount = 3\n").find(
            "the groups hold 3 experts, but the layer has 4; their counts must add up to it") != std::string::npos);
  CHECK(outcome_of(head + "[moe.expert]\nname = \"identity\"\n[moe.shared]\ncount = 1\n").find(
            "experts 'identity' cannot be shared: they have no width") != std::string::npos);
  CHECK(outcome_of(head + "[moe.shared]\ncount = 1\ngate = true\nresidual = true\n").find(
            "gate and residual are two ways to weigh the shared output") != std::string::npos);
  CHECK(outcome_of(head + "[moe.shared]\nresidual = true\n").find("there are none; set count") != std::string::npos);
  CHECK(outcome_of(head + "[moe.expert]\nwidths = [4, 4]\n").find("cell.toml:15:1: widths lists 2 widths for 4 experts") == 0);
}
