// Blocks with several routed places: adapters on a frozen base, and attention whose heads are experts.
#include "model_fixture.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>
#include <torch/csrc/autograd/function.h>

#include <set>

using namespace moelab;
using namespace moelab::test;

namespace {

const std::string kPlacesModel =
    "[model]\nlayers = 2\nwidth = 8\nheads = 2\ncontext = 10\nmoe_layers = \"none\"\ndense_width = 12\n"
    "dtype = \"float64\"\n";

std::string with_adapters(const std::string& expert, const std::string& more = "") {
  return kPlacesModel + "[adapters]\nexperts = 3\n[adapters.router]\nk = 2\n[adapters.expert]\nrank = 2\n" + expert + "\n" + more;
}

std::string with_heads(const std::string& style, const std::string& router = "k = 2\nrenormalise = \"before_drop\"",
                       int64_t experts = 3) {
  return kPlacesModel + "[attention]\nexperts = " + std::to_string(experts) + "\n[attention.router]\n" + router +
         "\n[attention.expert]\nstyle = \"" + style + "\"\n";
}

std::vector<std::string> all_places() {
  return {with_adapters("targets = \"ffn\""),
          with_adapters("targets = \"all\""),
          with_adapters("targets = \"attention.q, attention.o, dense.w_down\"\ndecision = \"layer\""),
          with_heads("moa"),
          with_heads("moh"),
          with_heads("switchhead"),
          with_adapters("targets = \"ffn, attention.q, attention.v\""),
          with_heads("moa", "name = \"top_p\"\np = 0.6"),
          with_heads("moh", "name = \"top_p\"\np = 0.6"),
          with_heads("switchhead", "name = \"top_p\"\np = 0.6")};
}

// Heads that are full drop rows, and some rows have none: two places per sequence for each of three heads.
const std::string kFullHeads =
    "[attention.capacity]\nmode = \"absolute\"\nvalue = 2\norder = \"token_major\"\n[attention.capacity.eval]\nvalue = 2\n";

bool has_node(const torch::autograd::Node* node, const std::string& name) {
  std::vector<const torch::autograd::Node*> open{node};
  std::set<const torch::autograd::Node*> seen;
  while (!open.empty()) {
    const torch::autograd::Node* next = open.back();
    open.pop_back();
    if (!next || !seen.insert(next).second) continue;
    if (next->name().find(name) != std::string::npos) return true;
    for (const torch::autograd::Edge& edge : next->next_edges()) open.push_back(edge.function.get());
  }
  return false;
}

Tensor dense_logits(const Model& adapted, const Batch& batch) {
  const auto dense = model_of(kPlacesModel);
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : dense->parameters()) entry.tensor.copy_(parameter_of(adapted, entry.name));
  return logits_of(*dense, batch, context_of(Mode::kEval));
}

std::vector<std::string> site_paths(const Model& model) {
  std::vector<std::string> paths;
  for (const Site* site : model.sites()) paths.push_back(site->path);
  return paths;
}

}  // namespace

TEST_CASE("sites of a block are named in the order of the forward pass, and a layer may override their tables") {
  CHECK(
      site_paths(*model_of(with_adapters("targets = \"attention.v, dense.w_up\"",
                                         "[[layer]]\nwhere = \"last\"\n[layer.adapters]\nexperts = 5\n"))) ==
      std::vector<std::string>{"layers.0.adapters.v", "layers.0.adapters.w_up", "layers.1.adapters.v", "layers.1.adapters.w_up"});
  const auto model = model_of(with_adapters("decision = \"layer\"\ntargets = \"attention\"",
                                            "[[layer]]\nwhere = \"1\"\n[layer.adapters]\nexperts = 5\n"));
  CHECK(site_paths(*model) == std::vector<std::string>{"layers.0.adapters.block", "layers.1.adapters.block"});
  CHECK(parameter_of(*model, "layers.0.adapters.block.experts.q_a").sizes() == at::IntArrayRef{3, 2, 8});
  CHECK(parameter_of(*model, "layers.1.adapters.block.experts.o_b").sizes() == at::IntArrayRef{5, 8, 2});
  const std::string both = with_heads("switchhead") + "[moe]\nexperts = 2\n[moe.router]\nk = 1\n";
  CHECK(site_paths(*model_of(both, 11)) ==  // moe_layers = "none" still says where [moe] is
        std::vector<std::string>{"layers.0.attention.value0", "layers.0.attention.value1", "layers.0.attention.output0",
                                 "layers.0.attention.output1", "layers.1.attention.value0", "layers.1.attention.value1",
                                 "layers.1.attention.output0", "layers.1.attention.output1"});
}

TEST_CASE("adapters leave the base as it was: bitwise its logits at the start, no gradient, nothing of it in the optimiser") {
  for (const std::string expert : {"targets = \"ffn\"", "targets = \"all\"", "targets = \"all\"\ndecision = \"layer\""}) {
    const auto model = model_of(with_adapters(expert));
    const Batch batch = random_batch(2, 9);
    CHECK(at::equal(logits_of(*model, batch, context_of(Mode::kEval)), dense_logits(*model, batch)));
    shake(*model);
    CHECK_FALSE(at::allclose(logits_of(*model, batch, context_of(Mode::kEval)), dense_logits(*model, batch)));
    loss_and_gradients(*model, batch, context_of(Mode::kTrain));
    for (const NamedTensor& entry : model->parameters()) {
      CAPTURE(entry.name);
      const bool adapter = entry.name.find(".adapters.") != std::string::npos;
      CHECK(entry.tensor.requires_grad() == adapter);
      CHECK(entry.tensor.grad().defined() == adapter);
    }
    for (const NamedTensor& entry : model->optimised()) CHECK(entry.name.find(".adapters.") != std::string::npos);
    CHECK(model->optimised().size() == model->trainable().size());
  }
}

TEST_CASE("every place: decoding with caches equals the full forward, however the text is cut into calls") {
  for (const std::string& text : all_places()) {
    CAPTURE(text);
    const auto model = model_of(text);
    shake(*model);
    const Batch batch = random_batch(2, 10);
    const Tensor full_BLV = logits_of(*model, batch, context_of(Mode::kEval));
    for (const std::vector<int64_t>& calls : {std::vector<int64_t>{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {4, 1, 5}}) {
      DecodeState state;
      for (const int64_t length : calls) {
        const Tensor logits_BV = model->decode(batch.tokens_BL.narrow(1, state.position, length), state);
        CHECK(relative_error(logits_BV, full_BLV.select(1, state.position - 1)) < 1e-10);
      }
    }
  }
}

TEST_CASE("every place: padding changes no logit of a real token, and later tokens none of earlier ones") {
  std::vector<std::string> texts = all_places();
  for (const char* style : {"moa", "moh", "switchhead"}) texts.push_back(with_heads(style) + kFullHeads);
  for (const std::string& text : texts) {
    CAPTURE(text);
    const auto model = model_of(text);
    shake(*model);
    Batch padded = random_batch(3, 8);
    padded.length_B = at::tensor({8, 5, 2}, at::kLong);
    const Tensor logits_BLV = logits_of(*model, padded, context_of(Mode::kEval));
    for (int64_t b = 0; b < 3; ++b) {
      const int64_t length = padded.length_B[b].item<int64_t>();
      Batch alone;
      alone.tokens_BL = padded.tokens_BL.narrow(0, b, 1).narrow(1, 0, length);
      CHECK(relative_error(logits_BLV[b].narrow(0, 0, length), logits_of(*model, alone, context_of(Mode::kEval))[0]) < 1e-10);
    }
  }
}

TEST_CASE("heads that are full leave rows without any") {
  for (const char* style : {"moa", "moh", "switchhead"}) {
    const ModelOutput out = model_of(with_heads(style) + kFullHeads)->forward(random_batch(2, 8), context_of(Mode::kEval));
    for (const SiteResult& site : out.sites) CHECK(site.record.left_behind > 0);
  }
}

TEST_CASE("every place: `execution` says which products are made, and none changes the logits") {
  std::vector<std::string> texts = all_places();
  for (const char* style : {"moa", "moh", "switchhead"}) texts.push_back(with_heads(style, "k = 2", 6));  // few of many
  for (const std::string& text : texts) {
    const Batch batch = random_batch(2, 9);
    const auto logits = [&](const std::string& execution) {
      const size_t table = text.find("experts = ");
      const auto model = model_of(text.substr(0, table) + "execution = \"" + execution + "\"\n" + text.substr(table));
      shake(*model);
      return model->forward(batch, context_of(Mode::kEval)).logits_BLV;
    };
    const Tensor reference = logits("reference");
    CAPTURE(text);
    CHECK_FALSE(has_node(reference.grad_fn().get(), "GroupedLinear"));
    for (const char* execution : {"auto", "loop", "grouped", "bmm"}) {
      CAPTURE(execution);
      const Tensor others = logits(execution);
      CHECK(relative_error(others.detach(), reference.detach()) < 1e-10);
      const bool heads = text.find("[attention]") != std::string::npos, few = text.find("experts = 6") != std::string::npos;
      const bool moh = text.find("style = \"moh\"") != std::string::npos;
      const bool whole = std::string(execution) == "auto" && (moh || (heads && !few));
      CHECK(has_node(others.grad_fn().get(), "GroupedLinear") == !whole);
    }
  }
}

TEST_CASE("every place: recomputation gives the same loss and gradients, and a replayed selection the same logits") {
  for (const std::string& text : all_places()) {
    CAPTURE(text);
    const auto model = model_of(text + "[[loss]]\nname = \"balance\"\n");
    shake(*model);
    const Batch batch = random_batch(2, 7);
    StepContext context = context_of(Mode::kTrain);
    const double loss = loss_and_gradients(*model, batch, context);
    std::vector<Tensor> gradients;
    for (const NamedTensor& entry : model->trainable()) gradients.push_back(entry.tensor.grad());
    context.recompute = true;
    CHECK(loss_and_gradients(*model, batch, context) == loss);
    const std::vector<NamedTensor> again = model->trainable();
    for (size_t i = 0; i < again.size(); ++i) {
      CAPTURE(again[i].name);
      CHECK(at::equal(again[i].tensor.grad(), gradients[i]));
    }
    context = context_of(Mode::kEval);
    std::vector<Assignment> chosen;
    for (const SiteResult& site : model->forward(batch, context).sites) chosen.push_back(site.assignment);
    const Tensor logits_BLV = logits_of(*model, batch, context);
    shake(*model, 2);
    context.forced = &chosen;
    const ModelOutput out = model->forward(batch, context);
    REQUIRE(out.sites.size() == chosen.size());
    for (size_t s = 0; s < chosen.size(); ++s) CHECK(at::equal(out.sites[s].assignment.choice_TK, chosen[s].choice_TK));
    CHECK_FALSE(at::allclose(out.logits_BLV, logits_BLV));
  }
}

TEST_CASE("a classifier of patches sees all patches through routed heads, whose mask may say so") {
  const auto model = model_for({DataKind::kImages, 3, {1, 4, 4}}, R"(
[model]
name = "patches"
layers = 1
width = 8
heads = 2
patch = 2
moe_layers = "none"
dtype = "float64"
[attention]
experts = 3
[attention.router]
k = 2
[attention.expert]
mask = "full"
)");
  shake(*model);
  at::manual_seed(1);
  Batch batch;
  batch.values = at::rand({2, 1, 4, 4});
  batch.targets_BL = at::zeros({2, 1}, at::kLong);
  const Tensor before = logits_of(*model, batch, context_of(Mode::kEval));
  batch.values[0][0][3][3] += 1.0;  // the last patch of the first image
  const Tensor after = logits_of(*model, batch, context_of(Mode::kEval));
  CHECK_FALSE(at::allclose(after[0], before[0]));
  CHECK(at::equal(after[1], before[1]));
}

TEST_CASE("dropout of adapters is refused where it is written, unless rows are drawn one by one") {
  const auto refusal = [](const std::string& adapters, const std::string& expert) {
    return refusal_of(kPlacesModel + "[adapters]\nexperts = 3\n" + adapters + "[adapters.expert]\ndropout = 0.1\n" + expert);
  };
  const std::string place = "tiny.toml:", reason = "dropout is drawn per row of the layer";
  for (const std::string& table : {std::string("execution = \"loop\"\n"), std::string("[adapters.router]\nname = \"lory\"\n")}) {
    const std::string message = refusal(table, "");
    CAPTURE(message);
    CHECK(message.find(place) == 0);
    CHECK(message.find(reason) != std::string::npos);
  }
  CHECK(refusal("", "").empty());
  CHECK(refusal("execution = \"loop\"\n", "targets = \"all\"\ndecision = \"layer\"\n").empty());
}

TEST_CASE("places that do not fit are refused where they are written") {
  const auto expect = [](const std::string& text, const std::string& part) {
    CAPTURE(text, part);
    CHECK(refusal_of(text).find(part) != std::string::npos);
  };
  expect(with_adapters("targets = \"attention.x\""),
         "tiny.toml:15:1: 'attention.x' names no linear map of a block; it has attention.q");
  expect(with_adapters("targets = \"ffn\"\nwidth = 8"), "'width' is the base's, which is the model's own layer");
  expect(kPlacesModel + "[adapters.router]\nname = \"smear\"\n[adapters.expert]\ntargets = \"all\"\ndecision = \"layer\"\n",
         "looks ahead");
  expect(with_adapters("", "[[adapters.expert.group]]\nname = \"ffn\"\n"), "they cannot be mixed with others");
  expect(kPlacesModel + "[attention.router]\nname = \"soft_moe\"\n", "router 'soft_moe' cannot use these experts");
  expect(kPlacesModel + "[attention]\nlayers = \"7\"\n", "there is no block 7");
  expect(with_heads("moa") + "[adapters]\n", "adapters are laid on blocks without them");
  expect(with_heads("moa") + "mask = \"full\"\n", "tiny.toml:16:1: layer 0: mask = \"full\" shows every token the later ones");
  expect(with_heads("moa") + "head_size = 3\n",
         "tiny.toml:16:1: [attention.expert] head_size = 3 is odd, but rotary positions turn pairs");
  expect(with_heads("moa") + "shared_heads = 2\n", "'shared_heads' is not read with style = \"moa\"");
  expect(kPlacesModel + "[attention]\nrecompute = true\n", "experts 'attention_head' keep no pre-activations");
  expect(kPlacesModel + "[adapters]\nrecompute = true\n", "experts 'lora' keep no pre-activations");
  expect(with_adapters("targets = \"ffn, dense\""), "ffn adapts dense.w_gate already");
  expect(with_adapters("targets = \"ffn, attention.q\"\ndecision = \"layer\""), "one decision serves linear maps alone");
  expect(with_adapters("targets = \"head\""), "'head' names no linear map of a block");
  expect(kPlacesModel + "[adapters.expert]\nname = \"ffn\"\n",
         "experts 'ffn' stand in for a feed-forward layer: describe them in [moe]");
  expect("[model]\nwidth = 8\n[moe.expert]\nname = \"lora\"\n",
         "experts 'lora' are laid on the linear maps of dense blocks: describe them in [adapters]");
  expect("[model]\nwidth = 8\n[moe.expert]\nname = \"attention_head\"\n", "describe them in [attention]");
  expect("[model]\nwidth = 8\n[attention.expert]\nname = \"ffn\"\n", "[attention] takes attention_head");
  expect("[model]\nwidth = 8\ntwin = \"dense_total\"\n[attention]\n", "only feed-forward experts have a dense twin");
}
