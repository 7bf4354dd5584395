// Text: reading documents, splitting them, and the data set of windows over the two splits, in bytes or in SentencePiece units.
#pragma once

#include "core/dataset.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace moelab {

struct Document {
  std::string name;  // path relative to the folder; decides on which side of a split by document it falls
  std::string bytes;
};

// The file `path`, or every non-empty regular file below the folder `path`, sorted by relative path.
std::vector<Document> read_documents(const std::string& path);

struct ByteSplit {
  std::vector<uint8_t> train;
  std::vector<uint8_t> validation;
  std::vector<int64_t> document_ends = {};  // of the training split, in bytes, rising
};

// Validation gets at most `fraction` of the bytes. "document": documents are taken in the order of a hash of their names
// while they fit; "block": the end of the whole text; "auto": by document from kDocumentsForAuto documents on.
inline constexpr size_t kDocumentsForAuto = 20;
ByteSplit split_documents(const std::vector<Document>& documents, double fraction, const std::string& how);

// Windows of `context` tokens, which are bytes, or what `tokenizer` of text_options() says. Training windows start anywhere in
// the training split, uniformly, unless `composer` says otherwise. Validation windows lie end to end; each begins with the token
// before its first target, the very first with a line feed, as if a line had just ended. Pieces are learned from the training
// split alone. Error(kUsage) when a split is shorter than one window.
std::shared_ptr<const Dataset> make_text_dataset(ByteSplit split, const DatasetSpec& spec);
std::shared_ptr<const Dataset> make_byte_dataset(ByteSplit split, int64_t context, const std::string& composer = "windows");

OptionSpecs text_options();  // of every data set that make_text_dataset makes
OptionSpec validation_option();

}  // namespace moelab
