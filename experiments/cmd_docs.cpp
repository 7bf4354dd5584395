// `moelab docs`: keeps the tables in the README files equal to what is registered.
#include "experiments/cli.h"

#include "core/error.h"
#include "core/io/files.h"
#include "experiments/generated.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <filesystem>
#include <memory>

namespace moelab {
namespace {

struct DocsArguments {
  std::string root = ".";
  bool check = false;
};

// Where a table is not what it should be: written, or refused.
void renew_docs(const std::string& path, bool check) {
  const std::string old = read_file(path), now = with_generated_tables(old, path);
  if (old == now) return;
  if (check) usage_error(fmt::format("{}: a generated table is stale; run `make docs`", path));
  write_file_atomically(path, now);
  fmt::print("renewed {}\n", path);
}

void run_docs(const DocsArguments& arguments) {
  if (!std::filesystem::is_directory(arguments.root + "/routers"))
    usage_error(
        fmt::format("'{}' is no source checkout of moelab: it has no routers; go there, or name it with --dir", arguments.root));
  for (const std::string& path : readme_files(arguments.root)) renew_docs(path, arguments.check);
}

}  // namespace

void add_docs_command(CLI::App& app) {
  const auto arguments = std::make_shared<DocsArguments>();
  CLI::App* verb = app.add_subcommand("docs", "regenerate the tables in the README files of a checkout");
  verb->add_flag("--check", arguments->check, "change nothing; exit 2 when a table is stale");
  verb->add_option("--dir", arguments->root, "the source checkout (default: the current folder)");
  verb->footer("Example: moelab docs --check");
  verb->callback([arguments] { run_docs(*arguments); });
}

}  // namespace moelab
