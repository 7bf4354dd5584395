#include "datasets/cache.h"

#include "core/error.h"
#include "core/io/files.h"
#include "datasets/process.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include <stdlib.h>

namespace moelab {
namespace {

std::string cache_variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string sha256_of(const std::string& path) {
  const ProcessResult result = run_process({"sha256sum", "--", path});
  if (result.status != 0) data_error(path + ": sha256sum failed: " + last_words(result));
  return result.output.substr(result.output.front() == '\\' ? 1 : 0, 64);  // a backslash marks an escaped file name
}

}  // namespace

std::string cache_folder() {
  const auto absolute = [](const std::string& path) { return std::filesystem::absolute(path).string(); };
  if (const std::string own = cache_variable("MOELAB_CACHE"); !own.empty()) return absolute(own);
  if (const std::string shared = cache_variable("XDG_CACHE_HOME"); !shared.empty()) return absolute(shared + "/moelab");
  if (const std::string home = cache_variable("HOME"); !home.empty()) return absolute(home + "/.cache/moelab");
  data_error("nowhere to keep prepared data: set MOELAB_CACHE to a folder");
}

std::string damage_of(const CachedFile& file, const std::string& path) {
  std::error_code failure;
  const auto size = std::filesystem::file_size(path, failure);
  if (failure) return failure.message();
  if (static_cast<int64_t>(size) != file.size) {
    return "it has " + std::to_string(size) + " bytes instead of " + std::to_string(file.size);
  }
  const std::string sha256 = sha256_of(path);
  return sha256 == file.sha256 ? "" : "its SHA-256 is " + sha256 + " instead of " + file.sha256;
}

void keep_in_cache(const CachedFile& file, const std::string& fresh) {
  const std::string damage = damage_of(file, fresh);
  if (!damage.empty()) data_error(file.name + ": its source is another one than is known here: " + damage);
  rename_path(fresh, file.path());
  sync_parent_of(file.path());
}

ScratchFolder::ScratchFolder(const std::string& parent) : path_(parent + "/.scratch-XXXXXX") {
  if (mkdtemp(path_.data()) == nullptr) data_error(parent + ": cannot make a folder in it: " + std::strerror(errno));
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace moelab
