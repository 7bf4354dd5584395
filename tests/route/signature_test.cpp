// `--signature` of every router: exactly the tensors of contract sections 4 and 5, by name, shape and type.
#include "core/config.h"
#include "core/router.h"
#include "experiments/route_signature.h"

#include <catch2/catch_test_macros.hpp>
#include <fmt/format.h>

#include <map>
#include <set>

using namespace moelab;

namespace {

using Entries = std::multiset<std::string>;  // "name [shape] type"

// Four experts of width 3, two slots each where there are slots.
Entries signature_of(const std::string& router, const std::string& tables = "") {
  const std::string text =
      fmt::format("[moe]\nexperts = 4\n[moe.expert]\nwidth = 3\n[moe.router]\nname = \"{}\"\n{}", router, tables);
  Entries entries;
  for (const auto& entry : route_signature(parse_config(text, "signature.toml"))) {
    CHECK_FALSE(entry.at("meaning").get<std::string>().empty());
    std::string shape;
    for (const auto& size : entry.at("shape"))
      shape += (shape.empty() ? "" : ",") + (size.is_string() ? size.get<std::string>() : size.dump());
    entries.insert(fmt::format("{} [{}] {}", entry.at("name").get<std::string>(), shape, entry.at("dtype").get<std::string>()));
  }
  return entries;
}

// What every layer of these sizes accepts.
Entries common_entries() {
  return {"x [T,D] float32 or float64", "grad_y [T,D] float32 or float64", "token_ids [T] int64",
          "positions [T] int64",        "sequence_ids [T] int64",          "segment_ids [T] int64",
          "domain [T] int64",           "padding [T] bool or uint8",       "noise.capacity [T,4] float32 or float64",
          "experts.w_in [4,3,D] as x",  "experts.w_out [4,D,3] as x"};
}

void has_entries(const std::string& router, const std::string& tables, const Entries& own) {
  Entries expected = common_entries();
  expected.insert(own.begin(), own.end());
  INFO(router << '\n' << tables);
  CHECK(signature_of(router, tables) == expected);
}

const std::string kNormalNoise = "noise [T,4] float32 or float64";

// Of each router with its default options; those that have none may need a vocabulary.
const std::map<std::string, std::pair<std::string, Entries>> kSignatures{
    {"noisy_topk", {"", {"router.weight [4,D] as x", "router.noise_weight [4,D] as x", kNormalNoise}}},
    {"softmax_topk", {"", {"router.weight [4,D] as x"}}},
    {"sigmoid_topk", {"", {"router.weight [4,D] as x", "router.bias [4] as x"}}},
    {"switch", {"", {"router.weight [4,D] as x", "noise [T,D] float32 or float64"}}},
    {"gshard", {"", {"router.weight [4,D] as x", "noise [T] float32 or float64"}}},
    {"vmoe", {"", {"router.weight [4,D] as x", kNormalNoise}}},
    {"base", {"", {"router.weight [4,D] as x", "router.prices [4] as x"}}},
    {"expert_choice", {"", {"router.weight [4,D] as x", "router.thresholds [4] as x", kNormalNoise}}},
    {"hash", {"vocabulary = 9\n", {"router.table [9] int64"}}},
    {"stablemoe",
     {"vocabulary = 9\n",
      {"router.weight [4,D] as x", "router.embedding [9,50] as x", "router.distilled [4,50] as x", "router.stage [1] int64"}}},
    {"soft_moe",
     {"slots_per_expert = 2\n", {"router.phi [8,D] as x", "router.scale [1] as x", "noise [T,8] float32 or float64"}}},
    {"thor", {"", {"noise [1] int64", "noise [T] int64"}}},
    {"lory", {"", {"router.weight [4,D] as x"}}},
    {"smear", {"", {"router.weight [4,D] as x"}}},
    {"top_p", {"", {"router.weight [4,D] as x"}}},
    {"dynmoe",
     {"",
      {"router.weight [4,D] as x", "router.thresholds [4] as x", "router.mask [4] as x", "router.activations [4] int64",
       "router.unrouted [D] as x"}}},
    {"domain", {"", {}}},
    {"uniform", {"", {}}},
    {"random", {"", {"noise [T] int64", "noise [T,1] int64"}}},
    {"frozen", {"", {"router.weight [4,D] as x"}}},
};

}  // namespace

TEST_CASE("--signature of every router lists the contract's tensors and no others") {
  for (const RouterEntry& entry : Registry<RouterEntry>::instance().all()) {
    INFO(entry.name);
    REQUIRE(kSignatures.count(entry.name) == 1);
    const auto& [tables, own] = kSignatures.at(entry.name);
    has_entries(entry.name, tables, own);
  }
}

TEST_CASE("--signature follows the options that change what is read") {
  has_entries("gshard", "second_expert = \"gumbel\"\n", {"router.weight [4,D] as x", kNormalNoise});
  has_entries("gshard", "second_expert = \"all\"\nsecond_expert_eval = \"random_2p\"\n",
              {"router.weight [4,D] as x", "noise [T] float32 or float64"});
  has_entries("base", "shuffle = true\n", {"router.weight [4,D] as x", "router.prices [4] as x", "noise [T] int64"});
  has_entries("base", "[moe.noise]\nkind = \"normal\"\n", {"router.weight [4,D] as x", "router.prices [4] as x", kNormalNoise});
  has_entries("softmax_topk", "[moe.noise]\nkind = \"jitter\"\n",
              {"router.weight [4,D] as x", "noise [T,D] float32 or float64"});
  has_entries("lory", "warmup_steps = 3\n", {"router.weight [4,D] as x", "router.dense [1] as x"});
  has_entries("hash", "vocabulary = 9\nk = 2\n", {"router.table [9,2] int64"});
  has_entries("domain", "hard = false\ndomains = 5\n", {"router.weight [5,4] as x"});
  has_entries("thor", "granularity = \"sequence\"\ninference = \"fixed\"\n", {"noise [sequences] int64"});
  has_entries("thor", "granularity = \"position\"\ninference_granularity = \"position\"\n", {"noise [positions] int64"});
}

TEST_CASE("--signature says the sizes of shared experts, biases and gated units (contract 4)") {
  const Entries entries = signature_of("softmax_topk", "[moe.shared]\ncount = 2\nwidth = 5\ngate = true\n");
  for (const char* shared : {"shared.w_in [1,10,D] as x", "shared.w_out [1,D,10] as x", "shared.gate_weight [1,D] as x"})
    CHECK(entries.count(shared) == 1);
  const std::string text = "[moe]\nexperts = 4\n[moe.expert]\nwidth = 3\nactivation = \"swiglu\"\nbias = true\n";
  std::set<std::string> names;
  for (const auto& entry : route_signature(parse_config(text, "signature.toml")))
    names.insert(entry.at("name").get<std::string>());
  for (const char* name : {"w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"})
    CHECK(names.count(std::string("experts.") + name) == 1);
  CHECK(names.count("experts.w_in") == 0);
}
