// Bad files: one line that says what, where and what to do; the documented exit code; nothing written.
#include "route_support.h"

#include "core/io/safetensors.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <nlohmann/json.hpp>

using namespace moelab;
using namespace moelab::testing;
using Catch::Matchers::ContainsSubstring;
using oracle::Arrays;
using oracle::Layer;

namespace {

const Layer kPlain{.router = "softmax_topk", .width = 3};

void refused(const Layer& layer, const std::vector<NamedTensor>& tensors, const std::string& arguments, int code,
             const std::string& line) {
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer));
  write_safetensors(folder.file("in.safetensors"), tensors);
  const RouteRun run = folder.run(arguments);
  CHECK(run.err == "moelab: " + line + "\n");
  CHECK(run.code == code);
  CHECK_FALSE(run.wrote);
}

void refused(const Arrays& arrays, const std::string& line, const std::string& arguments = "") {
  refused(kPlain, file_tensors(arrays), arguments, 2, line);
}

Arrays plain_inputs() { return random_inputs(kPlain); }

Arrays with(const std::string& name, oracle::Array array) {
  Arrays arrays = plain_inputs();
  arrays[name] = std::move(array);
  return arrays;
}

Arrays without(const std::string& name) {
  Arrays arrays = plain_inputs();
  arrays.erase(name);
  return arrays;
}

// The plain inputs with one tensor in another type.
std::vector<NamedTensor> retyped(const std::string& name, at::ScalarType type) {
  std::vector<NamedTensor> tensors = file_tensors(plain_inputs());
  for (NamedTensor& named : tensors)
    if (named.name == name) named.tensor = named.tensor.to(type);
  return tensors;
}

std::vector<double> ones(size_t count) { return std::vector<double>(count, 1.0); }

}  // namespace

TEST_CASE("route refuses an unknown tensor and names the nearest") {
  refused(with("router.wieght", {{4, 4}, ones(16)}),
          "'in.safetensors': unknown tensor 'router.wieght', did you mean 'router.weight'?");
  refused(with("experts.w_gate", {{4, 3, 4}, ones(48)}),
          "'in.safetensors': unknown tensor 'experts.w_gate', did you mean 'experts.w_out'?");
}

TEST_CASE("route refuses a wrong shape, naming the tensor, what it is and what it should be") {
  refused(with("router.weight", {{4, 3}, ones(12)}), "'in.safetensors': tensor 'router.weight' has shape [4, 3], wanted [4, 4]");
  refused(with("positions", {{5}, ones(5)}), "'in.safetensors': tensor 'positions' has shape [5], wanted [T] = [12]");
  refused(with("grad_y", {{12, 3}, ones(36)}), "'in.safetensors': tensor 'grad_y' has shape [12, 3], wanted [T, D] = [12, 4]",
          "--grad");
  refused(with("x", {{48}, ones(48)}), "'in.safetensors': tensor 'x' has shape [48], wanted [T, D] with D > 0");
}

TEST_CASE("route refuses noise of a wrong shape where it is used") {
  const Layer noisy{.router = "noisy_topk"};
  Arrays arrays = random_inputs(noisy);
  arrays["noise"] = {{12, 3}, ones(36)};
  refused(noisy, file_tensors(arrays), "--train", 2,
          "'in.safetensors': tensor 'noise' has shape [12, 3], wanted [T, 4] = [12, 4]");
  const Layer gshard{.router = "gshard"};
  arrays = random_inputs(gshard);
  arrays["noise"] = {{5}, ones(5)};
  refused(gshard, file_tensors(arrays), "--train", 2, "'in.safetensors': tensor 'noise' has shape [5], wanted [T] = [12]");
}

TEST_CASE("route refuses types that do not fit") {
  refused(kPlain, retyped("router.weight", at::kFloat), "", 2,
          "'in.safetensors': tensor 'router.weight' is float32, wanted float64 as x");
  refused(kPlain, retyped("sequence_ids", at::kInt), "", 2, "'in.safetensors': tensor 'sequence_ids' is int32, wanted int64");
  refused(kPlain, retyped("x", at::kHalf), "", 2, "'in.safetensors': tensor 'x' is float16, wanted float32 or float64");
  refused(kPlain, retyped("padding", at::kLong), "", 2, "'in.safetensors': tensor 'padding' is int64, wanted bool or uint8");
}

TEST_CASE("route says what is missing") {
  refused(without("x"), "'in.safetensors' lacks the tensor 'x' [T, D], the rows to route");
  refused(without("grad_y"), "'in.safetensors' lacks the tensor 'grad_y' [T, D], which --grad needs", "--grad");
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(kPlain));
  CHECK(folder.run("").code == 5);
  CHECK_THAT(folder.run("").err, ContainsSubstring("in.safetensors"));
  const RouteRun bare = folder.run_bare("exp.toml --out out.safetensors");
  CHECK(bare.code == 2);
  CHECK(bare.err == "moelab: route needs --in IN.safetensors (--signature prints what it may hold)\n");
  CHECK(folder.run_bare("exp.toml --in in.safetensors").err == "moelab: route needs --out OUT.safetensors\n");
}

TEST_CASE("route refuses values that no position has, and a file that is damaged") {
  refused(with("positions", {{12}, std::vector<double>(12, -1.0)}),
          "'in.safetensors': tensor 'positions' holds a value outside 0 … 2147483647");
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(kPlain));
  folder.write("in.safetensors", "short");
  CHECK(folder.run("").code == 5);
}

TEST_CASE("route refuses what the config cannot mean") {
  const RouteFolder folder;
  folder.write("exp.toml", "[moe]\nexperts = 4\n[moe.router]\nk = 9\n");
  write_safetensors(folder.file("in.safetensors"), file_tensors(plain_inputs()));
  RouteRun run = folder.run("");
  CHECK(run.code == 2);
  CHECK(run.err == "moelab: exp.toml:4:1: k = 9 is more than experts = 4\n");
  folder.write("exp.toml", "[route]\nstpe = 1\n");
  run = folder.run("");
  CHECK(run.code == 2);
  CHECK(run.err == "moelab: exp.toml:2:1: unknown key 'stpe' in [route], did you mean 'step'?\n");
  CHECK(folder.run("--train --eval").code == 2);
}

TEST_CASE("route ends with exit code 3 on numbers that are not finite, and writes nothing") {
  Arrays arrays = plain_inputs();
  arrays.at("x").value[5] = std::nan("");
  refused(kPlain, file_tensors(arrays), "", 3, "non-finite x in the router of layer 0 at step 0");
}

TEST_CASE("route ignores noise that the mode does not use, with one warning") {
  const Layer noisy{.router = "noisy_topk"};
  Arrays arrays = random_inputs(noisy);
  arrays["noise.capacity"] = {{12, 4}, ones(48)};
  Layer eval = noisy;
  eval.train = false;
  const RouteRun run = run_layer(eval, arrays);
  CHECK(run.code == 0);
  CHECK(run.err ==
        "moelab: warning: 'in.safetensors': noise and noise.capacity ignored, router 'noisy_topk' draws nothing of the kind in "
        "evaluation mode\n");
  arrays.erase("noise.capacity");
  CHECK(run_layer(noisy, arrays).err.empty());
}

TEST_CASE("route --signature prints the tensors it accepts and computes nothing") {
  const RouteFolder folder;
  Layer layer{.router = "noisy_topk", .width = 3, .bias = true, .shared_count = 2, .shared_gate = true};
  folder.write("exp.toml", toml_of(layer));
  const RouteRun run = folder.run_bare("exp.toml --signature");
  REQUIRE(run.code == 0);
  CHECK_FALSE(run.wrote);
  std::map<std::string, nlohmann::json> shape, dtype;
  for (const auto& entry : nlohmann::json::parse(run.out)) {
    shape[entry.at("name")] = entry.at("shape");
    dtype[entry.at("name")] = entry.at("dtype");
    CHECK_FALSE(entry.at("meaning").get<std::string>().empty());
  }
  CHECK(shape.at("x") == nlohmann::json({"T", "D"}));
  CHECK(shape.at("noise") == nlohmann::json({"T", 4}));
  CHECK(shape.at("noise.capacity") == nlohmann::json({"T", 4}));
  CHECK(shape.at("router.noise_weight") == nlohmann::json({4, "D"}));
  CHECK(shape.at("experts.w_in") == nlohmann::json({4, 3, "D"}));
  CHECK(shape.at("experts.b_out") == nlohmann::json({4, "D"}));
  CHECK(shape.at("shared.gate_weight") == nlohmann::json({1, "D"}));
  CHECK(dtype.at("token_ids") == "int64");
  CHECK(dtype.at("router.weight") == "as x");
}

// The contract lists a table's keys and allows them all; run and check are stricter.
TEST_CASE("route tells of values that nobody reads, and goes on") {
  Layer layer = kPlain;
  layer.capacity = {.mode = "none", .factor = 1.5};
  const RouteRun run = run_layer(layer, random_inputs(layer), "");
  CHECK(run.code == 0);
  CHECK(run.wrote);
  CHECK_THAT(run.err, ContainsSubstring("'factor' is not read with mode = \"none\""));
}
