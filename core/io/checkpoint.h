// Checkpoints: folders `step-N` that appear whole or not at all, are verified when loaded, and fall back to the previous good
// one. README.md of this folder has the protocol. One process at a time may write below a root (RunLock).
#pragma once

#include "core/io/manifest.h"
#include "core/io/safetensors.h"

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace moelab {

struct CheckpointContent {
  // File stem -> its tensors, in order: "model" is kept in model.safetensors.
  std::map<std::string, std::vector<NamedTensor>> groups;
  // Kept in state.json by json_text(): read numbers that may be non-finite with json_number().
  nlohmann::json state = nlohmann::json::object();
};

struct Checkpoint {
  std::string folder;
  int64_t step = 0;
  CheckpointContent content;
  std::vector<std::string> warnings;  // one line for each newer checkpoint that load_latest() had to skip
};

struct CheckpointFile {
  std::string name;
  FileDigest digest;                 // as the manifest says
  std::string damage;                // "" when the file is as it was written
  std::vector<TensorEntry> tensors;  // of an undamaged safetensors file
};

struct CheckpointSummary {
  int64_t step = 0;
  std::vector<CheckpointFile> files;
};

// Commits `root`/step-`step` and returns that folder, then removes older ones so that `keep_last` >= 1 valid ones remain. On
// failure throws Error(kData) and leaves every earlier checkpoint as it was. A folder of the same step is replaced.
std::string write_checkpoint(const std::string& root, int64_t step, const CheckpointContent& content, int keep_last);

// What write_checkpoint() would have done after `newest` was in its place: a writer may be killed in between.
void tidy_checkpoints(const std::string& root, int64_t newest, int keep_last);

Checkpoint load_checkpoint(const std::string& folder);  // verifies; Error(kData) names the damaged file
Checkpoint load_latest(const std::string& root);        // the newest valid one; Error(kData) when there is none
CheckpointSummary inspect_checkpoint(const std::string& folder);

// The steps of the committed folders below `root`, newest first; nothing is verified.
std::vector<int64_t> checkpoint_steps(const std::string& root);

}  // namespace moelab
