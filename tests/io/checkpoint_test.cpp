#include "core/io/checkpoint.h"

#include "core/io/jsonl.h"
#include "io_support.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <catch2/catch_test_macros.hpp>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

using namespace moelab;
using namespace moelab::io_test;

namespace {

// Everything in it tells the step, so that a mixture of two checkpoints would show.
CheckpointContent content_at(int64_t step, int64_t elements = 40) {
  CheckpointContent content;
  const auto value = static_cast<double>(step);
  content.groups["model"] = {{"layers.0.w", at::full({elements}, value, at::kFloat)}, {"n", at::full({}, step, at::kLong)}};
  content.groups["optimizer"] = {{"layers.0.w.m", at::full({elements}, value, at::kDouble)}};
  content.state = {{"step", step}, {"seed", 18446744073709551615ULL}, {"loss", 0.1}};
  return content;
}

void check_is_whole(const Checkpoint& loaded, int64_t elements = 40) {
  const CheckpointContent expected = content_at(loaded.step, elements);
  CHECK(loaded.content.state == expected.state);
  REQUIRE(loaded.content.groups.size() == expected.groups.size());
  for (const auto& [stem, tensors] : expected.groups) {
    const std::vector<NamedTensor>& back = loaded.content.groups.at(stem);
    REQUIRE(back.size() == tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      CHECK(back[i].name == tensors[i].name);
      CHECK(at::equal(back[i].tensor, tensors[i].tensor));
    }
  }
}

int64_t newest_step(const std::string& root) {
  const std::vector<int64_t> steps = checkpoint_steps(root);
  return steps.empty() ? -1 : steps.front();
}

void damage_file(const std::string& path) { put_bytes(path, with_flipped_bit(bytes_of(path), 8 * 100)); }

const std::vector<std::string> kFileNames{"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"};

std::vector<std::string> entries_of(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

TEST_CASE("a checkpoint comes back whole and holds exactly its files") {
  const TempFolder root;
  const std::string folder = write_checkpoint(root.path(), 120, content_at(120), 1);
  CHECK(folder == root / "step-120");
  CHECK(entries_of(folder) == kFileNames);
  const Checkpoint loaded = load_checkpoint(folder);
  CHECK(loaded.step == 120);
  check_is_whole(loaded);
}

TEST_CASE("a state with non-finite numbers comes back by json_number") {
  const TempFolder root;
  CheckpointContent content = content_at(1);
  content.state["best"] = std::numeric_limits<double>::infinity();
  const Checkpoint loaded = load_checkpoint(write_checkpoint(root.path(), 1, content, 1));
  CHECK(json_number(loaded.content.state["best"]) == std::numeric_limits<double>::infinity());
}

TEST_CASE("a hundred single bit flips in each file are all noticed, and the file is named") {
  const TempFolder root;
  const std::string folder = write_checkpoint(root.path(), 3, content_at(3), 1);
  std::mt19937 draw(11);
  for (const std::string& name : kFileNames) {
    const std::string path = folder + "/" + name;
    const std::string bytes = bytes_of(path);
    for (int i = 0; i < 100; ++i) {
      put_bytes(path, with_flipped_bit(bytes, draw() % (8 * bytes.size())));
      const std::string error = error_of([&] { load_checkpoint(folder); });
      CHECK(contains(error, "5: '" + path + "': damaged"));
    }
    put_bytes(path, bytes);
  }
  check_is_whole(load_checkpoint(folder));
}

TEST_CASE("every file cut short, lengthened or missing is noticed and named") {
  const TempFolder root;
  const std::string folder = write_checkpoint(root.path(), 3, content_at(3), 1);
  for (const std::string& name : kFileNames) {
    const std::string path = folder + "/" + name;
    const std::string bytes = bytes_of(path);
    for (size_t size = 0; size + 1 < bytes.size(); size += 1 + bytes.size() / 50) {
      put_bytes(path, bytes.substr(0, size));
      CHECK(contains(error_of([&] { load_checkpoint(folder); }), "5: '" + path + "': damaged"));
    }
    put_bytes(path, bytes + "x");
    CHECK(contains(error_of([&] { load_checkpoint(folder); }), "5: '" + path + "': damaged"));
    std::filesystem::remove(path);
    CHECK(error_of([&] { load_checkpoint(folder); }) == "5: cannot read '" + path + "': No such file or directory");
    put_bytes(path, bytes);
  }
}

TEST_CASE("a manifest cannot point out of its folder, and one of another schema is refused") {
  const TempFolder root;
  write_manifest(root.path(), Manifest{1, {{"../other", {}}}});
  CHECK(contains(error_of([&] { load_checkpoint(root.path()); }), "file name '../other' leaves the folder"));
  nlohmann::json other{{"schema", 2}};
  other["xxh3"] = xxh3_hex(other.dump());
  put_bytes(root / "manifest.json", other.dump());
  CHECK(contains(error_of([&] { load_checkpoint(root.path()); }), "schema 2, this program reads 1"));
}

TEST_CASE("the newest valid checkpoint is loaded, with one warning for each one skipped") {
  const TempFolder root;
  for (const int64_t step : {2, 9, 10, 11}) write_checkpoint(root.path(), step, content_at(step), 9);
  CHECK(load_latest(root.path()).step == 11);
  damage_file(root / "step-11/model.safetensors");
  std::filesystem::remove(root / "step-10/manifest.json");
  const Checkpoint loaded = load_latest(root.path());
  CHECK(loaded.step == 9);
  check_is_whole(loaded);
  REQUIRE(loaded.warnings.size() == 2);
  CHECK(loaded.warnings[0].starts_with("checkpoint of step 11 skipped: '" + (root / "step-11/model.safetensors") + "': "));
  CHECK(contains(loaded.warnings[1], "checkpoint of step 10 skipped: "));
}

TEST_CASE("no valid checkpoint is a data error that tells why") {
  const TempFolder root;
  CHECK(error_of([&] { load_latest(root.path()); }) == "5: no checkpoint in '" + root.path() + "'");
  CHECK(contains(error_of([&] { load_latest(root / "none"); }), "5: cannot read '" + (root / "none")));
  write_checkpoint(root.path(), 1, content_at(1), 1);
  put_bytes(root / "step-1/state.json", "{}");
  const std::string error = error_of([&] { load_latest(root.path()); });
  CHECK(contains(error, "5: no valid checkpoint in '" + root.path() + "', 1 tried"));
  CHECK(contains(error, "state.json"));
}

TEST_CASE("only the last ones are kept") {
  const TempFolder root;
  for (int64_t step = 1; step <= 12; ++step) write_checkpoint(root.path(), step, content_at(step), 3);
  CHECK(entries_of(root.path()) == std::vector<std::string>{"step-10", "step-11", "step-12"});
}

TEST_CASE("a damaged checkpoint does not count among the kept") {
  const TempFolder root;
  write_checkpoint(root.path(), 1, content_at(1), 2);
  write_checkpoint(root.path(), 2, content_at(2), 2);
  damage_file(root / "step-2/model.safetensors");
  write_checkpoint(root.path(), 3, content_at(3), 2);
  CHECK(checkpoint_steps(root.path()) == std::vector<int64_t>{3, 2, 1});
  write_checkpoint(root.path(), 4, content_at(4), 2);
  CHECK(checkpoint_steps(root.path()) == std::vector<int64_t>{4, 3});
}

TEST_CASE("the one just written is kept even when folders of later steps are there") {
  const TempFolder root;
  write_checkpoint(root.path(), 9, content_at(9), 1);
  write_checkpoint(root.path(), 4, content_at(4), 1);
  CHECK(checkpoint_steps(root.path()) == std::vector<int64_t>{9, 4});
}

TEST_CASE("a step written again replaces its folder, damaged or not") {
  const TempFolder root;
  write_checkpoint(root.path(), 5, content_at(4), 1);
  write_checkpoint(root.path(), 5, content_at(5), 1);
  check_is_whole(load_latest(root.path()));
  damage_file(root / "step-5/model.safetensors");
  write_checkpoint(root.path(), 5, content_at(5), 1);
  check_is_whole(load_latest(root.path()));
  CHECK(entries_of(root.path()) == std::vector<std::string>{"step-5"});
}

TEST_CASE("leftovers of a killed write are ignored by loading and removed by the next write") {
  const TempFolder root;
  write_checkpoint(root.path(), 1, content_at(1), 2);
  make_folders(root / "step-7.tmp");
  put_bytes(root / "step-7.tmp/model.safetensors", "half");
  make_folders(root / "step-007");
  CHECK(load_latest(root.path()).step == 1);
  write_checkpoint(root.path(), 2, content_at(2), 2);
  CHECK(entries_of(root.path()) == std::vector<std::string>{"step-007", "step-1", "step-2"});
}

TEST_CASE("what a writer killed after its commit did not remove is removed by tidying") {
  const TempFolder root;
  for (int64_t step = 1; step <= 4; ++step) write_checkpoint(root.path(), step, content_at(step), 4);
  make_folders(root / "step-2.tmp");
  tidy_checkpoints(root.path(), 3, 2);
  CHECK(entries_of(root.path()) == std::vector<std::string>{"step-2", "step-3", "step-4"});
}

TEST_CASE("a write that the disk cuts off names the path and leaves the earlier checkpoint alone") {
  const TempFolder root;
  write_checkpoint(root.path(), 1, content_at(1), 1);
  const CheckpointContent large = content_at(2, 100'000);
  const std::string error = error_in_child([&] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{200'000, 200'000};
    setrlimit(RLIMIT_FSIZE, &limit);
    write_checkpoint(root.path(), 2, large, 1);
  });
  CHECK(error == "5: cannot write '" + (root / "step-2.tmp/model.safetensors") + "': File too large");
  CHECK(entries_of(root.path()) == std::vector<std::string>{"step-1"});
  check_is_whole(load_latest(root.path()));
}

TEST_CASE("a root that cannot be a folder is a data error with its path") {
  const TempFolder root;
  put_bytes(root / "plain", "");
  const std::string error = error_of([&] { write_checkpoint(root / "plain/ckpt", 1, content_at(1), 1); });
  CHECK(contains(error, "5: cannot create '" + (root / "plain/ckpt")));
}

TEST_CASE("a writer killed at any moment leaves a whole checkpoint to load") {
  const TempFolder root;
  write_checkpoint(root.path(), 0, content_at(0, 20'000), 1);
  for (int kill_number = 0; kill_number < 12; ++kill_number) {
    const int64_t first = load_latest(root.path()).step + 1;
    const pid_t writer = fork();
    if (writer == 0) {
      error_of([&] {
        for (int64_t step = first;; ++step) write_checkpoint(root.path(), step, content_at(step, 20'000), 1);
      });
      _exit(1);
    }
    while (newest_step(root.path()) < first && waitpid(writer, nullptr, WNOHANG) == 0) usleep(500);
    usleep(static_cast<useconds_t>(700 * kill_number));
    kill(writer, SIGKILL);
    int status = 0;
    waitpid(writer, &status, 0);
    CHECK(WIFSIGNALED(status));
    const Checkpoint loaded = load_latest(root.path());
    CHECK(loaded.step >= first);
    CHECK(loaded.warnings.empty());
    check_is_whole(loaded, 20'000);
  }
}

TEST_CASE("inspecting lists the files, their tensors and their damage") {
  const TempFolder root;
  const std::string folder = write_checkpoint(root.path(), 6, content_at(6), 1);
  damage_file(folder + "/optimizer.safetensors");
  const CheckpointSummary summary = inspect_checkpoint(folder);
  CHECK(summary.step == 6);
  REQUIRE(summary.files.size() == 3);
  CHECK(summary.files[0].name == "model.safetensors");
  CHECK(summary.files[0].damage.empty());
  REQUIRE(summary.files[0].tensors.size() == 2);
  CHECK(summary.files[0].tensors[0].name == "layers.0.w");
  CHECK(summary.files[0].tensors[0].bytes == 160);
  CHECK(contains(summary.files[1].damage, "optimizer.safetensors': damaged: its hash differs"));
  CHECK(summary.files[1].tensors.empty());
  CHECK(summary.files[2].digest.size == static_cast<int64_t>(bytes_of(folder + "/state.json").size()));
}
