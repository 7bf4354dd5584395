// [eval] prompt from the experiment file to the summary.
#include "core/comm_thread_group.h"
#include "tests/support/program.h"
#include "tests/support/tiny_experiment.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>

#include <nlohmann/json.hpp>

namespace moelab::test {
namespace {

const std::vector<std::string> kLoryPrompt{"moe.router.eval=prompt", "eval.prompt=5"};

std::string refusal_of_prompt(const std::function<Experiment()>& make) {
  try {
    make();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool names(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST_CASE("a prompt that nothing follows, and a prompt of images, are refused where they are written") {
  CHECK(names(refusal_of_prompt([] { return tiny_experiment("lory", {"eval.prompt=13"}); }), "prompt = 13 is more than"));
  CHECK(refusal_of_prompt([] { return tiny_experiment("lory", {"eval.prompt=12"}); }).empty());
  CHECK(names(refusal_of_prompt([] { return tiny_classifier("mlp", "switch", {"eval.prompt=2"}); }), "vectors have no prompt"));
  const Experiment e = tiny_experiment("lory");
  CHECK_THROWS_AS(evaluate(*e.model, *e.data, {0, 4, 3, 0, 1, 14}, *single_comm()), Error);  // no text is that long
}

TEST_CASE("ranks share an evaluation after prompts, and all report the same tokens and loss") {
  std::vector<std::string> set = kLoryPrompt;
  set.push_back("model.dtype=float64");
  const Experiment e = tiny_experiment("lory", set);
  const Evaluation alone = evaluate(*e.model, *e.data, {0, 4, 3, 0, 1, 5}, *single_comm());
  CHECK(alone.tokens == 6 * (12 - 5 + 1));
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) {
    const Experiment own = tiny_experiment("lory", set);
    const Evaluation shared = evaluate(*own.model, *own.data, {0, 4, 3, 0, 1, 5}, *comm);
    if (shared.tokens != alone.tokens || far(shared.loss, alone.loss) > 1e-11) throw std::runtime_error("loss differs");
  });
}

TEST_CASE("routing losses read the rows of prompts too: none of them changes with the prompt") {
  const Experiment e = tiny_experiment("stablemoe", {"model.dtype=float64", "moe.router.stage1_steps=100"});
  const auto terms_after = [&](int64_t prompt) {
    return evaluate(*e.model, *e.data, {0, 4, 3, 0, 1, prompt}, *single_comm()).terms;
  };
  const auto without = terms_after(0), with = terms_after(7);
  for (size_t s = 0; s < 2; ++s)
    for (size_t t = 0; t < 2; ++t) {
      CHECK(without[s].at(t).weighted != 0);
      CHECK(with[s].at(t).value == without[s].at(t).value);
      CHECK(with[s].at(t).weighted == without[s].at(t).weighted);  // also of sums, which are divided by all targets
    }
}

TEST_CASE("a run with lory's prompts says what it scored, and eval and check say the same") {
  const ScratchFolder folder;
  const std::string tables = "[eval]\nprompt = 5\nevery = 2\n[train]\nsteps = 4\nbatch = 4\n";
  const std::string config = folder.put("exp.toml", kTinyTables + tables), run = folder / "run";
  const std::vector<std::string> lory{"--set", "moe.router.name=lory", "--set", "moe.router.eval=prompt"};
  std::vector<std::string> arguments{"run", config, "--out", run};
  arguments.insert(arguments.end(), lory.begin(), lory.end());
  const ProgramResult trained = run_moelab(arguments);
  REQUIRE(trained.code == 0);
  const auto summary = nlohmann::json::parse(text_of(run + "/summary.json"));
  CHECK(summary.at("eval.prompt") == 5);
  CHECK(summary.at("eval.tokens") == 4 * (8 - 5 + 1));
  CHECK(names(trained.out, "16 tokens after prompts of 5 tokens"));
  CHECK(names(trained.err, "16 tokens after prompts of 5\n"));
  const ProgramResult evaluated = run_moelab({"eval", run, "--json"});
  const auto again = nlohmann::json::parse(evaluated.out);
  for (const char* key : {"eval.prompt", "eval.tokens", "eval.loss"}) CHECK(again.at(key) == summary.at(key));
  arguments = {"check", config, "--json"};
  arguments.insert(arguments.end(), lory.begin(), lory.end());
  const auto checked = nlohmann::json::parse(run_moelab(arguments).out);
  CHECK(checked.at("layers")[0].at("eval").at("causal") == true);
  CHECK(names(checked.at("layers")[0].at("eval").at("reason"), "the prompt of 5 tokens decides"));
  const ProgramResult refused = run_moelab(
      {"run", config, "--set", "moe.router.name=lory", "--set", "moe.router.eval=prompt", "--set", "eval.prompt=0"});
  CHECK(refused.code == 2);
  CHECK(names(refused.err, "set [eval] prompt = N"));
}

}  // namespace
}  // namespace moelab::test
