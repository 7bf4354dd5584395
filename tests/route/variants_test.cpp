// Capacity policies, conventions of the losses, kinds of experts and noise, against plain loops.
#include "route_support.h"

#include "core/io/safetensors.h"

#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::testing;
using oracle::Capacity;
using oracle::Layer;
using oracle::LossCase;

namespace {

void agree_with(const Layer& layer, uint64_t seed = 1) { expect_agreement(layer, random_inputs(layer, {}, seed)); }

}  // namespace

TEST_CASE("route serves first whom the priority and the order of the capacity say") {
  for (const std::string priority : {"position", "batch", "score", "random"})
    agree_with({.router = "softmax_topk", .renormalise = "after_drop",
                .capacity = {.mode = "absolute", .value = 2, .scope = "sequence", .priority = priority}, .train = false}, 2);
  for (const std::string priority : {"position", "batch"})
    agree_with({.router = "softmax_topk", .capacity = {.mode = "absolute", .value = 3, .scope = "micro", .priority = priority,
                                                       .order = "token_major"}}, 3);
  // Noise decides what the largest selected probability is.
  agree_with({.router = "noisy_topk", .capacity = {.mode = "absolute", .value = 2, .priority = "batch"}}, 4);
}

TEST_CASE("route counts the places of an expert as the capacity says") {
  agree_with({.router = "switch", .capacity = {.mode = "factor", .factor = 1.1, .round = "floor", .scope = "micro"}});
  agree_with(
      {.router = "softmax_topk", .k = 3, .capacity = {.mode = "factor", .factor = 0.7, .times_k = true, .round = "round"}});
  agree_with({.router = "softmax_topk", .capacity = {.mode = "factor", .factor = 0.1, .min = 1, .multiple_of = 2}});
  agree_with({.router = "softmax_topk", .capacity = {.mode = "token_fraction", .factor = 0.26, .scope = "global"}});
  agree_with({.router = "softmax_topk", .capacity = {.mode = "absolute", .value = 0}});
}

TEST_CASE("route without a table [moe.capacity.eval] drops nothing in evaluation") {
  Layer layer{.router = "softmax_topk", .capacity = {.mode = "absolute", .value = 1}};
  const oracle::Arrays arrays = random_inputs(layer);
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer));
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays));
  CHECK(folder.run("--train").tensors.at("dropped_token").numel() > 0);
  const RouteRun eval = folder.run("");
  CHECK(eval.tensors.at("dropped_token").numel() == 0);
  CHECK(eval.tensors.at("token").numel() == 20);
}

TEST_CASE("route computes each convention of each loss") {
  const std::vector<LossCase> balances{
      {"balance", 0.1, "step", {{"counts", "first_choice"}}, "first"},
      {"balance", 0.2, "micro", {{"counts", "any_choice"}, {"probabilities", "noisy"}}, "any"},
      {"balance", 0.3, "sequence", {{"counts", "any_choice"}, {"divide_by_k", "true"}}, "divided"},
      {"importance", 0.4, "step", {{"of", "gates"}, {"variance", "sample"}}, "gates"},
      {"importance", 0.5, "sequence", {{"of", "probabilities"}}, "probabilities"},
      {"load", 0.6, "sequence", {{"threshold", "exclude_self"}, {"variance", "sample"}}, "exclude"},
      {"load", 0.7, "step", {{"threshold", "include_self"}}, "include"},
      {"z", 0.8, "sequence", {}, "z_by_sequence"},
      {"entropy", 0.9, "micro"}};
  agree_with({.router = "noisy_topk", .capacity = {.mode = "absolute", .value = 2}, .losses = balances});
  agree_with({.router = "noisy_topk", .losses = balances, .train = false});
  agree_with({.router = "softmax_topk", .noise = "normal", .noise_std = 0.5, .losses = balances});
}

TEST_CASE("route attaches the paper's losses where the file names none") {
  Layer layer{.router = "gshard", .second_expert = "all", .train = false};
  const oracle::Arrays arrays = random_inputs(layer);
  const RouteFolder folder;
  folder.write("exp.toml", "[moe]\nexperts = 4\n[moe.router]\nname = \"gshard\"\n[moe.expert]\nwidth = 3\n");
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays));
  layer.losses = {{"balance", 0.01}};
  const double expected = oracle::evaluate(layer, arrays).loss.at("balance").v;
  const double got = numbers(folder.run("").tensors.at("loss.balance")).at(0);
  CHECK(std::abs(got - expected) < 1e-12);
}

TEST_CASE("route runs every activation, with and without biases, with shared experts and their gate") {
  for (const std::string activation : {"relu", "gelu", "gelu_tanh", "swiglu"}) {
    agree_with({.router = "softmax_topk", .activation = activation, .bias = true, .shared_count = 2, .shared_gate = true});
    agree_with({.router = "softmax_topk", .activation = activation, .shared_count = 1, .train = false});
  }
}

TEST_CASE("route adds the noise that [moe.noise] asks for, in training only") {
  for (const std::string router : {"softmax_topk", "switch", "noisy_topk", "frozen"})
    for (const std::string kind : {"normal", "jitter", "none"}) {
      Layer layer{.router = router, .noise = kind, .noise_std = 0.8, .noise_epsilon = 0.4, .losses = {{"z", 0.2}, {"load", 0.1}}};
      agree_with(layer, 5);
    }
}
