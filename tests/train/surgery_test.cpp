// The life of experts: each operation on parameters, moments and router rows, by plain copies; permuting back is bitwise nothing.
#include "core/error.h"
#include "experiments/experiment.h"
#include "tests/support/program.h"
#include "tests/train/train_support.h"
#include "trainers/surgery.h"
#include "trainers/trainer.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;

namespace {

// Experts 0-2 are alike, 3 is narrower, 4 and 5 are others.
const char* const kSurgeryLayer = R"(
[model]
layers = 1
width = 8
heads = 2
context = 6
[moe]
experts = 6
[moe.router]
k = 3
[[moe.expert.group]]
width = 4
count = 3
[[moe.expert.group]]
width = 2
[[moe.expert.group]]
name = "constant"
[[moe.expert.group]]
name = "identity"
[data]
name = "markov"
[train]
steps = 4
batch = 4
)";

struct Patient {
  Experiment experiment = load_experiment(parse_config(kSurgeryLayer, "surgery.toml"));
  Optimizer moments{experiment.train.optimizer, experiment.model->parameters()};
  Patient() {
    at::manual_seed(5);
    for (const NamedTensor& entry : moments.state()) entry.tensor.copy_(at::rand_like(entry.tensor));
  }
  Site& site() { return *experiment.model->sites().front(); }
  Optimizer& optimizer() { return moments; }
};

using State = std::map<std::string, Tensor>;

State state_of(Patient& patient) {
  State state;
  for (const auto& list :
       {patient.experiment.model->parameters(), patient.experiment.model->buffers(), patient.optimizer().state()})
    for (const NamedTensor& entry : list) state[entry.name] = entry.tensor.detach().clone();
  return state;
}

const std::string kBank = "layers.0.moe.experts.0-2.", kRouter = "layers.0.moe.router.weight";

void check_slot(const State& now, const std::string& name, int64_t slot, const Tensor& expected) {
  CAPTURE(name, slot);
  CHECK(at::equal(now.at(name)[slot], expected));
}

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

const char* const kMoments[] = {"m.", "v."};

}  // namespace

TEST_CASE("cloning copies one expert; its moments start at zero, or are copied too") {
  Patient patient;
  const State before = state_of(patient);
  for (const bool with_moments : {false, true}) {
    clone_expert(patient.site(), patient.optimizer(), 0, 2, with_moments);
    const State now = state_of(patient);
    for (const char* name : {"w_in", "w_out"}) {
      check_slot(now, kBank + name, 2, before.at(kBank + name)[0]);
      check_slot(now, kBank + name, 1, before.at(kBank + name)[1]);
      for (const std::string moment : kMoments) {
        const Tensor source = before.at(moment + kBank + name)[0];
        REQUIRE(source.count_nonzero().item<int64_t>() > 0);
        check_slot(now, moment + kBank + name, 2, with_moments ? source : at::zeros_like(source));
      }
    }
  }
  CHECK(message_of([&] { clone_expert(patient.site(), patient.optimizer(), 0, 3, false); }).find("differ in kind or shape") !=
        std::string::npos);
}

TEST_CASE("a reset expert is drawn anew, a removed one is zero, and the moments of both are zero") {
  Patient patient;
  const State before = state_of(patient);
  reset_expert(patient.site(), patient.optimizer(), 1, random_key(9, "test"));
  remove_expert(patient.site(), patient.optimizer(), 2);
  remove_expert(patient.site(), patient.optimizer(), 5);  // it has nothing to lose
  const State now = state_of(patient);
  for (const char* name : {"w_in", "w_out"}) {
    CHECK_FALSE(at::equal(now.at(kBank + name)[1], before.at(kBank + name)[1]));
    CHECK(now.at(kBank + name)[1].count_nonzero().item<int64_t>() > 0);
    check_slot(now, kBank + name, 2, at::zeros_like(before.at(kBank + name)[2]));
    check_slot(now, kBank + name, 0, before.at(kBank + name)[0]);
    for (const std::string moment : kMoments)
      for (const int64_t slot : {1, 2})
        check_slot(now, moment + kBank + name, slot, at::zeros_like(before.at(kBank + name)[slot]));
  }
}

TEST_CASE("merging by weights is the weighted sum of parameters and of moments") {
  Patient patient;
  const State before = state_of(patient);
  merge_experts(patient.site(), patient.optimizer(), 1, {0.25, 0.5, 0.25, 0, 0, 0});
  const State now = state_of(patient);
  for (const std::string prefix : {"", "m.", "v."})
    for (const char* name : {"w_in", "w_out"}) {
      const auto was = before.at(prefix + kBank + name).accessor<float, 3>(),
                 is = now.at(prefix + kBank + name).accessor<float, 3>();
      for (int64_t i = 0; i < was.size(1); ++i)
        for (int64_t j = 0; j < was.size(2); ++j) {
          const double sum = 0.25 * was[0][i][j] + 0.5 * was[1][i][j] + 0.25 * was[2][i][j];
          CHECK(std::abs(is[1][i][j] - sum) <=
                1e-6 * (1e-6 + std::abs(was[0][i][j]) + std::abs(was[1][i][j]) + std::abs(was[2][i][j])));
          CHECK(is[0][i][j] == was[0][i][j]);
        }
    }
  const auto refusal = [&](const std::vector<double>& weights) {
    return message_of([&] { merge_experts(patient.site(), patient.optimizer(), 1, weights); });
  };
  CHECK(refusal({1, 1}) == "merge: 2 weights for 6 experts; give one for each");
  CHECK(refusal({-1, 1, 1, 0, 0, 0}) == "merge: expert 0 has weight -1; weights must not be negative");
  CHECK(refusal({1, 1, 0, 0.5, 0, 0}).find("merge: experts 3 and 1") == 0);
}

TEST_CASE("permuting moves parameters, moments and router rows, and back is the identity, bitwise") {
  Patient patient;
  const State before = state_of(patient);
  permute_experts(patient.site(), patient.optimizer(), {2, 0, 1, 3, 4, 5});
  const State there = state_of(patient);
  for (const std::string prefix : {"", "m.", "v."}) {
    check_slot(there, prefix + kBank + "w_in", 0, before.at(prefix + kBank + "w_in")[2]);
    check_slot(there, prefix + kBank + "w_in", 1, before.at(prefix + kBank + "w_in")[0]);
    check_slot(there, prefix + kRouter, 0, before.at(prefix + kRouter)[2]);
    check_slot(there, prefix + kRouter, 4, before.at(prefix + kRouter)[4]);
  }
  permute_experts(patient.site(), patient.optimizer(), {1, 2, 0, 3, 4, 5});
  for (const auto& [name, tensor] : state_of(patient)) {
    CAPTURE(name);
    CHECK(at::equal(tensor, before.at(name)));
  }
  const std::string refused = message_of([&] { permute_experts(patient.site(), patient.optimizer(), {3, 1, 2, 0, 4, 5}); });
  CHECK(refused.find("permute: experts 3 and 0") == 0);
  for (const auto& [name, tensor] : state_of(patient)) CHECK(at::equal(tensor, before.at(name)));
}

TEST_CASE("upcycling copies the dense layer into the experts like it, with noise where asked, and leaves the others") {
  Patient patient;
  ExpertSpec spec = {8, 1, at::kFloat, random_key(3, "dense"), 1, Options(Registry<ExpertEntry>::instance().find("ffn").options)};
  for (const OptionSpec& option : Registry<ExpertEntry>::instance().find("ffn").options)
    if (option.name == "width") spec.options.set(option, int64_t{4});
  const auto dense = make_experts("ffn", spec);
  const State before = state_of(patient);
  CHECK(upcycle(patient.site(), patient.optimizer(), *dense, 0, random_key(1, "noise")) == 3);
  const State exact = state_of(patient);
  for (int64_t slot = 0; slot < 3; ++slot) {
    check_slot(exact, kBank + "w_in", slot, dense->parameters_of(0)[0]);
    check_slot(exact, "m." + kBank + "w_in", slot, at::zeros({4, 8}));
  }
  CHECK(at::equal(exact.at("layers.0.moe.experts.3.w_in"), before.at("layers.0.moe.experts.3.w_in")));
  upcycle(patient.site(), patient.optimizer(), *dense, 0.1, random_key(1, "noise"));
  const State noisy = state_of(patient);
  const Tensor added = noisy.at(kBank + "w_in").sub(exact.at(kBank + "w_in"));
  CHECK_FALSE(at::equal(added[0], added[1]));
  const double share = added.std().item<double>() / dense->parameters_of(0)[0].std().item<double>();
  CHECK((share > 0.07 && share < 0.13));  // 96 draws: a standard error of 0.007
  const auto constant = make_experts("constant", {8, 1, at::kFloat, random_key(3, "dense"), 1, {}});
  CHECK(upcycle(patient.site(), patient.optimizer(), *constant, 0, random_key(1, "noise")) == 1);
  spec.options = Options(Registry<ExpertEntry>::instance().find("ffn").options);
  CHECK(
      message_of([&] { upcycle(patient.site(), patient.optimizer(), *make_experts("ffn", spec), 0, random_key(1, "noise")); }) ==
      "upcycle: no expert of 'layers.0.moe' (ffn + constant + identity) is of the dense layer's kind and shape; give them its "
      "width "
      "and activation");
}

TEST_CASE("a bank of several kinds is saved expert by expert and resumes bitwise") {
  const test::ScratchFolder folder;
  std::map<std::string, Tensor> expected;
  {
    const Experiment e = load_experiment(parse_config(kSurgeryLayer, "surgery.toml"));
    TrainSettings settings = e.train;
    settings.checkpoint_every = 2;
    Trainer(settings, e.model, e.data, single_comm(), folder.path(), {}).run();
    for (const NamedTensor& entry : e.model->parameters()) expected[entry.name] = entry.tensor.detach().clone();
  }
  const Checkpoint checkpoint = load_checkpoint(folder / "step-2");
  std::vector<std::string> names;
  for (const NamedTensor& entry : checkpoint.content.groups.at("model")) names.push_back(entry.name);
  for (const char* name : {"0.w_in", "2.w_out", "3.w_in", "4.v", "4.w_mix"})
    CHECK(std::count(names.begin(), names.end(), std::string("layers.0.moe.experts.") + name) == 1);
  const Experiment e = load_experiment(parse_config(kSurgeryLayer, "surgery.toml"));
  Trainer resumed(e.train, e.model, e.data, single_comm(), "", {});
  resumed.resume(checkpoint);
  resumed.run();
  for (const NamedTensor& entry : resumed.model().parameters()) {
    CAPTURE(entry.name);
    CHECK(at::equal(entry.tensor, expected.at(entry.name)));
  }
}
