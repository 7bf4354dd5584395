#include "experiments/plugins.h"

#include "core/error.h"
#include "core/io/files.h"
#include "core/plugin.h"
#include "trainers/settings.h"

#include <CLI/StringTools.hpp>
#include <dlfcn.h>
#include <elf.h>
#include <fmt/format.h>

#include <cstring>
#include <filesystem>

namespace moelab {
namespace {

// Put together at run time, so that the program itself holds no line of this kind.
std::string plugin_fields(const std::string& path) {
  const std::string bytes = read_file(path), mark = MOELAB_PLUGIN_MARK;
  const size_t start = bytes.find(mark);
  const size_t end = start == std::string::npos ? start : bytes.find('}', start);
  if (end == std::string::npos)
    usage_error(
        fmt::format("plugin '{}' does not say how it was built; put MOELAB_PLUGIN of core/plugin.h in one of its files", path));
  return bytes.substr(start + mark.size(), end - start - mark.size());
}

// The section table lies at the end of an ELF file. The loader maps what the header promises and dies by SIGBUS where the file
// is shorter, so a torn one must not reach it.
void refuse_torn_file(const std::string& path) {
  const std::string bytes = read_file(path);
  Elf64_Ehdr header{};
  if (bytes.size() >= sizeof header) std::memcpy(&header, bytes.data(), sizeof header);
  const bool elf = std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0;
  if (!elf || header.e_shoff + uint64_t{header.e_shnum} * header.e_shentsize > bytes.size())
    usage_error(fmt::format("plugin '{}' is no shared library, or only a part of one; build it again", path));
}

void refuse_foreign_build(const std::string& path) {
  const std::vector<std::string> ours = CLI::detail::split(MOELAB_PLUGIN_FIELDS(MOELAB_VERSION), ';');
  std::vector<std::string> theirs = CLI::detail::split(plugin_fields(path), ';');
  theirs.resize(ours.size());
  for (size_t i = 0; i < ours.size(); ++i)
    if (ours[i] != theirs[i])
      usage_error(fmt::format("plugin '{}' was built with {}, this program with {}; build it again", path, theirs[i], ours[i]));
}

}  // namespace

void load_plugin(const std::string& path) {
  refuse_foreign_build(path);
  refuse_torn_file(path);
  const std::string whole = std::filesystem::absolute(path).string();  // a bare name would be searched for in the system
  if (dlopen(whole.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr)
    usage_error(fmt::format("plugin '{}' cannot be loaded: {}", path, dlerror()));
}

void load_plugins(const Table& root) {
  const std::string list = root.options({plugins_option()}, root.keys()).text("plugins");
  for (const std::string& word : CLI::detail::split(list, ',')) {
    if (word.empty()) continue;
    try {
      load_plugin(CLI::detail::trim_copy(word));
    } catch (const Error& error) {
      root.fail("plugins", error.what());
    }
  }
}

}  // namespace moelab
