// The frame: versions, help, exit codes, and what is said of words that no command takes.
#include "tests/commands/commands_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

struct WrongWords {
  std::vector<std::string> arguments;
  std::string line;
};

TEST_CASE("--version names moelab, LibTorch and the compiler") {
  const ProgramResult result = moelab_run({"--version"});
  CHECK(result.code == 0);
  CHECK(result.out.starts_with("moelab " MOELAB_VERSION "\nLibTorch 2."));
  CHECK(contains(result.out, "\ncompiler "));
}

TEST_CASE("without a command the program shows its help on stderr and ends with 2") {
  const ProgramResult result = moelab_run({});
  CHECK(result.code == 2);
  CHECK(result.out.empty());
  CHECK(contains(result.err, "check"));
  CHECK(contains(result.err, "Example: moelab run"));
}

TEST_CASE("the help of every command ends with an example") {
  const std::string verb = GENERATE("run", "resume", "eval", "check", "list", "describe", "data", "new", "docs", "ckpt",
                                    "completion");
  const ProgramResult result = moelab_run({verb, "--help"});
  CHECK(result.code == 0);
  CHECK(contains(result.out.substr(result.out.rfind("Example: ")), "moelab " + verb));
}

TEST_CASE("commands below commands have examples too") {
  const auto words = GENERATE(std::vector<std::string>{"data", "list"}, std::vector<std::string>{"data", "prepare"},
                              std::vector<std::string>{"data", "verify"}, std::vector<std::string>{"new", "router"},
                              std::vector<std::string>{"ckpt", "inspect"});
  const ProgramResult result = moelab_run({words[0], words[1], "--help"});
  CHECK(result.code == 0);
  CHECK(contains(result.out, "Example: moelab " + words[0] + " " + words[1]));
}

TEST_CASE("unknown words are named, with the nearest known one") {
  const WrongWords wrong = GENERATE(
      WrongWords{{"lst"}, "moelab: unknown command 'lst', did you mean 'list'?\n"},
      WrongWords{{"xyzzyxyzzy"}, "moelab: unknown command 'xyzzyxyzzy'; `moelab --help` shows what there is\n"},
      WrongWords{{"list", "routers", "--jsno"}, "moelab: list: unknown option '--jsno', did you mean '--json'?\n"},
      WrongWords{{"list", "routers", "again"},
                 "moelab: list: unknown argument 'again'; `moelab list --help` shows what there is\n"},
      WrongWords{{"data", "prepair", "kjv"}, "moelab: data: unknown command 'prepair', did you mean 'prepare'?\n"},
      WrongWords{{"describe", "routers"}, "moelab: describe: NAME is required; `moelab describe --help` has an example\n"},
      WrongWords{{"list", "ruoters"},
                 "moelab: there is no kind 'ruoters', did you mean 'routers'? kinds: routers, experts, losses, objectives, "
                 "datasets, models, metrics\n"},
      WrongWords{{"completion", "fish"}, "moelab: there is no completion for 'fish'; there is one for bash\n"});
  const ProgramResult result = moelab_run(wrong.arguments);
  CHECK(result.code == 2);
  CHECK(result.out.empty());
  CHECK(result.err == wrong.line);
}

TEST_CASE("a result that cannot be written is an error, not silence") {
  const ScratchFolder folder;
  const ProgramResult result = run_program("/bin/sh", {"-c", std::string(MOELAB_PROGRAM) + " list routers --json > /dev/full"});
  CHECK(result.code == 5);
  CHECK(result.err == "moelab: cannot write to standard output: is the disk full, or the reader gone?\n");
}

TEST_CASE("the completion script is valid shell and knows the verbs") {
  const ScratchFolder folder;
  const std::string script = folder.put("moelab.bash", moelab_run({"completion", "bash"}).out);
  CHECK(run_program("/bin/bash", {"-n", script}).code == 0);
  const ProgramResult completed = run_program(
      "/bin/bash", {"-c", "source " + script + "; COMP_WORDS=(moelab desc); COMP_CWORD=1; _moelab; echo \"${COMPREPLY[@]}\""});
  CHECK(completed.out == "describe\n");
}

}  // namespace
}  // namespace moelab::test
