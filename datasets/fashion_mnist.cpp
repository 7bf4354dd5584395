// Fashion-MNIST: grey images of 28 × 28 pixels in 10 classes of clothing, 60,000 to train and 10,000 to validate, the split of
// its authors. Debian's package dataset-fashion-mnist holds the four original files (licence: Expat).
//
// `moelab data prepare fashion_mnist` needs no root: where the package is not installed, `apt-get download` fetches it (31 MB)
// and `dpkg-deb -x` unpacks it in a scratch folder. Each file is checked by size and hash and put into the cache whole or not at
// all.
#include "core/error.h"
#include "core/io/files.h"
#include "datasets/cache.h"
#include "datasets/debian.h"
#include "datasets/idx.h"
#include "datasets/images.h"

#include <filesystem>
#include <vector>

namespace moelab {
namespace {

const char* const kFashionRemedy = "run `moelab data prepare fashion_mnist`";
const char* const kFashionFolder = "/usr/share/datasets/fashion-mnist";  // of the package
constexpr int64_t kFashionClasses = 10;

enum FashionFile { kTrainImages, kTrainLabels, kTestImages, kTestLabels };

const std::vector<CachedFile>& fashion_files() {
  static const std::vector<CachedFile> files{
      {"data/fashion_mnist/train-images-idx3-ubyte.gz", 26421856,
       "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"},
      {"data/fashion_mnist/train-labels-idx1-ubyte.gz", 29491,
       "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"},
      {"data/fashion_mnist/t10k-images-idx3-ubyte.gz", 4422079,
       "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"},
      {"data/fashion_mnist/t10k-labels-idx1-ubyte.gz", 5125, "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"}};
  return files;
}

std::string fashion_cache() { return std::filesystem::path(fashion_files().front().path()).parent_path().string(); }

// "" where all files are there, undamaged.
std::string fashion_damage() {
  for (const CachedFile& file : fashion_files())
    if (const std::string damage = damage_of(file, file.path()); !damage.empty()) return file.path() + ": " + damage;
  return "";
}

std::string file_name(const CachedFile& file) { return std::filesystem::path(file.name).filename().string(); }

std::string prepare_fashion_mnist() {
  if (fashion_damage().empty()) return "fashion_mnist: already prepared, verified: " + fashion_cache();
  make_folders(fashion_cache());
  const ScratchFolder scratch(fashion_cache());
  const bool installed = std::filesystem::exists(kFashionFolder);
  if (!installed) unpack_debian_packages("fashion_mnist", {"dataset-fashion-mnist"}, scratch.path());
  const std::string source = (installed ? "" : scratch.path()) + kFashionFolder;
  for (const CachedFile& file : fashion_files()) {
    const std::string fresh = scratch.path() + "/" + file_name(file);
    write_file(fresh, read_file(source + "/" + file_name(file)));
    keep_in_cache(file, fresh);
  }
  return "fashion_mnist: prepared, verified: " + fashion_cache();
}

std::string verify_fashion_mnist() {
  const std::string damage = fashion_damage();
  if (!damage.empty()) data_error(damage + "; " + kFashionRemedy);
  return "fashion_mnist: 4 files, sizes and SHA-256 as known: " + fashion_cache();
}

LabelledImages read_fashion_images(FashionFile images, FashionFile labels) {
  return {read_idx(fashion_files()[images].path()).unsqueeze(1), read_idx(fashion_files()[labels].path())};
}

std::shared_ptr<const Dataset> make_fashion_mnist(const DatasetSpec&) {
  verify_fashion_mnist();
  return make_image_dataset(read_fashion_images(kTrainImages, kTrainLabels), read_fashion_images(kTestImages, kTestLabels),
                            kFashionClasses);
}

const Registration<DatasetEntry> fashion_mnist_registration{{
    .name = "fashion_mnist",
    .title = "Fashion-MNIST: 28 × 28 grey images of clothing in 10 classes",
    .citation = "Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747; Debian package dataset-fashion-mnist",
    .doc =
        "60000 training images, drawn uniformly for every batch; the authors' 10000 test images are the validation split. Pixels "
        "are scaled to mean 0 and variance 1 over the training split.",
    .holds = DataKind::kImages,
    .make = make_fashion_mnist,
    .prepare = prepare_fashion_mnist,
    .verify = verify_fashion_mnist,
}};

}  // namespace
}  // namespace moelab
