#include "core/io/checkpoint.h"

#include "core/error.h"
#include "core/io/jsonl.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <optional>
#include <system_error>

namespace moelab {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kTemporarySuffix = ".tmp";
constexpr std::string_view kTensorSuffix = ".safetensors";
constexpr const char* kStateFile = "state.json";

std::string step_folder(const std::string& root, int64_t step) { return fmt::format("{}/{}{}", root, kStepPrefix, step); }
std::string temporary_of(const std::string& folder) { return folder + std::string(kTemporarySuffix); }

// "step-120" -> 120; anything else, "step-120.tmp" and "step-007" included, is no checkpoint.
std::optional<int64_t> step_of(const std::string& name) {
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  int64_t step = -1;
  std::from_chars(name.data() + kStepPrefix.size(), name.data() + name.size(), step);
  const bool exact = step >= 0 && name == fmt::format("{}{}", kStepPrefix, step);
  return exact ? std::optional(step) : std::nullopt;
}

std::vector<std::string> names_in(const std::string& root) {
  std::error_code failure;
  std::vector<std::string> names;
  for (fs::directory_iterator entry(root, failure), end; !failure && entry != end; entry.increment(failure)) {
    names.push_back(entry->path().filename().string());
  }
  if (failure) data_error(fmt::format("cannot read '{}': {}", root, failure.message()));
  return names;
}

void remove_folder(const std::string& folder) {
  std::error_code failure;
  fs::remove_all(folder, failure);
  if (failure) data_error(fmt::format("cannot remove '{}': {}", folder, failure.message()));
}

void remove_leftovers(const std::string& root) {
  for (const std::string& name : names_in(root)) {
    if (name.starts_with(kStepPrefix) && name.ends_with(kTemporarySuffix)) remove_folder(root + "/" + name);
  }
}

void write_content(const std::string& folder, int64_t step, const CheckpointContent& content) {
  make_folders(folder);
  Manifest manifest{step, {}};
  for (const auto& [stem, tensors] : content.groups) {
    check_invariant(!stem.empty() && stem.find('/') == std::string::npos, "'" + stem + "' is no file stem");
    const std::string name = stem + std::string(kTensorSuffix);
    manifest.files[name] = write_safetensors(folder + "/" + name, tensors);
  }
  manifest.files[kStateFile] = write_file(folder + "/" + kStateFile, json_text(content.state) + "\n");
  write_manifest(folder, manifest);
  sync_folder(folder);
}

void verify_checkpoint(const std::string& folder) { verify_files(folder, read_manifest(folder)); }

bool is_valid_checkpoint(const std::string& folder) {
  try {
    verify_checkpoint(folder);
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Puts `temporary` in the place of `folder`; what stood there is left under the temporary name.
void exchange_folders(const std::string& temporary, const std::string& folder) {
  if (renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) {
    data_error(fmt::format("cannot write '{}': {}", folder, std::generic_category().message(errno)));
  }
  // Some network file systems cannot exchange: there, and only where a step is written again, a crash between the two
  // renames leaves neither in place.
  const std::string aside = folder + ".replaced" + std::string(kTemporarySuffix);
  rename_path(folder, aside);
  rename_path(temporary, folder);
  remove_folder(aside);
}

void commit_folder(const std::string& temporary, const std::string& folder) {
  std::error_code unknown;
  if (fs::exists(folder, unknown)) {
    exchange_folders(temporary, folder);
  } else {
    rename_path(temporary, folder);
  }
  sync_parent_of(folder);
  remove_folder(temporary);
}

// Renamed first, so that a crash half way leaves a leftover and not a damaged checkpoint.
void discard_checkpoint(const std::string& folder) {
  rename_path(folder, temporary_of(folder));
  remove_folder(temporary_of(folder));
}

// `newest` counts as the first of the kept. Folders of later steps, left from a run that was turned back, are not touched.
void prune_before(const std::string& root, int64_t newest, int keep_last) {
  std::vector<int64_t> older = checkpoint_steps(root);
  std::erase_if(older, [&](int64_t step) { return step >= newest; });
  int kept = 1;
  for (const int64_t step : older) {
    const std::string folder = step_folder(root, step);
    if (kept == keep_last) {
      discard_checkpoint(folder);
    } else if (is_valid_checkpoint(folder)) {
      ++kept;
    }
  }
}

nlohmann::json read_state(const std::string& path) {
  try {
    return nlohmann::json::parse(read_file(path));
  } catch (const nlohmann::json::exception&) {
    data_error(fmt::format("'{}': damaged: not JSON", path));
  }
}

bool holds_tensors(const std::string& name) { return name.ends_with(kTensorSuffix); }

}  // namespace

std::vector<int64_t> checkpoint_steps(const std::string& root) {
  std::vector<int64_t> steps;
  for (const std::string& name : names_in(root)) {
    if (const auto step = step_of(name)) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end(), std::greater<>());
  return steps;
}

std::string write_checkpoint(const std::string& root, int64_t step, const CheckpointContent& content, int keep_last) {
  check_invariant(step >= 0 && keep_last >= 1, "a checkpoint needs step >= 0 and keep_last >= 1");
  make_folders(root);
  remove_leftovers(root);
  const std::string folder = step_folder(root, step);
  const std::string temporary = temporary_of(folder);
  try {
    write_content(temporary, step, content);
    verify_checkpoint(temporary);  // read back before it can replace or outlive anything
    commit_folder(temporary, folder);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
  prune_before(root, step, keep_last);
  return folder;
}

void tidy_checkpoints(const std::string& root, int64_t newest, int keep_last) {
  remove_leftovers(root);
  prune_before(root, newest, keep_last);
}

Checkpoint load_checkpoint(const std::string& folder) {
  const Manifest manifest = read_manifest(folder);
  verify_files(folder, manifest);
  Checkpoint checkpoint{folder, manifest.step, {}, {}};
  for (const auto& [name, digest] : manifest.files) {
    if (!holds_tensors(name)) continue;
    const std::string stem = name.substr(0, name.size() - kTensorSuffix.size());
    checkpoint.content.groups[stem] = read_safetensors(folder + "/" + name).tensors;
  }
  checkpoint.content.state = read_state(folder + "/" + kStateFile);
  return checkpoint;
}

Checkpoint load_latest(const std::string& root) {
  std::vector<std::string> warnings;
  for (const int64_t step : checkpoint_steps(root)) {
    try {
      Checkpoint checkpoint = load_checkpoint(step_folder(root, step));
      checkpoint.warnings = std::move(warnings);
      return checkpoint;
    } catch (const Error& error) {
      warnings.push_back(fmt::format("checkpoint of step {} skipped: {}", step, error.what()));
    }
  }
  if (warnings.empty()) data_error(fmt::format("no checkpoint in '{}'", root));
  data_error(fmt::format("no valid checkpoint in '{}', {} tried; {}", root, warnings.size(), warnings.front()));
}

CheckpointSummary inspect_checkpoint(const std::string& folder) {
  const Manifest manifest = read_manifest(folder);
  CheckpointSummary summary{manifest.step, {}};
  for (const auto& [name, digest] : manifest.files) {
    CheckpointFile file{name, digest, damage_of(folder, name, digest), {}};
    if (file.damage.empty() && holds_tensors(name)) file.tensors = read_safetensors_header(folder + "/" + name).tensors;
    summary.files.push_back(std::move(file));
  }
  return summary;
}

}  // namespace moelab
