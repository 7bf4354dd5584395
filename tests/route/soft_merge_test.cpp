// `moelab route` for soft and merge plans against plain loops: plan, output, losses and every gradient.
#include "oracle_mixtures.h"
#include "route_support.h"

#include "core/io/safetensors.h"

#include <ATen/ops/empty.h>
#include <catch2/catch_test_macros.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <set>

using namespace moelab;
using namespace moelab::testing;
using oracle::Arrays;
using oracle::MixtureLayer;

namespace {

std::string mixture_toml(const MixtureLayer& layer) {
  std::string text = fmt::format("[moe]\nexperts = {}\nlosses = \"none\"\n", layer.experts);
  text += fmt::format("[moe.router]\nname = \"{}\"\n", layer.router);
  if (layer.router == "soft_moe")
    text += fmt::format("slots_per_expert = {}\nnormalise = {}\nnormalise_eps = {:.17g}\ndispatch = \"{}\"\ncombine = \"{}\"\n",
                        layer.slots_per_expert, layer.normalise, layer.normalise_eps, layer.dispatch, layer.combine);
  if (layer.router == "lory")
    text += fmt::format("segment_length = {}\nfirst_segment = \"{}\"\neval = \"{}\"\n", layer.segment_length,
                        layer.own_first ? "own_stopgrad" : "uniform", layer.prompt ? "prompt" : "segments");
  if (layer.router == "thor") text += "inference = \"averaged\"\n";
  if (layer.noise_std > 0) text += fmt::format("[moe.noise]\nkind = \"normal\"\nstd = {:.17g}\n", layer.noise_std);
  text += fmt::format("[moe.expert]\nactivation = \"gelu\"\nwidth = {}\nbias = true\n", layer.width);
  if (layer.entropy != 0) text += fmt::format("[[loss]]\nname = \"entropy\"\ncoefficient = {:.17g}\n", layer.entropy);
  return text;
}

class MixtureInputs {
 public:
  MixtureInputs(const MixtureLayer& layer, int64_t rows) : random_(7), rows_(rows) {
    const int64_t experts = layer.experts, slots = experts * layer.slots_per_expert;
    for (const char* name : {"x", "grad_y"}) normal(name, {rows, 4});
    for (const auto& [name, shape] : std::map<std::string, std::vector<int64_t>>{
             {"w_in", {experts, layer.width, 4}}, {"b_in", {experts, layer.width}},
             {"w_out", {experts, 4, layer.width}}, {"b_out", {experts, 4}}})
      normal("experts." + name, shape);
    if (layer.router == "smear" || layer.router == "lory") normal("router.weight", {experts, 4});
    if (layer.router == "soft_moe") normal("router.phi", {slots, 4});
    if (layer.router == "soft_moe") arrays["router.scale"] = {{1}, {1.6}};
    if (layer.noise_std > 0) normal("noise", {rows, slots});
  }

  // Two sequences, interleaved; `padded` rows are none.
  MixtureInputs& interleaved(int64_t every, const std::set<int64_t>& padded) {
    arrays["sequence_ids"] = arrays["padding"] = {{rows_}, std::vector<double>(rows_, 0.0)};
    for (int64_t t = 0; t < rows_; ++t) arrays["sequence_ids"].value[t] = t % every == 1 ? 7 : 40;
    for (const int64_t t : padded) arrays["padding"].value[t] = 1;
    return *this;
  }

  Arrays arrays;

 private:
  void normal(const std::string& name, const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::normal_distribution<double> draw(0, 0.7);
    arrays[name] = {shape, {}};
    for (int64_t i = 0; i < count; ++i) arrays[name].value.push_back(draw(random_));
  }

  std::mt19937_64 random_;
  int64_t rows_;
};

RouteRun run_mixture(const MixtureLayer& layer, const Arrays& arrays, const std::string& more = "--grad") {
  const std::set<std::string> index{"sequence_ids", "segment_ids", "positions"};
  std::vector<NamedTensor> tensors;
  for (const auto& [name, array] : arrays) {
    Tensor tensor = at::empty(array.shape, at::TensorOptions().dtype(at::kDouble));
    std::copy(array.value.begin(), array.value.end(), tensor.mutable_data_ptr<double>());
    tensors.push_back({name, tensor.to(index.count(name) ? at::kLong : name == "padding" ? at::kBool : at::kDouble)});
  }
  const RouteFolder folder;
  folder.write("exp.toml", mixture_toml(layer));
  write_safetensors(folder.file("in.safetensors"), tensors);
  return folder.run(fmt::format("{} {}", layer.train ? "--train" : "--eval", more));
}

std::vector<double> plain_values(const oracle::Mat& rows) {
  std::vector<double> flat;
  for (const oracle::Vec& row : rows)
    for (const oracle::Dual& one : row) flat.push_back(one.v);
  return flat;
}

void check_close(const RouteRun& run, const std::string& name, const std::vector<double>& expected) {
  INFO("tensor " << name);
  REQUIRE(run.tensors.count(name) == 1);
  const std::vector<double> found = numbers(run.tensors.at(name));
  REQUIRE(found.size() == expected.size());
  double difference = 0, largest = 1e-30;
  for (size_t i = 0; i < found.size(); ++i) {
    difference = std::max(difference, std::abs(found[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  CHECK(difference <= 1e-10 * largest);
}

void check_soft(const MixtureLayer& layer, const oracle::MixtureResult& expected, const RouteRun& run) {
  check_close(run, "dispatch", plain_values(expected.dispatch));
  check_close(run, "combine", plain_values(expected.combine));
  std::vector<double> slots;
  for (const oracle::Mat& sequence : expected.slots)
    for (const double value : plain_values(sequence)) slots.push_back(value);
  check_close(run, "slots", slots);
  const auto sequences = static_cast<int64_t>(expected.slots.size());
  CHECK(run.tensors.at("slots").sizes() == at::IntArrayRef({sequences, layer.experts * layer.slots_per_expert, 4}));
}

// Each row's mixture, and the softmax of its logits.
void check_probes(const MixtureLayer& layer, const oracle::MixtureResult& expected, const RouteRun& run) {
  oracle::Mat mixture_of_row(expected.group_of_token.size(), oracle::Vec(layer.experts)), softmax_of_row = mixture_of_row;
  for (size_t t = 0; t < mixture_of_row.size(); ++t) {
    if (expected.group_of_token[t] < 0) continue;
    mixture_of_row[t] = expected.alpha[expected.group_of_token[t]];
    const std::vector<double> logits = numbers(run.tensors.at("probe.logits")[static_cast<int64_t>(t)]);
    double sum = 0;
    for (const double logit : logits) sum += std::exp(logit);
    for (size_t e = 0; e < logits.size(); ++e) softmax_of_row[t][e] = std::exp(logits[e]) / sum;
  }
  check_close(run, "probe.probs", plain_values(mixture_of_row));
  check_close(run, "probe.probs", plain_values(softmax_of_row));
}

void check_merge(const MixtureLayer& layer, const oracle::MixtureResult& expected, const RouteRun& run) {
  check_close(run, "alpha", plain_values(expected.alpha));
  REQUIRE(run.tensors.count("group_of_token") == 1);
  CHECK(integers(run.tensors.at("group_of_token")) == expected.group_of_token);
  if (layer.router == "thor") CHECK(run.tensors.count("probe.logits") == 0);
  else check_probes(layer, expected, run);
  if (layer.entropy != 0) check_close(run, "loss.entropy", {expected.entropy.v});
}

// Whether nothing of the router's learns: neither matrix of a soft plan is a softmax.
bool is_fixed(const MixtureLayer& layer) {
  return layer.router == "soft_moe" && layer.dispatch != "soft" && layer.combine != "soft";
}

void expect_mixture(const MixtureLayer& layer, const Arrays& arrays) {
  INFO(mixture_toml(layer) << (layer.train ? "--train" : "--eval"));
  const RouteRun run = run_mixture(layer, arrays);
  INFO(run.err);
  REQUIRE(run.code == 0);
  const oracle::MixtureResult expected = oracle::evaluate(layer, arrays);
  if (layer.router == "soft_moe") check_soft(layer, expected, run);
  else check_merge(layer, expected, run);
  check_close(run, "y", plain_values(expected.y));
  for (const auto& [name, array] : arrays) {
    if (!name.starts_with("router.") && !name.starts_with("experts.")) continue;
    check_close(run, name, array.value);
    const bool frozen = is_fixed(layer) && name.starts_with("router.");
    const std::vector<double> zeros(array.value.size(), 0.0);
    check_close(run, "grad." + name, frozen ? zeros : oracle::gradient(layer, arrays, name));
  }
  check_close(run, "grad.x", oracle::gradient(layer, arrays, "x"));
}

// Twelve rows with two of padding; the sequences have three and seven rows.
Arrays ragged(const MixtureLayer& layer) { return MixtureInputs(layer, 12).interleaved(3, {3, 7}).arrays; }

}  // namespace

TEST_CASE("route of soft_moe agrees with plain loops: ragged interleaved sequences, padding, both modes, given noise") {
  for (const bool train : {true, false}) {
    for (const double noise : {0.0, 0.4}) {
      const MixtureLayer layer{.slots_per_expert = 2, .normalise_eps = 0.05, .noise_std = noise, .train = train};
      expect_mixture(layer, ragged(layer));
    }
    const MixtureLayer raw{.normalise = false, .train = train};
    expect_mixture(raw, ragged(raw));
  }
}

TEST_CASE("route of soft_moe's ablations agrees with plain loops") {
  for (const std::string dispatch : {"soft", "uniform", "identity"})
    for (const std::string combine : {"soft", "uniform", "identity"}) {
      const MixtureLayer layer{.dispatch = dispatch, .combine = combine};
      expect_mixture(layer, MixtureInputs(layer, 8).interleaved(2, {3, 6}).arrays);  // three rows in each
    }
}

TEST_CASE("route of soft_moe with identity refuses sequences of another length in one line") {
  const MixtureLayer layer{.combine = "identity"};
  const RouteRun run = run_mixture(layer, ragged(layer));
  CHECK(run.code == 2);
  CHECK(run.err.find("identity") != std::string::npos);
  CHECK(std::count(run.err.begin(), run.err.end(), '\n') == 1);
}

TEST_CASE("route of soft_moe gives slots of experts that are not there no weight, and refuses noise of another shape") {
  MixtureLayer layer{.noise_std = 0.4};
  Arrays arrays = ragged(layer);
  arrays["noise"].shape = {9, 4};
  CHECK(run_mixture(layer, arrays).code == 2);
  const MixtureLayer roomy{.experts = 4};
  const RouteRun run = run_mixture(roomy, ragged(roomy), "--grad --set moe.experts=3 --set moe.max_experts=4");
  REQUIRE(run.code == 0);
  for (const char* name : {"dispatch", "combine"}) {
    const Tensor weights_TS = run.tensors.at(name);
    REQUIRE(weights_TS.sizes() == at::IntArrayRef({12, 4}));
    CHECK_FALSE(weights_TS.select(1, 3).any().item<bool>());
    CHECK(weights_TS.select(1, 2).any().item<bool>());
  }
  CHECK_FALSE(run.tensors.at("grad.router.phi")[3].any().item<bool>());
  CHECK_FALSE(run.tensors.at("grad.experts.w_in")[3].any().item<bool>());
}

TEST_CASE("route of lory agrees with plain loops: segments by length, both first segments, both modes, prompts, a loss") {
  for (const bool train : {true, false})
    for (const bool own : {false, true})
      for (const bool prompt : {false, true}) {
        const MixtureLayer layer{.router = "lory", .own_first = own, .prompt = prompt, .entropy = 0.3, .train = train};
        expect_mixture(layer, ragged(layer));
      }
}

TEST_CASE("route of lory takes segment_ids and positions from the file") {
  const MixtureLayer layer{.router = "lory", .segment_length = 3};
  Arrays arrays = ragged(layer);
  arrays["positions"] = {{12}, {0, 2, 1, 9, 3, 4, 5, 9, 6, 7, 8, 11}};
  expect_mixture(layer, arrays);
  arrays["segment_ids"] = {{12}, {5, 1, 5, 0, 1, 8, 8, 0, 8, 30, 3, 30}};
  expect_mixture(layer, arrays);
  arrays["segment_ids"].value[11] = 6;
  const RouteRun run = run_mixture(layer, arrays);
  CHECK(run.code == 2);
  CHECK(run.err.find("segment_ids must rise") != std::string::npos);
}

TEST_CASE("route of smear agrees with plain loops in both modes") {
  for (const bool train : {true, false}) {
    const MixtureLayer layer{.router = "smear", .entropy = 0.2, .train = train};
    expect_mixture(layer, ragged(layer));
  }
}

TEST_CASE("route of thor's evaluation by averaged parameters agrees with plain loops: one group, every weight 1/E") {
  const MixtureLayer layer{.router = "thor", .train = false};
  expect_mixture(layer, ragged(layer));
}

TEST_CASE("route of no rows: empty plans, gradients of 0, for soft and merging routers") {
  for (const std::string router : {"soft_moe", "smear", "lory"}) {
    const MixtureLayer layer{.router = router};
    Arrays arrays = ragged(layer);
    std::fill(arrays.at("padding").value.begin(), arrays.at("padding").value.end(), 1.0);
    const RouteRun run = run_mixture(layer, arrays);
    INFO(router << run.err);
    REQUIRE(run.code == 0);
    for (const char* name : {"y", "grad.x", "grad.experts.w_in"}) CHECK_FALSE(run.tensors.at(name).any().item<bool>());
    if (router == "soft_moe") CHECK(run.tensors.at("slots").sizes() == at::IntArrayRef({0, 3, 4}));
    else CHECK(run.tensors.at("alpha").sizes() == at::IntArrayRef({0, 3}));
  }
}

TEST_CASE("route of lory with --end-step at the end of the warm-up writes the switch") {
  const MixtureLayer layer{.router = "lory"};
  const std::string step = " --set moe.router.warmup_steps=3 --set route.step=2 --set route.total_steps=9";
  const RouteRun run = run_mixture(layer, ragged(layer), "--end-step" + step);
  REQUIRE(run.code == 0);
  CHECK(numbers(run.tensors.at("router.dense")) == std::vector<double>{1});
  CHECK(numbers(run.tensors.at("after.router.dense")) == std::vector<double>{0});
  for (const Tensor& alpha_E : run.tensors.at("alpha").unbind()) CHECK(numbers(alpha_E) == std::vector<double>{1, 0, 0});
}
