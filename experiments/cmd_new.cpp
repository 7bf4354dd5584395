// `moelab new router NAME`, `moelab new expert NAME`: a skeleton that compiles, its test, and an experiment that runs it.
#include "experiments/cli.h"

#include "core/error.h"
#include "core/expert.h"
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

// A kind of plugin that can be started.
struct NewKind {
  std::string word;    // "router"
  std::string folder;  // "routers", with its tests in tests/routers and its experiments in experiments/routers
  std::string begin;   // what to write first
  bool (*exists)(const std::string&);
  std::vector<SkeletonFile> (*skeleton)(const std::string&);
};

const NewKind kNewRouter{"router", "routers", "write route()",
                         [](const std::string& name) { return Registry<RouterEntry>::instance().contains(name); },
                         router_skeleton};
const NewKind kNewExpert{"expert", "experts", "write forward() and forward_with()",
                         [](const std::string& name) { return Registry<ExpertEntry>::instance().contains(name); },
                         expert_skeleton};

void require_checkout(const NewKind& kind, const std::string& root) {
  for (const std::string& part : {kind.folder, "tests/" + kind.folder, std::string("experiments/base/lm_tiny.toml")})
    if (!std::filesystem::exists(std::filesystem::path(root) / part))
      usage_error(fmt::format("'{}' is no source checkout of moelab: it has no {}; go there, or name it with --dir", root, part));
}

void require_new_name(const NewKind& kind, const std::string& name) {
  static const std::regex snake_case("[a-z][a-z0-9]*(_[a-z0-9]+)*");
  if (!std::regex_match(name, snake_case))
    usage_error(fmt::format("'{}' is no name for {} {}: use lower-case letters, digits and single underscores, like my_{}", name,
                            kind.word == "expert" ? "an" : "a", kind.word, kind.word));
  if (kind.exists(name))
    usage_error(
        fmt::format("there is {} {} '{}' already; take another name", kind.word == "expert" ? "an" : "a", kind.word, name));
}

void require_absent(const std::string& root, const std::vector<SkeletonFile>& files) {
  for (const SkeletonFile& file : files)
    if (std::filesystem::exists(root + "/" + file.path))
      usage_error(fmt::format("'{}/{}' exists already; take another name, or remove it", root, file.path));
}

// All or none: what was written before a failure goes away again.
void write_skeleton(const NewKind& kind, const std::string& root, const std::vector<SkeletonFile>& files) {
  std::vector<std::string> written;
  try {
    make_folders(root + "/experiments/" + kind.folder);
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

void run_new(const NewKind& kind, const NewArguments& arguments) {
  require_new_name(kind, arguments.name);
  require_checkout(kind, arguments.root);
  const std::vector<SkeletonFile> files = kind.skeleton(arguments.name);
  require_absent(arguments.root, files);
  write_skeleton(kind, arguments.root, files);
  for (const SkeletonFile& file : files) fmt::print("wrote {}/{}\n", arguments.root, file.path);
  fmt::print("next: {} in {} and the worked number in {}; then `make build docs test`\n", kind.begin, files[0].path,
             files[1].path);
}

void add_new_kind(CLI::App& verb, const NewKind& kind) {
  const auto arguments = std::make_shared<NewArguments>();
  CLI::App* command = verb.add_subcommand(kind.word, kind.word + ": source, test and experiment");
  command->add_option("NAME", arguments->name, "of the " + kind.word + ", in snake_case")->required();
  command->add_option("--dir", arguments->root, "the source checkout (default: the current folder)");
  command->footer("Example: moelab new " + kind.word + " mine");
  command->callback([&kind, arguments] { run_new(kind, *arguments); });
}

}  // namespace

void add_new_command(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("new", "start a plugin of your own in this checkout");
  verb->require_subcommand(1);
  verb->footer("Example: moelab new router mine");
  add_new_kind(*verb, kNewRouter);
  add_new_kind(*verb, kNewExpert);
}

}  // namespace moelab
