// The safetensors format: u64 header length (little endian), JSON header, tensor bytes in C order. Every file is taken as
// hostile: whatever does not add up is Error(kData), one line that names the file and what is wrong.
#pragma once

#include "core/io/files.h"
#include "core/tensor.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace moelab {

using Metadata = std::map<std::string, std::string>;

struct TensorEntry {
  std::string name;
  std::string dtype;  // the format's word: "F32", "BF16", ...
  std::vector<int64_t> shape;
  int64_t offset = 0;  // of the first byte, from the start of the data
  int64_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // in the order of their bytes
  Metadata metadata;
  int64_t data_start = 0;  // offset of the data in the file
};

struct SafetensorsFile {
  std::vector<NamedTensor> tensors;  // on the CPU, each with its own memory
  Metadata metadata;
};

// Tensors in the order given, from any device; the data start on a multiple of 64 bytes. Synced.
FileDigest write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors, const Metadata& metadata = {});

SafetensorsFile read_safetensors(const std::string& path);

// Names, types, shapes and sizes, checked against the file's length; reads no tensor.
SafetensorsHeader read_safetensors_header(const std::string& path);

}  // namespace moelab
