// Files, what they extend, and what the command line lays on top.
#include "core/config_node.h"
#include "core/error.h"
#include "core/lenient_config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace moelab {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxExtendsDepth = 32;
constexpr int kMaxConfigFiles = 256;  // files that extend two files twice would double with each step

// ", did you mean 'base/small.toml'?": the nearest file of the folder that was named.
std::string nearest_config_file(const fs::path& path) {
  std::vector<std::string> names;
  std::error_code none;
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  for (fs::directory_iterator entry(folder, none), end; !none && entry != end; entry.increment(none))
    names.push_back((path.parent_path() / entry->path().filename()).string());
  std::sort(names.begin(), names.end());  // folders list in any order
  return did_you_mean(path.string(), names);
}

class ConfigLoader {
 public:
  // `said_at` is the place of the `extends` that names the file; none for the first.
  ConfigNodePtr load(const std::string& path, const ConfigPlace* said_at = nullptr) {
    chain_.push_back(path);
    check_chain(said_at);
    ConfigNodePtr root = resolve(read(path, said_at), path);
    chain_.pop_back();
    return root;
  }

  // The table of `text` on top of the files it extends, without the key that said so.
  ConfigNodePtr resolve(const std::string& text, const std::string& name) {
    const ConfigNodePtr own = parse_toml(text, name);
    const auto found = own->map()->find("extends");
    if (found == own->map()->end()) return own;
    ConfigMap rest = *own->map();
    rest.erase("extends");
    ConfigNodePtr base;
    for (const auto& [file, place] : extended_files(*found->second)) {
      const fs::path path = (fs::path(name).parent_path() / file).lexically_normal();
      const ConfigNodePtr next = load(path.string(), &place);
      base = config_overlay(base, next);
    }
    return config_overlay(base, std::make_shared<ConfigNode>(ConfigNode{own->place, std::move(rest)}));
  }

 private:
  using SaidFiles = std::vector<std::pair<std::string, ConfigPlace>>;

  static SaidFiles extended_files(const ConfigNode& said) {
    SaidFiles files;
    const auto add = [&files](const ConfigNode& node) {
      const auto* file = std::get_if<std::string>(&node.value);
      if (!file) config_fail(node.place, "'extends' holds " + config_kind(node) + ", but must hold file names");
      files.emplace_back(*file, node.place);
    };
    if (!said.list()) add(said);
    else for (const ConfigNodePtr& element : *said.list()) add(*element);
    return files;
  }

  // Two spellings of one file are one link of a loop. What cannot be resolved fails when it is read.
  static std::string real_path(const std::string& path) {
    std::error_code failed;
    const fs::path real = fs::weakly_canonical(path, failed);
    return failed ? path : real.string();
  }

  void check_chain(const ConfigPlace* said_at) {
    if (!said_at) return;
    const std::string newest = real_path(chain_.back());
    const auto same = [&newest](const std::string& path) { return real_path(path) == newest; };
    if (std::any_of(chain_.begin(), chain_.end() - 1, same))
      config_fail(*said_at, fmt::format("'extends' runs in a loop: {}", fmt::join(chain_, " -> ")));
    if (chain_.size() > kMaxExtendsDepth)
      config_fail(*said_at, fmt::format("'extends' is more than {} files deep", kMaxExtendsDepth));
    if (++files_ > kMaxConfigFiles) config_fail(*said_at, fmt::format("'extends' reads more than {} files", kMaxConfigFiles));
  }

  static std::string read(const std::string& path, const ConfigPlace* said_at) {
    const std::string where = said_at ? said_at->text() + ": cannot read " + path : path;
    std::error_code none;
    if (fs::is_directory(path, none)) config_fail({where}, "is a directory, not a TOML file");
    errno = 0;
    std::ifstream file(path, std::ios::binary);
    if (!file && (errno == ENOENT || errno == ENOTDIR)) config_data_fail(where, "no such file" + nearest_config_file(path));
    if (!file) config_fail({where}, "cannot be opened: " + std::generic_category().message(errno));
    std::string text(kMaxConfigBytes + 1, '\0');  // one byte too many tells a file that is too large
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<size_t>(file.gcount()));
    if (file.bad()) config_fail({where}, "cannot be read");
    return text;
  }

  std::vector<std::string> chain_;
  int files_ = 0;
};

Table with_overrides(ConfigNodePtr root, const std::vector<std::string>& overrides, bool lenient = false) {
  for (const std::string& text : overrides) root = config_override(root, text);
  return Table(std::make_shared<Table::Node>(Table::Node{"", root, root->place, lenient}));
}

}  // namespace

Table load_config(const std::string& path, const std::vector<std::string>& overrides) {
  return with_overrides(ConfigLoader().load(path), overrides);
}

Table load_lenient_config(const std::string& path, const std::vector<std::string>& overrides) {
  return with_overrides(ConfigLoader().load(path), overrides, /*lenient=*/true);
}

Table parse_config(const std::string& text, const std::string& name, const std::vector<std::string>& overrides) {
  return with_overrides(ConfigLoader().resolve(text, name), overrides);
}

}  // namespace moelab
