// manifest.json of a checkpoint: which files belong to it, their sizes and hashes. It holds its own hash too, so that any
// changed bit in the folder is noticed.
#pragma once

#include "core/io/files.h"

#include <cstdint>
#include <map>
#include <string>

namespace moelab {

inline constexpr int64_t kManifestSchema = 1;

struct Manifest {
  int64_t step = 0;
  std::map<std::string, FileDigest> files;  // by name in the folder
};

void write_manifest(const std::string& folder, const Manifest& manifest);
Manifest read_manifest(const std::string& folder);  // Error(kData) when missing or damaged

// What is wrong with a file of the manifest, in one line that names it; "" when it is as it was written.
std::string damage_of(const std::string& folder, const std::string& name, const FileDigest& expected);

// Error(kData) for the first file that is not as the manifest says.
void verify_files(const std::string& folder, const Manifest& manifest);

}  // namespace moelab
