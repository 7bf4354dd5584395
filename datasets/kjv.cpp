// The Bible in the King James version: 4,298,239 bytes of text, in lines of at most 79 columns, with book and chapter
// headings and numbered verses. It is what the program `bible` of Debian's package bible-kjv prints of the data in
// bible-kjv-text. The text is in the public domain.
//
// `moelab data prepare kjv` needs no root: `apt-get download` fetches the packages, `dpkg-deb -x` unpacks them in a scratch
// folder, and the unpacked program prints the text, which is checked by size and hash and put into the cache whole or not
// at all. Where the packages are installed, nothing is fetched.
#include "core/error.h"
#include "core/io/files.h"
#include "datasets/byte_text.h"
#include "datasets/cache.h"
#include "datasets/debian.h"
#include "datasets/process.h"

#include <algorithm>
#include <filesystem>
#include <string_view>

#include <dlfcn.h>

namespace moelab {
namespace {

const char* const kKjvSha256 = "82fa5f3788c6a9a010fb128a0f0bf588984b5888a82058520620eded59b033ea";
const char* const kKjvRemedy = "run `moelab data prepare kjv`";
const char* const kKjvPassage = "Genesis1:1-Revelation22:21";

CachedFile kjv_file() { return {.name = "data/kjv.txt", .size = 4298239, .sha256 = kKjvSha256}; }

bool kjv_installed() { return std::filesystem::exists("/usr/bin/bible") && std::filesystem::exists("/usr/lib/bible.data"); }

// The program's one shared library beside the C library; slim systems lack it.
bool readline_installed() {
  void* library = dlopen("libreadline.so.8", RTLD_LAZY | RTLD_LOCAL);
  if (library != nullptr) dlclose(library);
  return library != nullptr;
}

std::vector<std::string> kjv_packages() {
  std::vector<std::string> packages{"bible-kjv", "bible-kjv-text"};
  if (!readline_installed()) packages.push_back("libreadline8");
  return packages;
}

// Libraries of an unpacked package lie in one folder per machine architecture, as in lib/x86_64-linux-gnu.
std::string unpacked_libraries(const std::string& folder) {
  std::string found;
  if (folder.empty()) return found;  // the program is installed, and so are its libraries
  for (const char* parent : {"/lib", "/usr/lib"}) {
    if (!std::filesystem::exists(folder + parent)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(folder + parent)) {
      if (entry.is_directory()) found += (found.empty() ? "" : ":") + entry.path().string();
    }
  }
  return found;
}

// The data path is given as ".", since the program splits its path list at blanks; 79 columns are its default, unless the
// environment says otherwise.
std::string print_kjv(const std::string& root) {
  const ProcessResult result = run_process({"env", "LD_LIBRARY_PATH=" + unpacked_libraries(root), root + "/usr/bin/bible",
                                            "-p", ".", "-l79", kKjvPassage},
                                           root + "/usr/lib");
  if (result.status != 0) data_error("the program `bible` failed: " + last_words(result));
  return result.output;
}

std::string kjv_text(const std::string& scratch) {
  if (kjv_installed()) return print_kjv("");
  unpack_debian_packages("kjv", kjv_packages(), scratch);
  return print_kjv(scratch);
}

std::string prepare_kjv() {
  const CachedFile file = kjv_file();
  if (damage_of(file, file.path()).empty()) return "kjv: already prepared, verified: " + file.path();
  const std::string folder = std::filesystem::path(file.path()).parent_path().string();
  make_folders(folder);
  const ScratchFolder scratch(folder);
  const std::string fresh = scratch.path() + "/kjv.txt";
  write_file(fresh, kjv_text(scratch.path()));
  keep_in_cache(file, fresh);
  return "kjv: prepared, verified: " + file.path();
}

std::string verify_kjv() {
  const CachedFile file = kjv_file();
  const std::string damage = damage_of(file, file.path());
  if (!damage.empty()) data_error(file.path() + ": " + damage + "; " + kKjvRemedy);
  return "kjv: " + std::to_string(file.size) + " bytes, SHA-256 " + file.sha256 + ": " + file.path();
}

// A chapter begins with its heading, the one kind of line between two empty ones that does not begin with a space.
std::vector<Document> kjv_chapters(std::string_view text) {
  std::vector<size_t> begins{0};
  for (size_t blank = text.find("\n\n"); blank != std::string_view::npos; blank = text.find("\n\n", blank + 1)) {
    const std::string_view rest = text.substr(blank + 2);
    const size_t line = std::min(rest.find('\n'), rest.size());
    if (!rest.starts_with(' ') && rest.substr(line, 2) == "\n\n") begins.push_back(blank + 2);
  }
  begins.push_back(text.size());
  std::vector<Document> chapters;
  for (size_t c = 0; c + 1 < begins.size(); ++c)
    chapters.push_back({std::to_string(c), std::string(text.substr(begins[c], begins[c + 1] - begins[c]))});
  return chapters;
}

std::shared_ptr<const Dataset> make_kjv(const DatasetSpec& spec) {
  verify_kjv();
  const std::vector<Document> chapters = kjv_chapters(read_file(kjv_file().path()));
  return make_text_dataset(split_documents(chapters, spec.options.real("validation"), "block"), spec);
}

const Registration<DatasetEntry> kjv_registration{{
    .name = "kjv",
    .title = "The Bible, King James version",
    .citation = "The Holy Bible, Authorized (King James) Version; Debian packages bible-kjv and bible-kjv-text",
    .doc = "4.3 MB, one token per byte, or SentencePiece units. The end of the text is held out; composers take chapters.",
    .options = text_options(),
    .make = make_kjv,
    .prepare = prepare_kjv,
    .verify = verify_kjv,
}};

}  // namespace
}  // namespace moelab
