// `moelab completion bash`: a script that completes verbs, kinds and files.
#include "experiments/cli.h"

#include "core/error.h"
#include "experiments/catalogue.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>

namespace moelab {
namespace {

constexpr const char* kBashScript = R"bash(_moelab() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}}
  case $COMP_CWORD:$verb in
    1:*) COMPREPLY=($(compgen -W '{} --help --version' -- "$word")) ;;
    2:list|2:describe) COMPREPLY=($(compgen -W '{}' -- "$word")) ;;
    3:describe) COMPREPLY=($(compgen -W "$(moelab list "${{COMP_WORDS[2]}}" 2>/dev/null | cut -d' ' -f1)" -- "$word")) ;;
{}    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _moelab moelab
)bash";

std::vector<std::string> kind_names() {
  std::vector<std::string> names;
  for (const Kind& kind : catalogue()) names.push_back(kind.name);
  return names;
}

// "    2:data) ... 'list prepare verify' ;;" for verbs that have verbs of their own.
std::string nested_cases(const CLI::App& app) {
  std::string cases;
  for (const std::string& verb : verb_names(app)) {
    const std::vector<std::string> below = verb_names(*app.get_subcommand(verb));
    if (!below.empty())
      cases += fmt::format("    2:{}) COMPREPLY=($(compgen -W '{}' -- \"$word\")) ;;\n", verb, fmt::join(below, " "));
  }
  return cases;
}

void run_completion(const CLI::App& app, const std::string& shell) {
  if (shell != "bash") usage_error(fmt::format("there is no completion for '{}'; there is one for bash", shell));
  fmt::print(fmt::runtime(kBashScript), fmt::join(verb_names(app), " "), fmt::join(kind_names(), " "), nested_cases(app));
}

}  // namespace

void add_completion_command(CLI::App& app) {
  const auto shell = std::make_shared<std::string>();
  CLI::App* verb = app.add_subcommand("completion", "print a script that completes commands in a shell");
  verb->add_option("SHELL", *shell, "bash")->required();
  verb->footer("Example: source <(moelab completion bash)");
  verb->callback([&app, shell] { run_completion(app, *shell); });
}

}  // namespace moelab
