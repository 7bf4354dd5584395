// The program is stopped and killed at many points; what it leaves after `resume` is what an undisturbed run leaves.
#include "train_process.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <random>

namespace moelab::test {
namespace {

// Steps long enough to be hit, checkpoints often enough to be interrupted.
const char* const kKilledExperiment = R"(
seed = 2
[model]
layers = 2
width = 32
heads = 2
context = 32
[moe]
experts = 4
[moe.router]
name = "noisy_topk"
k = 2
[moe.expert]
width = 32
[data]
name = "markov"
validation_documents = 8
[train]
steps = 30
batch = 8
log_every = 2
[eval]
every = 10
[checkpoint]
every = 3
)";

struct KilledRun {
  ScratchFolder folder;
  std::string config = folder.put("exp.toml", kKilledExperiment);
  std::string run = folder / "run";

  std::vector<std::string> start() const { return {"run", config, "--out", run, "--quiet"}; }
  std::vector<std::string> go_on() const { return {"resume", run, "--quiet"}; }
  std::string status() const { return text_of(run + "/STATUS"); }

  // Kills the program once metrics.jsonl has `lines` lines and another `delay` has passed; false where it was too fast.
  bool killed_at(const std::vector<std::string>& arguments, int64_t lines, std::chrono::microseconds delay,
                 int number = SIGKILL) const {
    StartedProgram program(arguments);
    program.wait_until([&] { return lines_in(run + "/metrics.jsonl") >= lines; });
    std::this_thread::sleep_for(delay);
    return program.end_with(number) == 128 + number;
  }
};

const KilledRun& undisturbed() {
  static const KilledRun run;
  static const int code = run_moelab(run.start()).code;
  REQUIRE(code == 0);
  return run;
}

std::vector<double> seconds_of_records(const std::string& run) {
  std::istringstream text(text_of(run + "/metrics.jsonl"));
  std::vector<double> seconds;
  for (std::string line; std::getline(text, line);) seconds.push_back(nlohmann::json::parse(line).at("seconds").get<double>());
  return seconds;
}

TEST_CASE("the lines of evaluations, and what eval prints, hold the routing losses") {
  const std::vector<std::string> lines = timeless_metrics(undisturbed().run);
  const nlohmann::json last = nlohmann::json::parse(lines.back());
  REQUIRE(last.at("final") == true);
  const ProgramResult found = run_moelab({"eval", undisturbed().run, "--json"});
  const nlohmann::json printed = nlohmann::json::parse(found.out);
  for (const char* name : {"eval.layer.1.loss.importance", "eval.layer.1.loss.load", "eval.layer.1.loss.load.weighted"})
    CHECK(printed.at(name) == last.at("m").at(name));
}

void check_as_undisturbed(const KilledRun& killed) {
  CHECK(checkpoint_files(killed.run) == checkpoint_files(undisturbed().run));
  CHECK(timeless_metrics(killed.run) == timeless_metrics(undisturbed().run));
  CHECK(timeless_summary(killed.run) == timeless_summary(undisturbed().run));
  CHECK(killed.status() == "done\n");
}

TEST_CASE("the same run twice leaves the same checkpoints, metrics and summary, byte for byte") {
  const KilledRun again;
  REQUIRE(run_moelab(again.start()).code == 0);
  check_as_undisturbed(again);
}

TEST_CASE("kill -9 at ten points of two runs, each resumed again and again, changes nothing in the end") {
  const std::vector<int64_t> lines = GENERATE(std::vector<int64_t>{1, 3, 6, 11, 18}, std::vector<int64_t>{2, 5, 8, 13, 17});
  const KilledRun killed;
  std::mt19937 draw(static_cast<unsigned>(lines[0]));
  std::uniform_int_distribution<int> delay(0, 8000);
  for (const int64_t line : lines)
    killed.killed_at(line == lines[0] ? killed.start() : killed.go_on(), line, std::chrono::microseconds(delay(draw)));
  const ProgramResult resumed = run_moelab(killed.go_on());
  CAPTURE(resumed.err);
  REQUIRE(resumed.code == 0);
  check_as_undisturbed(killed);
  REQUIRE(run_moelab(killed.go_on()).code == 0);  // a finished run may be resumed too
  check_as_undisturbed(killed);
}

TEST_CASE("killed before its first checkpoint, a run starts again") {
  const KilledRun killed;
  {
    StartedProgram program(killed.start());
    REQUIRE(program.wait_until([&] { return std::filesystem::exists(killed.run + "/metrics.jsonl"); }));
    program.end_with(SIGKILL);
  }
  std::filesystem::remove_all(killed.run + "/ckpt");
  REQUIRE(run_moelab(killed.go_on()).code == 0);
  check_as_undisturbed(killed);
}

TEST_CASE("killed after its last checkpoint was in place, a run still has the older ones to remove") {
  const KilledRun killed;
  REQUIRE(run_moelab(killed.start()).code == 0);
  std::filesystem::copy(killed.run + "/ckpt/step-27", killed.run + "/ckpt/step-24");
  std::filesystem::copy(killed.run + "/ckpt/step-27", killed.run + "/ckpt/step-21.tmp");
  REQUIRE(run_moelab(killed.go_on()).code == 0);
  check_as_undisturbed(killed);
}

TEST_CASE("SIGTERM and SIGINT finish the step, save, say so, and the run goes on as if nothing had been") {
  const int number = GENERATE(SIGTERM, SIGINT);
  const KilledRun stopped;
  {
    StartedProgram program(stopped.start());
    REQUIRE(program.wait_until([&] { return lines_in(stopped.run + "/metrics.jsonl") >= 4; }));
    CHECK(program.end_with(number) == (number == SIGTERM ? 143 : 130));
  }
  CHECK(stopped.status() == (number == SIGTERM ? "terminated\n" : "interrupted\n"));
  const nlohmann::json summary = nlohmann::json::parse(text_of(stopped.run + "/summary.json"));
  CHECK(summary.at("eval.loss").is_null());
  CHECK(std::filesystem::exists(stopped.run + "/ckpt/step-" + summary.at("step").dump()));
  REQUIRE(run_moelab(stopped.go_on()).code == 0);
  const std::vector<double> seconds = seconds_of_records(stopped.run);
  CHECK(std::is_sorted(seconds.begin(), seconds.end()));  // of all sessions
  CHECK(nlohmann::json::parse(text_of(stopped.run + "/summary.json")).at("seconds").get<double>() >= seconds.back());
  // The stop added a checkpoint of its own; those of the schedule are the same.
  const auto expected = checkpoint_files(undisturbed().run);
  auto found = checkpoint_files(stopped.run);
  std::erase_if(found, [&](const auto& file) { return expected.count(file.first) == 0; });
  CHECK(found == expected);
  CHECK(timeless_metrics(stopped.run) == timeless_metrics(undisturbed().run));
  CHECK(timeless_summary(stopped.run) == timeless_summary(undisturbed().run));
}

// Evaluating 200000 sequences takes minutes, and a signal waits for the end of a step: only the second one ends this at once.
TEST_CASE("a second signal stops at once, a second process is refused, and so is a second run in the folder") {
  const KilledRun busy;
  std::vector<std::string> endless = busy.start();
  endless.insert(endless.end(), {"--set", "train.steps=2", "--set", "data.validation_documents=200000", "--set", "eval.every=1"});
  StartedProgram program(endless);
  REQUIRE(program.wait_until([&] { return std::filesystem::exists(busy.run + "/metrics.jsonl"); }));

  const ProgramResult resumed = run_moelab(busy.go_on());
  CHECK(resumed.code == 2);
  CHECK(resumed.err ==
        "moelab: '" + busy.run + "' is in use by process " + std::to_string(program.id()) + ": wait until it ends, or stop it\n");
  const ProgramResult again = run_moelab(busy.start());
  CHECK(again.code == 2);
  CHECK(again.err == "moelab: " + busy.run + " holds a run already: use `moelab resume " + busy.run +
                         "`, or choose another folder with --out\n");

  program.signal(SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK(program.end_with(SIGINT) == 130);
  CHECK(busy.status() == "running\n");
}

}  // namespace
}  // namespace moelab::test
