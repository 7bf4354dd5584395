// The few file operations that everything durable is built from. All failures are Error(kData) with the path and the reason.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

struct XXH3_state_s;

namespace moelab {

// An open file: closed at the end of its scope, never inherited by a started program.
class File {
 public:
  enum class Mode {
    kRead,    // must exist and be a regular file
    kCreate,  // for writing, emptied
    kAppend,  // for writing at the end, made when absent
    kUpdate,  // for reading and writing, made when absent
  };
  File(std::string path, Mode mode);
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  int64_t size() const;
  void write(std::string_view bytes);
  void read_at(int64_t offset, void* to, int64_t count) const;  // all `count` bytes, or an error
  void sync();                                                  // returns when the bytes are on the medium
  void close();                                                 // reports what a destructor cannot

 private:
  std::string path_;
  int descriptor_ = -1;
};

// What a manifest remembers of a file.
struct FileDigest {
  int64_t size = 0;
  std::string xxh3;  // XXH3-128, 32 lower-case hex digits
  bool operator==(const FileDigest& other) const = default;
};

// XXH3-128 of bytes that come in pieces.
class HashStream {
 public:
  HashStream();
  void add(std::string_view bytes);
  std::string hex() const;

 private:
  struct Free {
    void operator()(XXH3_state_s* state) const;
  };
  std::unique_ptr<XXH3_state_s, Free> state_;
};

// A new file that hashes what it is given: the digest describes the bytes meant, not those a bad disk kept.
class DigestedFile {
 public:
  explicit DigestedFile(const std::string& path) : file_(path, File::Mode::kCreate) {}
  void write(std::string_view bytes);
  FileDigest finish();  // syncs and closes

 private:
  File file_;
  HashStream hash_;
  int64_t size_ = 0;
};

std::string xxh3_hex(std::string_view bytes);
FileDigest digest_file(const std::string& path);  // in constant memory

std::string read_file(const std::string& path);
FileDigest write_file(const std::string& path, std::string_view bytes);  // synced

// Readers see the old bytes or the new, whenever the power fails. Goes through `path`.tmp.
void write_file_atomically(const std::string& path, std::string_view bytes);

void make_folders(const std::string& path);
void sync_folder(const std::string& path);    // makes the names in it durable
void sync_parent_of(const std::string& path);  // makes this one name durable
void rename_path(const std::string& from, const std::string& to);

// Keeps a folder for one process, by flock() on its file `.lock`, which holds the owner's process id. The kernel releases it
// however the owner dies. A second taker gets Error(kUsage) that names the owner.
class RunLock {
 public:
  explicit RunLock(const std::string& folder);

 private:
  File file_;
};

}  // namespace moelab
