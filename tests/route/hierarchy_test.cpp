// noisy_topk's hierarchical form (spec/routers.md 2.1) against plain loops.
#include "route_support.h"

#include "core/io/safetensors.h"

#include <catch2/catch_test_macros.hpp>
#include <nlohmann/json.hpp>

using namespace moelab;
using namespace moelab::testing;
using oracle::Layer;
using oracle::LossCase;

namespace {

const std::vector<LossCase> kLosses{
    {"importance", 0.4},
    {"load", 0.3},
    {"load", 0.2, "sequence", {{"threshold", "include_self"}, {"variance", "sample"}}, "include"},
    {"balance", 0.1, "step", {{"counts", "any_choice"}, {"probabilities", "noisy"}}},
    {"entropy", 0.2},
    {"z", 0.05}};

void agree_two_levels(Layer layer, uint64_t seed) {
  layer.router = "noisy_topk";
  layer.losses = kLosses;
  for (const bool train : {true, false}) {
    layer.train = train;
    expect_agreement(layer, random_inputs(layer, {}, seed));
  }
}

struct Form {
  int64_t experts, groups, k_groups, k;
};

}  // namespace

TEST_CASE("route agrees with plain loops for noisy_topk in two levels: of 2 × 3, all groups, whole groups, groups of one") {
  uint64_t seed = 1;
  for (const Form& form :
       {Form{6, 2, 1, 2}, Form{6, 3, 2, 1}, Form{6, 2, 2, 2}, Form{6, 3, 2, 2}, Form{4, 2, 2, 2}, Form{4, 4, 2, 1}})
    agree_two_levels({.experts = form.experts, .k = form.k, .groups = form.groups, .k_groups = form.k_groups}, ++seed);
}

TEST_CASE("route agrees with plain loops for noisy_topk in two levels with drops and each renormalisation") {
  for (const std::string renormalise : {"none", "before_drop", "after_drop"})
    for (const std::string priority : {"position", "batch", "score", "random"})
      agree_two_levels({.experts = 6, .k = 2, .groups = 3, .k_groups = 2, .renormalise = renormalise,
                        .capacity = {.mode = "absolute", .value = 2, .priority = priority}}, 11);
}

TEST_CASE("route agrees with plain loops for noisy_topk in two levels with other noise") {
  for (const std::string kind : {"normal", "jitter", "none"})
    agree_two_levels({.experts = 6, .k = 1, .groups = 2, .k_groups = 1, .noise = kind, .noise_std = 0.8, .noise_epsilon = 0.4},
                     21);
  agree_two_levels({.experts = 6, .k = 1, .groups = 2, .k_groups = 1, .noise_epsilon = 0.05}, 22);
}

TEST_CASE("route tells an outside program the two levels' tensors and draws, and refuses a draw of another shape") {
  Layer layer{.router = "noisy_topk", .experts = 6, .k = 1, .groups = 2, .k_groups = 1};
  oracle::Arrays arrays = random_inputs(layer);
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer));
  std::map<std::string, std::string> shapes;  // "noise" → all shapes that are accepted
  for (const auto& entry : nlohmann::json::parse(folder.run("--signature").out))
    shapes[entry.at("name").get<std::string>()] += entry.at("shape").dump();
  CHECK(shapes.at("noise") == "[\"T\",8]");
  CHECK(shapes.at("router.weight") == "[6,\"D\"]");
  CHECK(shapes.at("router.noise_weight") == "[6,\"D\"]");
  CHECK(shapes.at("router.group_weight") == "[2,\"D\"]");
  CHECK(shapes.at("router.group_noise_weight") == "[2,\"D\"]");
  arrays["noise"] = {{12, 6}, std::vector<double>(72, 0.5)};
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays));
  CHECK(folder.run("--train").code == 2);
}
