// No rows, one expert, all experts, ties, defaults, and what one file's form may vary in.
#include "route_support.h"

#include "core/io/safetensors.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>

using namespace moelab;
using namespace moelab::testing;
using oracle::Arrays;
using oracle::Layer;

namespace {

Layer small_layer() {
  return {.router = "softmax_topk", .capacity = {.mode = "absolute", .value = 3}, .losses = {{"balance", 0.3}, {"z", 0.1}}};
}

Tensor out_of(const RouteRun& run, const std::string& name) {
  INFO(run.err);
  REQUIRE(run.code == 0);
  REQUIRE(run.tensors.count(name) == 1);
  return run.tensors.at(name);
}

}  // namespace

TEST_CASE("route of no rows writes empty plans, losses of 0 and gradients of 0") {
  for (const std::string router : {"noisy_topk", "softmax_topk", "switch", "gshard", "uniform", "random", "frozen"}) {
    Layer layer{.router = router, .capacity = {.mode = "factor"}};
    if (router != "uniform" && router != "random") layer.losses = {{"balance", 0.3}, {"z", 0.1, "sequence"}, {"importance", 0.2}};
    expect_agreement(layer, random_inputs(layer, {.rows = 0, .padding = false, .sequences = false}));
  }
}

TEST_CASE("route of padding alone is route of no rows") {
  Arrays arrays = random_inputs(small_layer());
  std::fill(arrays.at("padding").value.begin(), arrays.at("padding").value.end(), 1.0);
  expect_agreement(small_layer(), arrays);
}

TEST_CASE("route with one expert, and with as many choices as experts") {
  for (const std::string router : {"noisy_topk", "softmax_topk", "switch", "gshard"}) {
    Layer one{.router = router,
              .experts = 1,
              .k = 1,
              .second_expert = "all",
              .losses = {{"load", 0.2}, {"importance", 0.3}, {"balance", 0.1}}};
    expect_agreement(one, random_inputs(one));
  }
  Layer all{.router = "noisy_topk", .experts = 3, .k = 3, .losses = {{"load", 0.2}, {"importance", 0.3}}};
  expect_agreement(all, random_inputs(all));
}

TEST_CASE("route gives ties to the lowest expert and serves the lowest row first") {
  for (const std::string priority : {"position", "batch", "score"}) {
    Layer layer{.router = "softmax_topk", .capacity = {.mode = "absolute", .value = 4, .scope = "micro", .priority = priority}};
    Arrays arrays = random_inputs(layer);
    std::fill(arrays.at("router.weight").value.begin(), arrays.at("router.weight").value.end(), 0.0);
    expect_agreement(layer, arrays);
    const RouteRun run = run_layer(layer, arrays);
    CHECK(integers(out_of(run, "token")) == std::vector<int64_t>{0, 1, 2, 4, 0, 1, 2, 4});
    CHECK(integers(out_of(run, "expert")) == std::vector<int64_t>{0, 0, 0, 0, 1, 1, 1, 1});
  }
}

TEST_CASE("route takes positions from the file, or counts the rows of each sequence") {
  const Layer layer{.router = "uniform", .experts = 4, .k = 1, .train = false};
  Arrays arrays = random_inputs(layer, {.rows = 6, .padding = false, .sequences = false});
  arrays["sequence_ids"] = {{6}, {9, 2, 9, 2, 9, 2}};
  arrays["padding"] = {{6}, {0, 0, 1, 0, 0, 0}};
  CHECK(integers(out_of(run_layer(layer, arrays), "offsets")) == std::vector<int64_t>{0, 2, 4, 5, 5});
  arrays["positions"] = {{6}, {3, 3, 3, 3, 2, 3}};
  CHECK(integers(out_of(run_layer(layer, arrays), "offsets")) == std::vector<int64_t>{0, 0, 0, 1, 5});
}

TEST_CASE("route draws what the file does not give from [route] seed, step and pass, whatever padding lies between") {
  const Layer layer{.router = "random", .experts = 16, .k = 1};
  Arrays arrays = random_inputs(layer, {.rows = 12, .padding = false, .sequences = false});
  arrays.erase("noise");
  const std::vector<int64_t> drawn = integers(out_of(run_layer(layer, arrays), "expert"));
  CHECK(integers(out_of(run_layer(layer, arrays), "expert")) == drawn);
  for (const std::string key : {"seed", "step", "pass"})
    CHECK(integers(out_of(run_layer(layer, arrays, "--set route." + key + "=3 --set route.total_steps=9"), "expert")) != drawn);
  Arrays longer = random_inputs(layer, {.rows = 13, .padding = false, .sequences = false});
  longer.erase("noise");
  longer["experts.w_in"] = arrays["experts.w_in"];
  longer["padding"] = {{13}, std::vector<double>(13, 0.0)};
  longer["padding"].value[0] = 1;
  CHECK(integers(out_of(run_layer(layer, longer), "expert")) == drawn);
}

TEST_CASE("route keeps initial values where the file gives none, and writes every tensor as it stood") {
  Layer layer = small_layer();
  layer.shared_count = 1;
  Arrays arrays = random_inputs(layer);
  for (const std::string name : {"router.weight", "experts.w_in", "shared.w_out"}) arrays.erase(name);
  const RouteRun first = run_layer(layer, arrays), other = run_layer(layer, arrays, "--set route.seed=1");
  CHECK(out_of(first, "router.weight").sizes() == at::IntArrayRef({4, 4}));
  CHECK(numbers(out_of(first, "router.weight")) != numbers(out_of(other, "router.weight")));
  CHECK(numbers(out_of(first, "router.weight")) == numbers(out_of(run_layer(layer, arrays), "router.weight")));
  CHECK(numbers(out_of(first, "experts.w_out")) == arrays.at("experts.w_out").value);
}

TEST_CASE("route takes shared experts with or without their axis of length 1, and answers alike") {
  Layer layer = small_layer();
  layer.shared_count = 2;
  Arrays arrays = random_inputs(layer);
  const RouteRun stacked = run_layer(layer, arrays, "--grad");
  for (const std::string name : {"shared.w_in", "shared.w_out"}) arrays.at(name).shape.erase(arrays.at(name).shape.begin());
  const RouteRun plain = run_layer(layer, arrays, "--grad");
  CHECK(numbers(out_of(plain, "y")) == numbers(out_of(stacked, "y")));
  for (const std::string name : {"shared.w_in", "grad.shared.w_in"}) {
    CHECK(out_of(plain, name).sizes() == at::IntArrayRef({4, 4}));
    CHECK(out_of(stacked, name).sizes() == at::IntArrayRef({1, 4, 4}));
  }
}

TEST_CASE("route reads padding as bool or uint8, and gradients of no row are zeros") {
  const Layer layer = small_layer();
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer));
  std::vector<NamedTensor> tensors = file_tensors(random_inputs(layer));
  for (NamedTensor& named : tensors)
    if (named.name == "padding") named.tensor = named.tensor.to(at::kByte);
  write_safetensors(folder.file("in.safetensors"), tensors);
  const RouteRun run = folder.run("--train --grad");
  CHECK(numbers(out_of(run, "y")) == numbers(out_of(run_layer(layer, random_inputs(layer)), "y")));
  for (const std::string name : {"y", "grad.x", "probe.logits"})
    for (int64_t j = 0; j < 4; ++j) CHECK(numbers(out_of(run, name))[3 * 4 + j] == 0.0);
}

TEST_CASE("route with --end-step writes the router's tensors as they stand afterwards") {
  const Layer layer{.router = "noisy_topk"};
  const RouteRun run = run_layer(layer, random_inputs(layer), "--end-step");
  for (const std::string name : {"router.weight", "router.noise_weight"})
    CHECK(numbers(out_of(run, "after." + name)) == numbers(out_of(run, name)));
}

TEST_CASE("route replaces nothing and leaves nothing when it fails, and replaces a file whole when it succeeds") {
  const Layer layer = small_layer();
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer));
  write_safetensors(folder.file("in.safetensors"), file_tensors(random_inputs(layer)));
  REQUIRE(folder.run("--train").code == 0);
  CHECK(folder.run("--train --grad").tensors.count("grad.x") == 1);
  CHECK(folder.run("--train --set moe.router.k=9").tensors.count("grad.x") == 1);
}

TEST_CASE("route ignores tables that only training needs") {
  const Layer layer = small_layer();
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer) + "[model]\nlayers = 2\n[data]\nname = \"bytes\"\n[train]\nsteps = 5\n");
  write_safetensors(folder.file("in.safetensors"), file_tensors(random_inputs(layer)));
  CHECK(folder.run("--train").code == 0);
}
