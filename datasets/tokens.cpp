// Files of tokens: unsigned 16-bit numbers, little-endian, one after the other, nothing else. `moelab data tokenize` writes them,
// and so do other programs.
//
//   path              one file, or every *.bin below a folder, in the order of their relative paths, as one row of tokens
//   split             the last part of that row is held out, or the files of `validation_path` are
//   vocabulary        every token has to be below it; 0 = one more than the largest token
//   bytes_per_token   of the text behind the validation tokens; without it there are no bits per byte
//
// Files are mapped, not read into memory; at the start each token is looked at once.
#include "core/error.h"
#include "core/io/files.h"
#include "datasets/byte_text.h"
#include "datasets/token_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>

#include <sys/mman.h>

namespace moelab {
namespace {

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little, "token files are mapped as they are");

// The whole file, readable as long as this lives.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) : file_(path, File::Mode::kRead), size_(static_cast<size_t>(file_.size())) {
    if (size_ == 0) data_error(path + ": the file is empty; name a file with tokens");
    if (size_ % 2 != 0)
      data_error(fmt::format("{}: its {} bytes are no whole number of 16-bit tokens; is it cut off?", path, size_));
    place_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_.descriptor(), 0);
    if (place_ == MAP_FAILED) data_error(fmt::format("{}: cannot map the file: {}", path, std::strerror(errno)));
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() {
    if (place_ != MAP_FAILED) munmap(place_, size_);
  }

  const std::string& path() const { return file_.path(); }
  std::span<const uint16_t> tokens() const { return {static_cast<const uint16_t*>(place_), size_ / 2}; }

 private:
  File file_;
  size_t size_;
  void* place_ = MAP_FAILED;
};

std::vector<std::string> token_files(const std::string& path, const char* option) {
  std::error_code failure;
  if (!fs::exists(path, failure)) data_error(fmt::format("{}: no such file or folder; check `{}`", path, option));
  if (!fs::is_directory(path, failure)) return {path};
  std::vector<std::string> files;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(path))
    if (entry.is_regular_file() && entry.path().extension() == ".bin") files.push_back(entry.path().string());
  if (files.empty()) data_error(fmt::format("{}: no file *.bin below this folder; check `{}`", path, option));
  std::sort(files.begin(), files.end());
  return files;
}

// Maps the files, and refuses a token that is not below `vocabulary`; 0 = any is fine.
TokenStream map_tokens(const std::string& path, const char* option, int64_t vocabulary) {
  TokenStream stream;
  for (const std::string& name : token_files(path, option)) {
    const auto file = std::make_shared<const MappedFile>(name);
    const std::span<const uint16_t> tokens = file->tokens();
    const auto too_large = [vocabulary](uint16_t token) { return vocabulary > 0 && token >= vocabulary; };
    const auto wrong = std::ranges::find_if(tokens, too_large);
    if (wrong != tokens.end())
      data_error(fmt::format("{}: token {} at byte {} is not below `vocabulary` = {}", name, *wrong,
                             2 * (wrong - tokens.begin()), vocabulary));
    stream.append(TokenStream(tokens, file));
  }
  return stream;
}

int64_t tokens_seen(const TokenStream& stream) {
  int64_t seen = 0;
  stream.each_block([&](std::span<const int64_t> block) { seen = std::max(seen, 1 + *std::ranges::max_element(block)); });
  return seen;
}

std::shared_ptr<const Dataset> make_tokens(const DatasetSpec& spec) {
  const Options& options = spec.options;
  const std::string &path = options.text("path"), &held_out = options.text("validation_path");
  if (path.empty()) usage_error("data set 'tokens' needs `path`: a file of 16-bit tokens, or a folder of *.bin");
  TokenData data;
  data.vocabulary = options.integer("vocabulary");
  data.train = map_tokens(path, "path", data.vocabulary);
  if (held_out.empty()) {
    const int64_t room = std::llround(options.real("validation") * static_cast<double>(data.train.size()));
    data.validation = data.train.part(data.train.size() - room, room);
    data.train = data.train.part(0, data.train.size() - room);
  } else {
    data.validation = map_tokens(held_out, "validation_path", data.vocabulary);
  }
  if (data.vocabulary == 0) data.vocabulary = std::max(tokens_seen(data.train), tokens_seen(data.validation));
  data.start = options.integer("start_token");
  if (data.start >= data.vocabulary)
    usage_error(fmt::format("`start_token` = {} is not below the vocabulary of {}", data.start, data.vocabulary));
  if (data.start < 0 && data.train.size() > 0) data.start = data.train.at(data.train.size() - 1);
  if (options.real("bytes_per_token") > 0) data.bytes_per_token = options.real("bytes_per_token");
  return make_token_dataset(std::move(data), spec.context);
}

const Registration<DatasetEntry> tokens_registration{{
    .name = "tokens",
    .title = "Files of 16-bit tokens",
    .citation = "the user's own",
    .doc = "Little-endian, nothing else in them, mapped into memory. The end is held out, or other files are.",
    .options = {option("path", "", "token file, or folder of *.bin").as_path(),
                validation_option(),
                option("validation_path", "", "token file or folder to hold out, instead of the end of `path`").as_path(),
                option("vocabulary", 0, "tokens are below it; 0 = one more than the largest").between(0, 65536),
                option("bytes_per_token", 0.0, "mean bytes of text of a validation token, for bits per byte; 0 = unknown")
                    .at_least(0),
                option("start_token", -1, "stands before the first validation token; -1 = the last training token")
                    .between(-1, 65535)},
    .make = make_tokens,
}};

}  // namespace
}  // namespace moelab
