// `check`: what it says, and what it refuses without leaving anything behind.
#include "tests/commands/commands_support.h"

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

nlohmann::json checked(const std::vector<std::string>& overrides = {}) {
  const ScratchFolder folder;
  std::vector<std::string> arguments{"check", folder.put("exp.toml", kTinyExperiment), "--json"};
  for (const std::string& o : overrides) arguments.insert(arguments.end(), {"--set", o});
  const ProgramResult result = moelab_run(arguments);
  CAPTURE(result.err);
  REQUIRE(result.code == 0);
  return json_of(result);
}

// Per block: attention 4·16·16, router 4·16, SwiGLU or two-matrix experts, two norms of 16; the rest is embedding and norm.
TEST_CASE("active parameters leave out the experts that a row does not use") {
  const nlohmann::json report = checked({"moe.expert.activation=relu"});
  const int64_t expert = 2 * 16 * 16;  // w_in and w_out
  const int64_t unused = 2 * 3 * expert;  // two layers, three of four experts
  CHECK(report.at("parameters").at("total").get<int64_t>() - report.at("parameters").at("active").get<int64_t>() == unused);
}

TEST_CASE("memory is four bytes per parameter, again for gradients, twice for AdamW") {
  const nlohmann::json report = checked();
  const int64_t parameters = report.at("parameters").at("total").get<int64_t>() * 4;
  const nlohmann::json& memory = report.at("memory_bytes");
  CHECK(memory.at("parameters") == parameters);
  CHECK(memory.at("gradients") == parameters);
  CHECK(memory.at("optimizer") == 2 * parameters);
  CHECK(memory.at("activations_estimate").get<int64_t>() > 0);
}

// 8 rows a sequence, 2 sequences a micro-batch, 4 experts: ceil(8·1.25/4) = 3 and ceil(16·1.25/4) = 5 places.
TEST_CASE("capacity is given in tokens for a sequence and for a micro-batch") {
  const nlohmann::json report = checked({"moe.capacity.mode=paper"});
  const nlohmann::json& train = report.at("layers").at(1).at("train");
  CHECK(train.at("capacity_of_a_sequence") == 3);
  CHECK(train.at("capacity_of_a_micro_batch") == 5);
  CHECK(train.at("causal") == true);
  CHECK(report.at("layers").at(1).at("eval").at("capacity_of_a_sequence").is_null());
}

TEST_CASE("each layer's losses come with their values at balance and at collapse") {
  const nlohmann::json loss = checked().at("layers").at(0).at("losses").at(0);
  CHECK(loss.at("label") == "balance");
  CHECK(loss.at("scope") == "step");
  CHECK(loss.at("at_balance") == 1);
  CHECK(loss.at("at_collapse") == 4);
}

// 10 steps of warm-up to 0.01, then constant: 0.001 at the first step.
TEST_CASE("the learning rate is told at the first and the last step") {
  const nlohmann::json rate =
      checked({"optimizer.lr=0.01", "schedule.warmup_steps=10", "schedule.decay=constant"}).at("learning_rate");
  CHECK(rate.at("first").get<double>() == Catch::Approx(0.001));
  CHECK(rate.at("last").get<double>() == Catch::Approx(0.01));
}

TEST_CASE("tokens, policy for unused experts and refusals are part of the report") {
  const nlohmann::json report = checked({"optimizer.unused_experts=skip"});
  CHECK(report.at("training").at("tokens") == 20 * 4 * 8);
  CHECK(report.at("training").at("unused_experts") == "skip");
  CHECK(report.at("refusals").empty());
  CHECK(report.at("data").at("name") == "markov");
}

TEST_CASE("the text names layers, capacity, causality and landmarks, and says that nothing is refused") {
  const ScratchFolder folder;
  const ProgramResult result = moelab_run({"check", folder.put("exp.toml", kTinyExperiment)});
  REQUIRE(result.code == 0);
  for (const char* part : {"parameters", "FLOPs", "learning rate", "switch, 4 ffn experts, k = 1", "no capacity limit; causal",
                           "1 at balance, 4 at collapse", "zero gradient", "nothing is refused"})
    CHECK(contains(result.out, part));
}

struct BadExperiment {
  std::string text;
  std::string line;  // after "moelab: <folder>/"
};

TEST_CASE("bad experiments are refused with the place, and nothing is created") {
  const BadExperiment bad = GENERATE(
      BadExperiment{"[moe]\nexpert = 4\n", "exp.toml:2:1: "},
      BadExperiment{"[moe]\nexperts = \"four\"\n", "exp.toml:2:1: 'experts' is a string, but must be an integer"},
      BadExperiment{"[moe]\nexperts = 0\n", "exp.toml:2:1: 'experts' is 0, but must be at least 1"},
      BadExperiment{"[moe]\nexperts = 4\n[moe.router]\nname = \"softmax_topk\"\nk = 9\n",
                    "exp.toml:5:1: k = 9 is more than experts = 4"},
      BadExperiment{"[moe.router]\nname = \"swich\"\n", "exp.toml:2:1: nothing is named 'swich', did you mean 'switch'?"},
      BadExperiment{"[train]\nbatch = 3\nmicro_batches = 2\n",
                    "exp.toml:3:1: batch = 3 cannot be split into 2 equal micro-batches"},
      BadExperiment{"[train]\nobjective = \"tsk\"\n", "exp.toml:2:1: nothing is named 'tsk', did you mean 'task'? registered: "},
      BadExperiment{"[optimizer]\nname = \"adamv\"\n",
                    "exp.toml:2:1: 'name' is \"adamv\", but must be one of adamw, sgd, did you mean 'adamw'?"},
      BadExperiment{"[modle]\nwidth = 4\n", "exp.toml:1:1: unknown key 'modle' at the top of the file, did you mean 'model'?"},
      BadExperiment{"[model]\nwidth = 30\nheads = 4\n", "exp.toml:3:1: width = 30 is not divisible by heads = 4"},
      BadExperiment{"extends = \"exp.toml\"\n", ""},
      BadExperiment{"[[loss]]\ncoefficient = 1\n", "exp.toml:1:1: a [[loss]] needs a name"},
      BadExperiment{"plugins = \"nowhere.so\"\n", "exp.toml:1:1: cannot read '"}, BadExperiment{"x = \"\xff\"\n", ""},
      BadExperiment{"[moe]\nexperts = 4\nexperts = 4\n", "exp.toml:3:11: cannot redefine existing integer 'experts'\n"});
  const ScratchFolder folder;
  const ProgramResult result = moelab_in(folder.path(),
                                         {"check", folder.put("exp.toml", bad.text + "[data]\nname = \"markov\"\n")});
  CAPTURE(bad.text, result.err);
  CHECK(result.code == 2);
  CHECK(result.out.empty());
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  CHECK(result.err.starts_with("moelab: " + folder.path() + "/" + bad.line));
  CHECK(folder.files() == std::vector<std::string>{"exp.toml"});
}

TEST_CASE("a missing experiment ends with 5") {
  const ScratchFolder folder;
  const ProgramResult result = moelab_in(folder.path(), {"check", "nowhere.toml"});
  CHECK(result.code == 5);
  CHECK(contains(result.err, "nowhere.toml"));
  CHECK(folder.files().empty());
}

TEST_CASE("with --json a refusal is a document too") {
  const ScratchFolder folder;
  const ProgramResult result = moelab_run({"check", folder.put("exp.toml", kTinyExperiment), "--json", "--set", "moe.experts=0"});
  CHECK(result.code == 2);
  CHECK(json_of(result).at("refusals").size() == 1);
  CHECK(result.err.starts_with("moelab: "));
}

}  // namespace
}  // namespace moelab::test
