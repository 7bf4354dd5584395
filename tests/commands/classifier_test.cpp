// Classifiers through the real program: what check, run, resume and eval say of data that are no text.
#include "tests/commands/commands_support.h"

#include <catch2/catch_test_macros.hpp>

namespace moelab::test {
namespace {

const std::string kVectors = R"(
name = "vectors"
[model]
name = "mlp"
layers = 2
width = 16
[moe]
experts = 4
[moe.router]
name = "expert_choice"
group = "micro"
[moe.capacity]
mode = "factor"
factor = 2.0
scope = "micro"
[moe.expert]
width = 16
[data]
name = "clusters"
features = 5
classes = 3
clusters = 2
validation_vectors = 40
[train]
steps = 6
batch = 8
micro_batches = 2
log_every = 3
[checkpoint]
every = 2
)";

TEST_CASE("check speaks of vectors, classes and rows, and says nothing of causality") {
  const ScratchFolder folder;
  const std::string file = folder.put("exp.toml", kVectors);
  const nlohmann::json report = json_of(moelab_run({"check", file, "--json"}));
  CHECK(report.at("model") == nlohmann::json({{"name", "mlp"}, {"causal", false}}));
  const nlohmann::json& data = report.at("data");
  CHECK((data.at("holds") == "vectors" && data.at("sample") == nlohmann::json({5}) && data.at("classes") == 3));
  CHECK((data.at("vocabulary") == 0 && data.at("train_tokens") == 0 && data.at("validation_sequences") == 40));
  CHECK(data.at("entropy_bits").get<double>() > 0);
  CHECK(report.at("training").at("tokens") == 6 * 8);
  CHECK(report.at("layers").at(0).at("train").at("causal") == false);
  CHECK(report.at("memory_bytes").at("activations_estimate").get<int64_t>() > 0);
  const std::string text = moelab_run({"check", file}).out;
  for (const char* part :
       {"mlp", "clusters: endless training vectors, 40 validation vectors, 3 classes", "bits per vector", "active per vector",
        "6 steps of 8 vectors in 2 micro-batches, 48 vectors in all", "nothing is refused"})
    CHECK(contains(text, part));
  for (const char* part : {"causal", "LOOKS AHEAD", "token"}) CHECK_FALSE(contains(text, part));
}

TEST_CASE("a run of a classifier ends with its accuracy, and has no bits per byte") {
  const ScratchFolder folder;
  const std::string file = folder.put("exp.toml", kVectors);
  const ProgramResult result = moelab_in(folder.path(), {"run", file, "--out", "run"});
  CAPTURE(result.err);
  REQUIRE(result.code == 0);
  for (const char* part : {"validation, 40 vectors, 3 classes:", "knowing the source", "accuracy 0.", "load of each expert",
                           "vectors trained 48", "verdict: "})
    CHECK(contains(result.out, part));
  CHECK_FALSE(contains(result.out, "byte"));
  CHECK(contains(result.err, "bits/vector"));
  CHECK(contains(result.err, "eval at step 6: loss "));
  CHECK_FALSE(contains(result.err, "byte"));
  const nlohmann::json summary = nlohmann::json::parse(text_of(folder / "run/summary.json"));
  CHECK(summary.at("eval.bits_per_byte").is_null());
  CHECK((summary.at("eval.accuracy").get<double>() >= 0 && summary.at("eval.accuracy").get<double>() <= 1));
  CHECK((summary.at("eval.tokens") == 40 && summary.at("tokens") == 48));
  CHECK(summary.at("layer.0.load").size() == 4);
  CHECK(summary.at("baseline.ngram.context_0.bits_per_byte").is_null());
  const nlohmann::json evaluated = json_of(moelab_in(folder.path(), {"eval", "run", "--json"}));
  CHECK(evaluated.at("eval.bits_per_byte").is_null());
  CHECK(evaluated.at("eval.accuracy") == summary.at("eval.accuracy"));
  CHECK(evaluated.at("eval.loss") == summary.at("eval.loss"));
}

TEST_CASE("models are listed with what they read, and a model's options are its own") {
  const nlohmann::json models = json_of(moelab_run({"list", "models", "--json"}));
  std::vector<std::string> names, reads;
  for (const nlohmann::json& model : models) {
    names.push_back(model.at("name"));
    reads.push_back(model.at("facts").at("reads"));
    std::vector<std::string> options;
    for (const nlohmann::json& option : model.at("options")) options.push_back(option.at("name"));
    const auto has = [&](const char* name) { return std::find(options.begin(), options.end(), name) != options.end(); };
    CHECK(has("moe_layers"));
    CHECK(has("context") == model.at("facts").at("causal").get<bool>());
    CHECK(has("patch") == (model.at("name") == "patches"));
    CHECK(has("heads") == (model.at("name") != "mlp"));
  }
  CHECK(names == std::vector<std::string>{"decoder", "mlp", "patches"});
  CHECK(reads == std::vector<std::string>{"tokens", "vectors", "images"});
}

// The options of the base's decoder are dropped with a line, as those of another router are.
TEST_CASE("an experiment that extends a decoder may name another model") {
  const ScratchFolder folder;
  folder.put("base.toml", text_of(MOELAB_SOURCE_DIR "/experiments/base/lm_tiny.toml"));
  const std::string file = folder.put("exp.toml",
                                      "extends = \"base.toml\"\n[model]\nname = \"mlp\"\n[data]\nname = \"clusters\"\n");
  const ProgramResult result = moelab_run({"check", file});
  CAPTURE(result.err);
  CHECK(result.code == 0);
  CHECK(contains(result.err, "'context' was an option of another plugin than [model] now names; it is dropped"));
}

}  // namespace
}  // namespace moelab::test
