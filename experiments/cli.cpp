#include "experiments/cli.h"

#include "core/error.h"

#include <torch/headeronly/version.h>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdio>
#include <exception>

namespace moelab {
namespace {

using AddCommand = void (*)(CLI::App&);
constexpr AddCommand kCommands[] = {add_run_command,    add_check_command,     add_list_command, add_route_command,
                                    add_verify_command, add_data_command,      add_new_command,  add_ckpt_command,
                                    add_docs_command,   add_completion_command};

std::string version_text() {
  return fmt::format("moelab {}\nLibTorch {}\ncompiler {}, C++ {}", MOELAB_VERSION, TORCH_VERSION, __VERSION__, __cplusplus);
}

void build_command_line(CLI::App& app) {
  app.set_version_flag("--version", version_text(), "print the versions of moelab, LibTorch and the compiler");
  app.footer("Example: moelab run experiments/quickstart.toml\nEvery command has --help with an example.");
  app.require_subcommand(0, 1);
  for (const AddCommand add : kCommands) add(app);
}

// stdout holds results alone: with --json it is one document.
void send_logs_to_stderr() {
  spdlog::set_default_logger(spdlog::stderr_color_mt("moelab"));
  spdlog::set_pattern("%n: %^%l%$: %v");
}

int say_and_end(ExitCode code, const std::string& message) {
  // fputs: where stderr is full or closed, the exit code still tells.
  std::fputs(fmt::format("moelab: {}\n", message.substr(0, message.find('\n'))).c_str(), stderr);
  return static_cast<int>(code);
}

// The verb that was being read when something went wrong, and how it is called: "data prepare".
struct ReachedVerb {
  const CLI::App* app;
  std::string path;
};

ReachedVerb reached_verb(const CLI::App& app) {
  ReachedVerb reached{&app, ""};
  while (!reached.app->get_subcommands().empty()) {
    reached.app = reached.app->get_subcommands().front();
    reached.path += (reached.path.empty() ? "" : " ") + reached.app->get_name();
  }
  return reached;
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

std::string unexpected_word(const ReachedVerb& verb, const std::string& word) {
  const bool is_option = word.starts_with("-");
  const bool is_verb = !is_option && !verb_names(*verb.app).empty();
  const std::string near = did_you_mean(word, is_option ? option_names(*verb.app) : verb_names(*verb.app));
  const std::string remedy = near.empty() ? fmt::format("; `moelab {}{}--help` shows what there is", verb.path,
                                                        verb.path.empty() ? "" : " ")
                                          : near;
  return fmt::format("{}unknown {} '{}'{}", verb.path.empty() ? "" : verb.path + ": ",
                     is_option ? "option" : is_verb ? "command" : "argument", word, remedy);
}

std::string parse_complaint(const CLI::App& app, const CLI::ParseError& error) {
  const ReachedVerb verb = reached_verb(app);
  const std::vector<std::string> unread = verb.app->remaining();
  if (dynamic_cast<const CLI::ExtrasError*>(&error) && !unread.empty()) return unexpected_word(verb, unread.front());
  return fmt::format("{}: {}; `moelab {} --help` has an example", verb.path, error.what(), verb.path);
}

// `data prpare` with a missing verb below: CLI11 would only say that one is required.
void require_verb_below(const CLI::App& app, const CLI::ParseError& error) {
  const ReachedVerb verb = reached_verb(app);
  const std::vector<std::string> unread = verb.app->remaining();
  if (dynamic_cast<const CLI::RequiredError*>(&error) && !unread.empty()) usage_error(unexpected_word(verb, unread.front()));
}

int parse_and_run(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& wish) {
    return app.exit(wish);  // --help, --version
  } catch (const CLI::ParseError& error) {
    require_verb_below(app, error);
    usage_error(parse_complaint(app, error));
  }
  if (!app.get_subcommands().empty()) return static_cast<int>(ExitCode::kDone);
  fmt::print(stderr, "{}", app.help());
  return static_cast<int>(ExitCode::kUsage);
}

constexpr const char* kResultLost = "cannot write to standard output: is the disk full, or the reader gone?";

void require_stdout_written() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) data_error(kResultLost);
}

}  // namespace

std::vector<std::string> verb_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; })) names.push_back(verb->get_name());
  return names;
}

int run_program(int argc, char** argv) {
  send_logs_to_stderr();
  try {
    CLI::App app("A laboratory for mixture-of-experts routing", "moelab");
    build_command_line(app);
    const int code = parse_and_run(app, argc, argv);
    require_stdout_written();
    return code;
  } catch (const Error& error) {
    std::fflush(stdout);
    return say_and_end(error.code(), error.what());
  } catch (const std::exception& error) {
    if (std::ferror(stdout)) return say_and_end(ExitCode::kData, kResultLost);
    return say_and_end(ExitCode::kBug,
                       fmt::format("a bug of ours, please report it with the command: {}", first_line(error.what())));
  }
}

}  // namespace moelab
