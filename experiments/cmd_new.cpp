// `moelab new router NAME`: a skeleton that compiles, its test, and an experiment that runs it.
#include "experiments/cli.h"

#include "core/error.h"
#include "core/io/files.h"
#include "core/router.h"
#include "experiments/skeleton.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <regex>

namespace moelab {
namespace {

struct NewArguments {
  std::string name;
  std::string root = ".";
};

void require_checkout(const std::string& root) {
  for (const char* part : {"routers", "tests/routers", "experiments/base/lm_tiny.toml"})
    if (!std::filesystem::exists(std::filesystem::path(root) / part))
      usage_error(fmt::format("'{}' is no source checkout of moelab: it has no {}; go there, or name it with --dir", root, part));
}

void require_new_name(const std::string& name) {
  static const std::regex snake_case("[a-z][a-z0-9]*(_[a-z0-9]+)*");
  if (!std::regex_match(name, snake_case))
    usage_error(fmt::format("'{}' is no name for a router: use lower-case letters, digits and single underscores, like my_router", name));
  if (Registry<RouterEntry>::instance().contains(name)) usage_error(fmt::format("there is a router '{}' already; take another name", name));
}

void require_absent(const std::string& root, const std::vector<SkeletonFile>& files) {
  for (const SkeletonFile& file : files)
    if (std::filesystem::exists(root + "/" + file.path))
      usage_error(fmt::format("'{}/{}' exists already; take another name, or remove it", root, file.path));
}

// All or none: what was written before a failure goes away again.
void write_skeleton(const std::string& root, const std::vector<SkeletonFile>& files) {
  std::vector<std::string> written;
  try {
    make_folders(root + "/experiments/routers");
    for (const SkeletonFile& file : files) {
      written.push_back(root + "/" + file.path);
      write_file(written.back(), file.text);
    }
  } catch (...) {
    std::error_code ignored;
    for (const std::string& path : written) std::filesystem::remove(path, ignored);
    throw;
  }
}

void run_new_router(const NewArguments& arguments) {
  require_new_name(arguments.name);
  require_checkout(arguments.root);
  const std::vector<SkeletonFile> files = router_skeleton(arguments.name);
  require_absent(arguments.root, files);
  write_skeleton(arguments.root, files);
  for (const SkeletonFile& file : files) fmt::print("wrote {}/{}\n", arguments.root, file.path);
  fmt::print("next: write route() in {} and the worked number in {}; then `make build docs test`\n", files[0].path, files[1].path);
}

}  // namespace

void add_new_command(CLI::App& app) {
  const auto arguments = std::make_shared<NewArguments>();
  CLI::App* verb = app.add_subcommand("new", "start a plugin of your own in this checkout");
  verb->require_subcommand(1);
  verb->footer("Example: moelab new router mine");
  CLI::App* router = verb->add_subcommand("router", "a router: source, test and experiment");
  router->add_option("NAME", arguments->name, "of the router, in snake_case")->required();
  router->add_option("--dir", arguments->root, "the source checkout (default: the current folder)");
  router->footer("Example: moelab new router mine");
  router->callback([arguments] { run_new_router(*arguments); });
}

}  // namespace moelab
