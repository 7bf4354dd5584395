// Sentences of contract sections 1 and 5 that no comparison with the oracle states.
#include "route_support.h"

#include "core/io/safetensors.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>

using namespace moelab;
using namespace moelab::testing;
using oracle::Arrays;
using oracle::Layer;

namespace {

RouteRun run_text(const std::string& toml, const Arrays& arrays, const std::string& arguments) {
  const RouteFolder folder;
  folder.write("exp.toml", toml);
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays));
  return folder.run(arguments);
}

int64_t warnings_in(const RouteRun& run) { return std::count(run.err.begin(), run.err.end(), '\n'); }

}  // namespace

TEST_CASE("route without a mode is route --eval, and a scalar is written as [1] (contract 5)") {
  const Layer layer{.router = "vmoe", .losses = {{"z", 0.1}, {"load", 0.2}}, .train = false};
  const Arrays arrays = random_inputs(layer);
  const RouteRun plain = run_text(toml_of(layer), arrays, ""), eval = run_text(toml_of(layer), arrays, "--eval");
  REQUIRE(plain.code == 0);
  CHECK(plain.tensors.size() == eval.tensors.size());
  for (const auto& [name, tensor] : plain.tensors) {
    INFO(name);
    CHECK(tensor.equal(eval.tensors.at(name)));
    CHECK(tensor.dim() > 0);
  }
  CHECK(plain.tensors.at("loss.z").sizes() == at::IntArrayRef({1}));
}

TEST_CASE("route without sequence_ids takes all rows for one sequence (contract 5)") {
  const Layer layer{
      .router = "softmax_topk", .capacity = {.mode = "factor", .factor = 0.7}, .losses = {{"balance", 0.2, "sequence"}}};
  expect_agreement(layer, random_inputs(layer, {.sequences = false}));
}

TEST_CASE("route takes what [moe.capacity.eval] does not say from [moe.capacity] (contract 1)") {
  Layer layer{.router = "softmax_topk",
              .capacity = {.mode = "absolute", .value = 2, .scope = "micro", .priority = "score"},
              .train = false};
  const Arrays arrays = random_inputs(layer);
  std::string text = toml_of(layer);
  const size_t table = text.find("[moe.capacity.eval]");
  text = text.substr(0, table) +
         "[moe.capacity]\nmode = \"absolute\"\nvalue = 9\nscope = \"micro\"\npriority = \"position\"\n" +
         "[moe.capacity.eval]\nvalue = 2\npriority = \"score\"\n";
  expect_agreement(run_text(text, arrays, "--grad"), layer, arrays);
}

TEST_CASE("route with losses = \"none\" or any [[loss]] computes none of the router's own (contract 1)") {
  Layer layer{.router = "dynmoe"};
  expect_agreement(layer, random_inputs(layer));  // none
  layer.losses = {{"z", 0.3}};
  expect_agreement(layer, random_inputs(layer));  // this one alone
  const RouteRun paper = run_text("[moe]\nexperts = 4\n[moe.router]\nname = \"dynmoe\"\n[moe.expert]\nwidth = 3\n",
                                  random_inputs(layer), "--train");
  CHECK((paper.tensors.count("loss.diversity") == 1 && paper.tensors.count("loss.simplicity") == 1));
}

TEST_CASE(
    "route computes Mesh TensorFlow's loss of second choices for gshard, before any policy and any drop (routers.md 1.3)") {
  for (const std::string policy : {"random_2g", "gumbel"}) {
    const Layer layer{
        .router = "gshard",
        .second_expert = policy,
        .capacity = {.mode = "absolute", .value = 2},
        .losses = {{"balance", 0.3, "step", {{"second_place", "0.5"}}},
                   {"balance", 0.2, "sequence", {{"second_place", "0.25"}, {"probabilities", "noisy"}}, "by_sequence"}}};
    expect_agreement(layer, random_inputs(layer));
  }
}

TEST_CASE("route says which ids a router reads where the file lacks them (contract 5)") {
  for (const auto& [router, channel] :
       std::map<std::string, std::string>{{"hash", "token_ids"}, {"stablemoe", "token_ids"}, {"domain", "domain"}}) {
    const Layer layer{.router = router,
                      .options = router == "stablemoe" ? std::map<std::string, std::string>{{"distill_dim", "3"}}
                                                       : std::map<std::string, std::string>{}};
    Arrays arrays = random_inputs(layer);
    arrays.erase(channel);
    const RouteRun run = run_layer(layer, arrays);
    CHECK(run.code == 2);
    CHECK(run.err ==
          "moelab: 'in.safetensors' lacks the tensor '" + channel + "' [T], which the router '" + router + "' reads\n");
    CHECK_FALSE(run.wrote);
  }
}

TEST_CASE("route ignores draws that the mode does not use, of whatever shape and type, with one warning (contract 5)") {
  const Layer eval{.router = "thor", .train = false, .options = {{"inference", "fixed"}}};
  Arrays arrays = random_inputs(eval);
  arrays["noise"] = {{3, 2}, {1, 2, 3, 4, 5, 6}};
  arrays["noise.capacity"] = {{1}, {0.5}};
  const RouteRun run = run_layer(eval, arrays);
  CHECK(run.code == 0);
  CHECK(warnings_in(run) == 1);
  const Layer base{.router = "base", .train = false, .options = {{"shuffle", "true"}}};
  CHECK(warnings_in(run_layer(base, random_inputs(base))) == 1);
  const Layer quiet{.router = "vmoe", .noise = "none"};
  Arrays noisy = random_inputs(quiet);
  noisy["noise"] = {{1}, {0.5}};
  CHECK(warnings_in(run_layer(quiet, noisy)) == 1);
}

TEST_CASE("route refuses draws of a wrong shape or type where they are used, with exit code 2 and one line (contract 5)") {
  const Layer batch{.router = "thor"}, shuffled{.router = "base", .options = {{"shuffle", "true"}}};
  Arrays arrays = random_inputs(batch);  // a draw per row, where one is for all
  RouteRun run = run_layer(batch, arrays);
  CHECK(run.code == 2);
  CHECK(run.err == "moelab: 'in.safetensors': tensor 'noise' has shape [12], wanted [1] = [1]\n");
  arrays = random_inputs(shuffled);
  arrays["noise"].value[0] = arrays["noise"].value[1];
  run = run_layer(shuffled, arrays);
  CHECK(run.code == 2);
  CHECK(run.err == "moelab: 'in.safetensors': tensor 'noise' is not a permutation of 0 … T-1\n");
  arrays["noise"].whole = false;
  run = run_layer(shuffled, arrays);
  CHECK(run.err == "moelab: 'in.safetensors': tensor 'noise' is float64, wanted int64\n");
}

TEST_CASE("route in float32 writes and compares every method in that type (contract 5)") {
  const Layer layer{.router = "dynmoe", .experts = 5, .losses = {{"diversity", 0.2}, {"dynmoe_balance", 0.3}}, .active = 4};
  expect_agreement(layer, random_inputs(layer), at::kFloat);
}
