// `execution` and `recompute` are refused where nothing reads them, with the line that says so.
#include "core/error.h"
#include "core/moe_layer.h"

#include <catch2/catch_test_macros.hpp>

#include <string>

using namespace moelab;

namespace {

// "" where the layer is read, else the complaint.
std::string complaint_of(const std::string& text) {
  try {
    read_layer(parse_config(text, "exp.toml"), 8, 0, 16, at::kFloat, random_key(1, "init"));
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "";
}

const std::string kMerging = "[moe.router]\nname = \"smear\"\n", kSoft = "[moe.router]\nname = \"soft_moe\"\n";

std::string with_experts(const std::string& name) { return "[moe.expert]\nname = \"" + name + "\"\n"; }

}  // namespace

TEST_CASE("recompute is taken where feed-forward experts run by themselves or beside others") {
  CHECK(complaint_of("[moe]\nrecompute = true\n").empty());
  CHECK(complaint_of("[moe]\nrecompute = true\n" + kSoft).empty());
  CHECK(complaint_of("[moe]\nexperts = 2\nrecompute = true\n[[moe.expert.group]]\nname = \"zero\"\n[[moe.expert.group]]\n")
            .empty());
  CHECK(complaint_of("[moe]\nrecompute = false\nexecution = \"loop\"\n" + with_experts("conv")).empty());
}

TEST_CASE("recompute is refused where no experts read it, and with any execution but auto") {
  for (const char* kind : {"conv", "constant", "identity", "zero", "lora"})
    CHECK(complaint_of("[moe]\nrecompute = true\n" + with_experts(kind)) ==
          "exp.toml:2:1: recompute = true is not read: experts '" + std::string(kind) +
              "' keep no pre-activations that could be made again; remove it");
  const std::string two = "[moe]\nexperts = 2\nrecompute = true\n[[moe.expert.group]]\nname = \"zero\"\n";
  CHECK(
      complaint_of(two + "[[moe.expert.group]]\nname = \"identity\"\n") ==
      "exp.toml:3:1: recompute = true is not read: experts 'zero', 'identity' keep no pre-activations that could be made again; "
      "remove it");
  for (const char* word : {"loop", "grouped", "bmm", "reference"})
    CHECK(complaint_of("[moe]\nexecution = \"" + std::string(word) + "\"\nrecompute = true\n") ==
          "exp.toml:3:1: recompute = true is not read with execution = \"" + std::string(word) + "\"; use \"auto\"");
  CHECK(
      complaint_of("[moe]\nrecompute = true\n" + kMerging) ==
      "exp.toml:2:1: recompute = true is not read: router 'smear' mixes experts, and mixed experts are made again anyway; remove "
      "it");
}

TEST_CASE("a product is refused where experts are mixed: each mixed expert is a product of its own") {
  for (const char* word : {"loop", "grouped", "bmm"}) {
    const std::string line = "[moe]\nexecution = \"" + std::string(word) + "\"\n";
    CHECK(complaint_of(line).empty());
    CHECK(complaint_of(line + kSoft).empty());
    CHECK(complaint_of(line + kMerging) == "exp.toml:2:1: execution = \"" + std::string(word) +
                                               "\" is not read: router 'smear' mixes experts, and a mixed expert has its rows to "
                                               "itself; use \"auto\" or \"reference\"");
  }
  for (const char* word : {"auto", "reference"})
    CHECK(complaint_of("[moe]\nexecution = \"" + std::string(word) + "\"\n" + kMerging).empty());
}
