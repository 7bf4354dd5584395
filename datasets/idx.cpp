#include "datasets/idx.h"

#include "core/error.h"

#include <ATen/ops/empty.h>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include <zlib.h>

namespace moelab {
namespace {

constexpr uint8_t kUnsignedBytes = 8;
constexpr int64_t kLargestIdx = int64_t{1} << 32;  // bytes; a damaged header asks for more

class GzipReader {
 public:
  explicit GzipReader(const std::string& path) : path_(path), file_(gzopen(path.c_str(), "rbe")) {
    if (file_ == nullptr) fail(errno == 0 ? "out of memory" : std::strerror(errno));
  }
  GzipReader(const GzipReader&) = delete;
  GzipReader& operator=(const GzipReader&) = delete;
  ~GzipReader() { gzclose(file_); }

  // Exactly `count` bytes.
  void read(uint8_t* to, int64_t count) {
    constexpr int64_t piece = int64_t{1} << 30;  // gzread counts in int
    for (int64_t done = 0; done < count;) {
      const int got = gzread(file_, to + done, static_cast<unsigned>(std::min(piece, count - done)));
      if (got < 0) fail(gzip_error());
      if (got == 0) fail(fmt::format("it ends {} bytes too early", count - done));
      done += got;
    }
  }

  void require_end() {
    uint8_t more = 0;
    const int got = gzread(file_, &more, 1);  // checks the sum at the end of a compressed file too
    int code = 0;
    gzerror(file_, &code);
    if (got < 0 || code != Z_OK) fail(gzip_error());
    if (got > 0) fail("it goes on after its last element");
  }

  [[noreturn]] void fail(const std::string& what) const { data_error(fmt::format("{}: {}", path_, what)); }

 private:
  std::string gzip_error() {
    int code = 0;
    const std::string text = gzerror(file_, &code);
    return code == Z_ERRNO ? std::strerror(errno) : "damaged: " + text;
  }

  std::string path_;
  gzFile file_;
};

int64_t big_endian(const uint8_t* bytes) {
  int64_t number = 0;
  for (int i = 0; i < 4; ++i) number = number << 8 | bytes[i];
  return number;
}

std::vector<int64_t> read_dimensions(GzipReader& file) {
  std::array<uint8_t, 4> magic;
  file.read(magic.data(), 4);
  if (magic[0] != 0 || magic[1] != 0 || magic[3] == 0) file.fail("no IDX file: it does not begin with the magic number of one");
  if (magic[2] != kUnsignedBytes) file.fail(fmt::format("elements of type {} instead of unsigned bytes, 8", magic[2]));
  std::vector<int64_t> dimensions;
  int64_t elements = 1;
  for (int d = 0; d < magic[3]; ++d) {
    std::array<uint8_t, 4> bytes;
    file.read(bytes.data(), 4);
    dimensions.push_back(big_endian(bytes.data()));
    elements *= std::max<int64_t>(1, dimensions.back());
    if (elements > kLargestIdx) file.fail("its header asks for more than 4 GiB");
  }
  return dimensions;
}

}  // namespace

Tensor read_idx(const std::string& path) {
  GzipReader file(path);
  const Tensor values = at::empty(read_dimensions(file), at::kByte);
  file.read(values.mutable_data_ptr<uint8_t>(), values.numel());
  file.require_end();
  return values;
}

}  // namespace moelab
