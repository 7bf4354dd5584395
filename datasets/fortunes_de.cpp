// German sayings, jokes and quotations: 2,954,694 bytes, the text files of Debian's package fortunes-de 0.35 end to end in the
// order of their names (copyright Andreas Tille, GPL-2+; nothing of it is part of this program).
//
// `moelab data prepare fortunes_de` needs no root: `apt-get download` fetches the package, `dpkg-deb -x` unpacks it in a scratch
// folder, and the text is checked by size and hash and put into the cache whole or not at all.
#include "core/error.h"
#include "core/io/files.h"
#include "datasets/byte_text.h"
#include "datasets/cache.h"
#include "datasets/debian.h"

#include <filesystem>
#include <map>

namespace moelab {
namespace {

CachedFile fortunes_file() {
  return {.name = "data/fortunes_de.txt",
          .size = 2954694,
          .sha256 = "4c37fda0bb4e213bd8edd4fe6546c843c43704b76e3c2284cd049324e100f8da"};
}

// Beside each text lie its index (.dat) and a link to it (.u8).
std::string fortunes_text(const std::string& root) {
  std::map<std::string, std::string> texts;
  for (const auto& entry : std::filesystem::directory_iterator(root + "/usr/share/games/fortunes/de"))
    if (!entry.path().has_extension() && !entry.is_symlink())
      texts[entry.path().filename().string()] = read_file(entry.path().string());
  std::string text;
  for (const auto& [name, words] : texts) text += words;
  return text;
}

std::string prepare_fortunes() {
  const CachedFile file = fortunes_file();
  if (damage_of(file, file.path()).empty()) return "fortunes_de: already prepared, verified: " + file.path();
  const std::string folder = std::filesystem::path(file.path()).parent_path().string();
  make_folders(folder);
  const ScratchFolder scratch(folder);
  unpack_debian_packages("fortunes_de", {"fortunes-de"}, scratch.path());
  const std::string fresh = scratch.path() + "/fortunes_de.txt";
  write_file(fresh, fortunes_text(scratch.path()));
  keep_in_cache(file, fresh);
  return "fortunes_de: prepared, verified: " + file.path();
}

std::string verify_fortunes() {
  const CachedFile file = fortunes_file();
  if (const std::string damage = damage_of(file, file.path()); !damage.empty())
    data_error(file.path() + ": " + damage + "; run `moelab data prepare fortunes_de`");
  return "fortunes_de: " + std::to_string(file.size) + " bytes, SHA-256 " + file.sha256 + ": " + file.path();
}

std::shared_ptr<const Dataset> make_fortunes(const DatasetSpec& spec) {
  verify_fortunes();
  const std::vector<Document> text{{"fortunes_de", read_file(fortunes_file().path())}};
  return make_text_dataset(split_documents(text, spec.options.real("validation"), "block"), spec);
}

const Registration<DatasetEntry> registration_fortunes{{
    .name = "fortunes_de",
    .title = "German sayings, jokes and quotations",
    .citation = "Debian package fortunes-de 0.35 (Andreas Tille and others)",
    .doc = "3.0 MB, one token per byte, or SentencePiece units: another domain for models of English. The end of the text is "
           "held out.",
    .options = text_options(),
    .make = make_fortunes,
    .prepare = prepare_fortunes,
    .verify = verify_fortunes,
}};

}  // namespace
}  // namespace moelab
