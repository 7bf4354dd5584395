// A dense model is trained, and a mixture starts from it: every expert a copy of the dense layer, with noise where asked.
#include "tests/commands/commands_support.h"

#include "core/io/checkpoint.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>
#include <map>

namespace moelab::test {
namespace {

const std::string kDenseRun = R"(
[model]
layers = 2
width = 16
heads = 2
context = 8
dense_width = 16
moe_layers = "none"
[data]
name = "markov"
validation_documents = 8
[train]
steps = 30
batch = 8
[optimizer]
lr = 0.01
)";
// Gates of a row sum to 1: a weighted mean of equal outputs.
const std::string kMixtureOfCopies =
    "extends = \"dense.toml\"\n[init]\nfrom = \"dense\"\n[model]\nmoe_layers = \"all\"\n[moe]\nexperts = 4\n"
    "[moe.router]\nk = 2\nrenormalise = \"before_drop\"\n";
const std::string kLikeDense = "[moe.expert]\nwidth = 16\nactivation = \"swiglu\"\n";

std::map<std::string, Tensor> tensors_of_run(const std::string& run) {
  const Checkpoint checkpoint = load_latest(run + "/ckpt");
  std::map<std::string, Tensor> tensors;
  for (const NamedTensor& entry : checkpoint.content.groups.at("model")) tensors[entry.name] = entry.tensor;
  return tensors;
}

class Upcycled {
 public:
  explicit Upcycled(const std::vector<std::string>& dense_settings = {}) {
    folder_.put("dense.toml", kDenseRun);
    folder_.put("mixture.toml", kMixtureOfCopies + kLikeDense);
    folder_.put("identity.toml", kMixtureOfCopies + "[moe.expert]\nname = \"identity\"\n");
    std::vector<std::string> arguments{"run", "dense.toml", "--out", "dense", "--quiet", "--json"};
    arguments.insert(arguments.end(), dense_settings.begin(), dense_settings.end());
    const ProgramResult dense = moelab_in(folder_.path(), arguments);
    REQUIRE(dense.code == 0);
    dense_loss_ = json_of(dense).at("eval.loss");
  }

  ProgramResult run(const std::string& out, const std::vector<std::string>& settings,
                    const std::string& file = "mixture.toml") const {
    std::vector<std::string> arguments{"run", file, "--out", out, "--quiet", "--json"};
    for (const std::string& setting : settings) {
      arguments.emplace_back("--set");
      arguments.push_back(setting);
    }
    return moelab_in(folder_.path(), arguments);
  }

  double loss_of(const std::string& out, const std::vector<std::string>& settings) const {
    const ProgramResult result = run(out, settings);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    return json_of(result).at("eval.loss");
  }

  std::map<std::string, Tensor> tensors(const std::string& out) const { return tensors_of_run(folder_ / out); }
  double dense_loss() const { return dense_loss_; }

 private:
  ScratchFolder folder_;
  double dense_loss_ = 0;
};

double relative_gap(double a, double b) { return std::abs(a - b) / std::abs(b); }

TEST_CASE("a mixture of copies is the dense model until it is trained: every expert its layer, routers as in a fresh run") {
  const Upcycled upcycled;
  CHECK(relative_gap(upcycled.loss_of("copies", {"train.steps=0"}), upcycled.dense_loss()) < 1e-5);
  upcycled.loss_of("fresh", {"train.steps=0", "init.from=\"\""});
  const auto dense = upcycled.tensors("dense"), copies = upcycled.tensors("copies"), fresh = upcycled.tensors("fresh");
  for (const std::string block : {"layers.0.", "layers.1."}) {
    for (const std::string name : {"w_gate", "w_up", "w_down"})
      for (const std::string expert : {"0.", "1.", "2.", "3."})
        CHECK(at::equal(copies.at(block + "moe.experts." + expert + name), dense.at(block + "dense." + name)[0]));
    CHECK(at::equal(copies.at(block + "norm_moe"), dense.at(block + "norm_dense")));
    CHECK(at::equal(copies.at(block + "moe.router.weight"), fresh.at(block + "moe.router.weight")));
  }
  CHECK(at::equal(copies.at("embedding.weight"), dense.at("embedding.weight")));
  CHECK(copies.size() == fresh.size());
}

TEST_CASE("noise sets the copies apart, by its share of each parameter's standard deviation, and they train") {
  const Upcycled upcycled;
  const double start = upcycled.loss_of("noisy", {"train.steps=0", "init.noise=0.3"});
  CHECK(relative_gap(start, upcycled.dense_loss()) > 1e-4);
  const auto dense = upcycled.tensors("dense"), noisy = upcycled.tensors("noisy");
  const Tensor layer = dense.at("layers.1.dense.w_up")[0];
  const Tensor first = noisy.at("layers.1.moe.experts.0.w_up") - layer, last = noisy.at("layers.1.moe.experts.3.w_up") - layer;
  CHECK_FALSE(at::equal(first, last));
  for (const Tensor& noise : {first, last}) {
    const double share = noise.std().item<double>() / layer.std().item<double>();
    CHECK((share > 0.25 && share < 0.35));  // 256 draws: a standard error of 0.013
  }
  CHECK(upcycled.loss_of("trained", {"train.steps=60", "init.noise=0.3"}) < start);
  const auto trained = upcycled.tensors("trained");
  CHECK_FALSE(at::equal(trained.at("layers.1.moe.router.weight"), noisy.at("layers.1.moe.router.weight")));
}

TEST_CASE("blocks that stay dense keep their layer, and experts without parameters like it start as they are") {
  const Upcycled upcycled;
  upcycled.loss_of("half", {"train.steps=0", "model.moe_layers=last"});
  const auto dense = upcycled.tensors("dense"), half = upcycled.tensors("half");
  CHECK(at::equal(half.at("layers.0.dense.w_up"), dense.at("layers.0.dense.w_up")));
  CHECK(at::equal(half.at("layers.1.moe.experts.2.w_up"), dense.at("layers.1.dense.w_up")[0]));
}

TEST_CASE("experts of another width or activation are refused with the place, both layers, and what to set") {
  const Upcycled upcycled;
  const ProgramResult width = upcycled.run("a", {"moe.expert.width=24"});
  CHECK(width.code == 2);
  CHECK(contains(width.err, "mixture.toml:3:1: "));
  CHECK(contains(width.err,
                 "dense: layers.0.dense is ffn activation=\"swiglu\" bias=false of width 16, but expert 0 of layers.0.moe "
                 "is ffn activation=\"swiglu\" bias=false of width 24; experts start as copies where [moe.expert] says "
                 "the same width, activation and bias"));
  CHECK(upcycled.run("b", {"moe.expert.bias=true"}).code == 2);
  const ProgramResult unlike = upcycled.run("c", {}, "identity.toml");
  CHECK(unlike.code == 2);
  CHECK(contains(unlike.err, "and no expert of layers.0.moe (identity) is of that kind"));
  const ProgramResult nowhere = upcycled.run("d", {"model.moe_layers=none", "init.noise=0.1"});
  CHECK(nowhere.code == 2);
  CHECK(contains(nowhere.err, "[init] noise = 0.1 is for experts that start as copies of a dense layer, and "));
}

TEST_CASE("activations whose layers look alike are told apart by the run's config") {
  const Upcycled upcycled({"--set", "model.dense_activation=gelu"});
  const ProgramResult relu = upcycled.run("a", {"moe.expert.activation=relu"});
  CHECK(relu.code == 2);
  CHECK(contains(relu.err, "layers.0.dense is ffn activation=\"gelu\" bias=false of width 16, but expert 0"));
  CHECK(relative_gap(upcycled.loss_of("b", {"train.steps=0", "moe.expert.activation=gelu"}), upcycled.dense_loss()) < 1e-5);
}

}  // namespace
}  // namespace moelab::test
