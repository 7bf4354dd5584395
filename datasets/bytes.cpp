// The bytes of any text file, or of all files of a folder. A token is one byte, whatever the encoding, or a SentencePiece unit.
//
//   folder   every regular file that is not empty, sorted by relative path, is a document; symbolic links to folders are
//            not followed
//   split    by document: whole documents are held out, chosen by a hash of their relative path, so that neither the
//            machine nor the order of listing matters; by block: the last part of the joined text
//
// Documents of one split are joined without a separator; sequences may cross from one into the next.
#include "core/error.h"
#include "datasets/byte_text.h"

namespace moelab {
namespace {

std::shared_ptr<const Dataset> make_bytes(const DatasetSpec& spec) {
  const std::string& path = spec.options.text("path");
  if (path.empty()) usage_error("data set 'bytes' needs `path`: a text file, or a folder of them");
  const double validation = spec.options.real("validation");
  return make_text_dataset(split_documents(read_documents(path), validation, spec.options.text("split")), spec);
}

OptionSpecs bytes_options() {
  OptionSpecs options{option("path", "", "text file, or folder of text files").as_path(),
                      option("split", "auto", "what is held out: documents, the last block, or documents from 20 of them on")
                          .one_of({"auto", "document", "block"})};
  const OptionSpecs shared = text_options();
  options.insert(options.end(), shared.begin(), shared.end());
  return options;
}

const Registration<DatasetEntry> bytes_registration{{
    .name = "bytes",
    .title = "The bytes of a text file or folder",
    .citation = "the user's own",
    .doc = "One token per byte, or SentencePiece units. "
           "Documents are held out whole where there are 20 or more, else the end of the text is.",
    .options = bytes_options(),
    .make = make_bytes,
}};

}  // namespace
}  // namespace moelab
