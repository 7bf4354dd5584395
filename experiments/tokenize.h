// What `moelab data tokenize` does: the splits of an experiment's data as files of tokens.
#pragma once

#include "core/config.h"
#include "experiments/json.h"

#include <string>

namespace moelab {

// Writes train.bin, validation.bin (16-bit little-endian tokens) and, where one was learned, tokenizer.model into `folder`.
// Returns the [data] table that reads them back to the same batches. Error(kUsage) where the data have no end, or the folder
// has such a file.
Json tokenize(const Table& root, const std::string& folder);

std::string tokenize_text(const Json& table);  // as TOML

}  // namespace moelab
