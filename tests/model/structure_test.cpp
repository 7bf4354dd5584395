// Names, counts, twins, per-layer overrides, and what is refused where.
#include "model_fixture.h"


#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <map>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::ContainsSubstring;

namespace {

const std::string kTwoBlocks = R"(
[model]
layers = 2
width = 8
heads = 2
context = 8
moe_layers = "last"
dense_width = 12
[moe]
experts = 3
[moe.router]
name = "softmax_topk"
k = 2
[moe.expert]
activation = "relu"
width = 5
)";

std::string with_model_key(const std::string& line) {
  std::string text = kTwoBlocks;
  return text.insert(text.find("layers = 2"), line + "\n");
}

std::string with_router(const std::string& router, const std::string& more = "") {
  return "[model]\nlayers = 2\nwidth = 8\nheads = 2\ncontext = 8\n[moe]\nexperts = 3\n[moe.router]\nname = \"" + router + "\"\n" +
         more;
}

// Parameters of the feed-forward parts alone, routers not counted.
int64_t expert_parameters(const Model& model) {
  int64_t count = 0;
  for (const NamedTensor& entry : model.parameters())
    for (const char* part : {".dense.", ".experts.", ".shared."})
      if (entry.name.find(part) != std::string::npos) count += entry.tensor.numel();
  return count;
}

}  // namespace

TEST_CASE("every parameter has its name, block by block from 0") {
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const NamedTensor& entry : model_of(kTwoBlocks)->parameters()) shapes[entry.name] = entry.tensor.sizes().vec();
  std::map<std::string, std::vector<int64_t>> expected{
      {"embedding.weight", {11, 8}},           {"norm.weight", {8}},
      {"layers.0.norm_dense", {8}},            {"layers.1.norm_moe", {8}},
      {"layers.0.dense.w_gate", {1, 12, 8}},   {"layers.0.dense.w_up", {1, 12, 8}},
      {"layers.0.dense.w_down", {1, 8, 12}},   {"layers.1.moe.router.weight", {3, 8}},
      {"layers.1.moe.experts.w_in", {3, 5, 8}}, {"layers.1.moe.experts.w_out", {3, 8, 5}}};
  for (const std::string block : {"layers.0.", "layers.1."}) {
    expected[block + "norm_attention"] = {8};
    for (const std::string name : {"q", "k", "v", "o"}) expected[block + "attention." + name] = {8, 8};
  }
  CHECK(shapes == expected);
}

TEST_CASE("parameters, active parameters and FLOPs are those counted by hand") {
  const auto model = model_of(kTwoBlocks);
  // embedding 11·8, final norm 8; per block 4·64 + 2·8; dense 3·12·8; router 3·8, experts 3·2·5·8
  CHECK(model->parameter_count() == 88 + 8 + 2 * (256 + 16) + 288 + 24 + 240);
  CHECK(model->active_parameters() == 88 + 8 + 2 * (256 + 16) + 288 + 24 + 160);
  // logits 2·11·8; attention 8·64 + 4·8·4.5 mean keys; dense 2·288; router 2·24, two experts 2·2·80
  CHECK(model->flops_per_token() == 176 + 2 * (512 + 144) + 576 + 48 + 320);
}

TEST_CASE("an untied output matrix is one more parameter, and float64 is honoured") {
  const auto model = model_of(with_model_key("tie_embeddings = false\ndtype = \"float64\""));
  CHECK(model->parameter_count() == model_of(kTwoBlocks)->parameter_count() + 88);
  CHECK(parameter_of(*model, "output.weight").scalar_type() == at::kDouble);
}

TEST_CASE("sites are named after their blocks, and moe_layers chooses those") {
  const auto paths = [](const std::string& which) {
    std::string all;
    for (const Site* site : model_of("[model]\nlayers = 4\nwidth = 8\nheads = 2\nmoe_layers = \"" + which + "\"\n")->sites())
      all += site->path + " ";
    return all;
  };
  CHECK(paths("all") == "layers.0.moe layers.1.moe layers.2.moe layers.3.moe ");
  CHECK(paths("none").empty());
  CHECK(paths("odd") == "layers.1.moe layers.3.moe ");
  CHECK(paths("even") == "layers.0.moe layers.2.moe ");
  CHECK(paths("first") == "layers.0.moe ");
  CHECK(paths("last") == "layers.3.moe ");
  CHECK(paths("1, 2") == "layers.1.moe layers.2.moe ");
}

TEST_CASE("a twin has as many parameters as a row uses, or as all experts hold") {
  const std::string shared = "[moe.shared]\ncount = 2\nwidth = 3\n";
  const auto twin = [&](const std::string& kind) { return model_of(with_model_key("twin = \"" + kind + "\"") + shared); };
  const auto routed = model_of(kTwoBlocks + shared), active = twin("dense_active"), total = twin("dense_total");
  CHECK(active->sites().empty());
  CHECK(expert_parameters(*total) == expert_parameters(*routed));
  CHECK(active->parameter_count() == routed->active_parameters() - 24);  // but for the router
  CHECK(parameter_of(*active, "layers.1.dense.w_in").sizes() == at::IntArrayRef({1, 2 * 5 + 2 * 3, 8}));
  CHECK(parameter_of(*total, "layers.1.dense.w_in").sizes() == at::IntArrayRef({1, 3 * 5 + 2 * 3, 8}));
}

TEST_CASE("tables in [[layer]] change the blocks they name, later ones last") {
  const std::string base = "[model]\nlayers = 4\nwidth = 8\nheads = 2\n[moe]\nexperts = 4\n[moe.router]\nk = 2\n";
  const auto model = model_of(base + R"(
[[layer]]
where = "odd"
[layer.moe.router]
k = 3
[[layer.loss]]
name = "z"
[[layer]]
where = [3]
[layer.moe]
experts = 5
[layer.moe.router]
k = 4
)");
  const std::vector<Site*> sites = model->sites();
  const auto k = [&](size_t s) { return sites[s]->router->spec().k(); };
  CHECK((k(0) == 2 && k(1) == 3 && k(2) == 2 && k(3) == 4));
  CHECK((sites[2]->bank->experts() == 4 && sites[3]->bank->experts() == 5));
  CHECK(
      (sites[0]->losses.at(0).label == "balance" && sites[1]->losses.at(0).label == "z" && sites[3]->losses.at(0).label == "z"));
}

TEST_CASE("what does not fit is refused with its place and a remedy") {
  CHECK_THAT(refusal_of("[model]\nwidth = 8\nheads = 3\n"),
             ContainsSubstring("tiny.toml:3:") && ContainsSubstring("width = 8 is not divisible by heads = 3"));
  CHECK_THAT(refusal_of("[model]\nwidth = 6\nheads = 2\n"), ContainsSubstring("tiny.toml:3:") && ContainsSubstring("is odd"));
  CHECK_THAT(refusal_of("[model]\nlayers = 2\nmoe_layers = \"1,2\"\n"),
             ContainsSubstring("there is no block 2") && ContainsSubstring("0 to 1"));
  CHECK_THAT(refusal_of("[model]\nmoe_layers = \"od\"\n"),
             ContainsSubstring("tiny.toml:2:") && ContainsSubstring("'od' names no blocks"));
  CHECK_THAT(refusal_of("[model]\nwidht = 6\n"), ContainsSubstring("did you mean 'width'?"));
  CHECK_THAT(refusal_of("[[layer]]\nwhere = \"all\"\nexperts = 3\n"),
             ContainsSubstring("tiny.toml:3:") && ContainsSubstring("experts"));
  CHECK_THAT(refusal_of("[[layer]]\n[layer.moe]\nexperts = 3\n"), ContainsSubstring("needs `where`"));
  CHECK_THAT(refusal_of("[model]\nmoe_layers = \"odd\"\n[[layer]]\nwhere = \"even\"\n"),
             ContainsSubstring("tiny.toml:4:") && ContainsSubstring("no block with experts"));
}

TEST_CASE("looking ahead is refused where it is written, in training unless allowed") {
  const std::string major = with_router("softmax_topk", "[moe.capacity]\nmode = \"factor\"\norder = \"k_major\"\n");
  const std::string refusal = refusal_of(major);
  CHECK_THAT(refusal, ContainsSubstring("tiny.toml:12:") && ContainsSubstring("layer 0") && ContainsSubstring("'softmax_topk'"));
  CHECK_THAT(refusal, ContainsSubstring("in training") && ContainsSubstring("token_major") &&
                          ContainsSubstring("allow_noncausal_training"));
  const auto allowed = model_of(major, 11, true);
  CHECK_THAT(allowed->training_sees_future().at(1), ContainsSubstring("layers.1.moe: ") && ContainsSubstring("first choice"));
  CHECK_THAT(refusal_of(major + "[moe.capacity.eval]\npriority = \"batch\"\n", true),
             ContainsSubstring("tiny.toml:14:") && ContainsSubstring("in evaluation"));
  CHECK(model_of(with_router("softmax_topk", "[moe.capacity]\nmode = \"factor\"\norder = \"token_major\"\n"))
            ->training_sees_future()
            .empty());
  CHECK(refusal_of(with_router("switch", "[moe.capacity]\nmode = \"paper\"\n")).empty());  // one choice: position order is causal
}
