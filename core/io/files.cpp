#include "core/io/files.h"

#include "core/error.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

namespace moelab {
namespace {

[[noreturn]] void fail_with_errno(const char* action, const std::string& path) {
  const int reason = errno;
  data_error(fmt::format("cannot {} '{}': {}", action, path, std::generic_category().message(reason)));
}

int open_flags(File::Mode mode) {
  switch (mode) {
    case File::Mode::kRead: return O_RDONLY;
    case File::Mode::kCreate: return O_WRONLY | O_CREAT | O_TRUNC;
    case File::Mode::kAppend: return O_WRONLY | O_CREAT | O_APPEND;
    case File::Mode::kUpdate: return O_RDWR | O_CREAT;
  }
  return O_RDONLY;
}

std::string hash_to_hex(XXH128_hash_t hash) {
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, hash);
  std::string hex;
  for (const unsigned char byte : bytes.digest) hex += fmt::format("{:02x}", byte);
  return hex;
}

}  // namespace

File::File(std::string path, Mode mode) : path_(std::move(path)) {
  // O_NONBLOCK: opening a named pipe for reading must end in an error, not wait for a writer.
  descriptor_ = open(path_.c_str(), open_flags(mode) | O_CLOEXEC | (mode == Mode::kRead ? O_NONBLOCK : 0), 0644);
  if (descriptor_ < 0) fail_with_errno(mode == Mode::kRead ? "read" : "write", path_);
  struct stat info{};
  if (mode != Mode::kRead || (fstat(descriptor_, &info) == 0 && S_ISREG(info.st_mode))) return;
  ::close(std::exchange(descriptor_, -1));
  data_error(fmt::format("cannot read '{}': not a regular file", path_));
}

File::File(File&& other) noexcept : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

int64_t File::size() const {
  struct stat info{};
  if (fstat(descriptor_, &info) != 0) fail_with_errno("read", path_);
  return info.st_size;
}

void File::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) fail_with_errno("write", path_);
    if (written > 0) bytes.remove_prefix(static_cast<size_t>(written));
  }
}

void File::read_at(int64_t offset, void* to, int64_t count) const {
  char* target = static_cast<char*>(to);
  while (count > 0) {
    const ssize_t got = pread(descriptor_, target, static_cast<size_t>(count), offset);
    if (got < 0 && errno != EINTR) fail_with_errno("read", path_);
    if (got == 0) data_error(fmt::format("'{}': truncated, no byte at offset {}", path_, offset));
    if (got < 0) continue;
    target += got;
    offset += got;
    count -= got;
  }
}

void File::sync() {
  // EINVAL: a pipe or a device, which has nothing to sync.
  if (fsync(descriptor_) != 0 && errno != EINVAL) fail_with_errno("write", path_);
}

void File::close() {
  if (::close(std::exchange(descriptor_, -1)) != 0) fail_with_errno("write", path_);
}

HashStream::HashStream() : state_(XXH3_createState()) {
  check_invariant(state_ != nullptr, "no memory for a hash");
  XXH3_128bits_reset(state_.get());
}

void HashStream::add(std::string_view bytes) { XXH3_128bits_update(state_.get(), bytes.data(), bytes.size()); }
std::string HashStream::hex() const { return hash_to_hex(XXH3_128bits_digest(state_.get())); }
void HashStream::Free::operator()(XXH3_state_s* state) const { XXH3_freeState(state); }

void DigestedFile::write(std::string_view bytes) {
  file_.write(bytes);
  hash_.add(bytes);
  size_ += static_cast<int64_t>(bytes.size());
}

FileDigest DigestedFile::finish() {
  file_.sync();
  file_.close();
  return {size_, hash_.hex()};
}

std::string xxh3_hex(std::string_view bytes) { return hash_to_hex(XXH3_128bits(bytes.data(), bytes.size())); }

FileDigest digest_file(const std::string& path) {
  constexpr int64_t kPiece = 1 << 20;
  const File file(path, File::Mode::kRead);
  const int64_t size = file.size();
  std::vector<char> piece(static_cast<size_t>(std::min(kPiece, size)));
  HashStream hash;
  for (int64_t offset = 0; offset < size; offset += kPiece) {
    const int64_t count = std::min(kPiece, size - offset);
    file.read_at(offset, piece.data(), count);
    hash.add({piece.data(), static_cast<size_t>(count)});
  }
  return {size, hash.hex()};
}

std::string read_file(const std::string& path) {
  const File file(path, File::Mode::kRead);
  std::string bytes(static_cast<size_t>(file.size()), '\0');
  file.read_at(0, bytes.data(), static_cast<int64_t>(bytes.size()));
  return bytes;
}

FileDigest write_file(const std::string& path, std::string_view bytes) {
  DigestedFile file(path);
  file.write(bytes);
  return file.finish();
}

void write_file_atomically(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  try {
    write_file(temporary, bytes);
    rename_path(temporary, path);
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
  sync_parent_of(path);
}

void make_folders(const std::string& path) {
  std::error_code failure;
  std::filesystem::create_directories(path, failure);
  if (failure) data_error(fmt::format("cannot create '{}': {}", path, failure.message()));
}

void sync_folder(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) fail_with_errno("open", path);
  const int result = fsync(descriptor);
  const int reason = errno;
  ::close(descriptor);
  errno = reason;
  if (result != 0 && reason != EINVAL) fail_with_errno("write", path);
}

void sync_parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  sync_folder(parent.empty() ? "." : parent);
}

void rename_path(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) fail_with_errno("write", to);
}

RunLock::RunLock(const std::string& folder) : file_(folder + "/.lock", File::Mode::kUpdate) {
  const int descriptor = file_.descriptor();
  if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail_with_errno("lock", file_.path());
    const std::string owner = read_file(file_.path());
    usage_error(fmt::format("'{}' is in use by process {}: wait until it ends, or stop it", folder, owner));
  }
  if (ftruncate(descriptor, 0) != 0) fail_with_errno("write", file_.path());
  file_.write(std::to_string(getpid()));
}

}  // namespace moelab
