// Where prepared data sets lie, and how a prepared file is known to be whole.
#pragma once

#include <cstdint>
#include <string>

namespace moelab {

// $MOELAB_CACHE, or $XDG_CACHE_HOME/moelab, or ~/.cache/moelab; always an absolute path.
std::string cache_folder();

// A file of the cache whose content is fixed for ever.
struct CachedFile {
  std::string name;    // below cache_folder()
  int64_t size;
  std::string sha256;  // 64 lower-case hex digits, as sha256sum prints them
  std::string path() const { return cache_folder() + "/" + name; }
};

// What is wrong with `path` as a copy of `file`; "" when it is the very file.
std::string damage_of(const CachedFile& file, const std::string& path);

// Moves the new file `fresh`, of the same file system, to its place in the cache. Error(kData) when it is another file.
void keep_in_cache(const CachedFile& file, const std::string& fresh);

// A new folder below `parent`, removed with everything in it at the end of its scope.
class ScratchFolder {
 public:
  explicit ScratchFolder(const std::string& parent);
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  ~ScratchFolder();
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace moelab
