// Tiny experiments and what the tests of training compare.
#pragma once

#include "core/error.h"
#include "experiments/experiment.h"
#include "trainers/state.h"
#include "trainers/trainer.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

#include <map>
#include <string>
#include <vector>

namespace moelab::test {

using Tensors = std::map<std::string, Tensor>;

// Two blocks of width 16 with four experts, two of them chosen where the router leaves that open, on generated data; `more` is
// laid on top as `--set` does.
inline Experiment tiny_experiment(const std::string& router, std::vector<std::string> more = {}, const std::string& losses = "") {
  const bool has_k = Options(Registry<RouterEntry>::instance().find(router).options).declared("k");
  const std::string text = fmt::format(R"(
seed = 3
[model]
layers = 2
width = 16
heads = 2
context = 12
[moe]
experts = 4
[moe.router]
name = "{}"
{}
[moe.expert]
width = 8
[data]
name = "markov"
validation_documents = 6
[train]
steps = 12
batch = 4
log_every = 4
[optimizer]
lr = 0.01
{})", router, has_k ? "k = 2" : "", losses);
  return load_experiment(parse_config(text, "tiny.toml", more));
}

// The same for a classifier: "patches" on sixteen-pixel images that the tests make (test_images.cpp), or "mlp" on clusters.
inline Experiment tiny_classifier(const std::string& model, const std::string& router, std::vector<std::string> more = {},
                                  const std::string& losses = "") {
  const bool images = model == "patches";
  const std::string text = fmt::format(R"(
seed = 3
[model]
name = "{}"
layers = 2
width = 16
{}
[moe]
experts = 4
[moe.router]
name = "{}"
[moe.expert]
width = 8
[data]
name = "{}"
{}
[train]
steps = 12
batch = 8
log_every = 4
[optimizer]
lr = 0.01
{})",
                                       model, images ? "heads = 2\npatch = 2" : "", router, images ? "test_images" : "clusters",
                                       images ? "" : "validation_vectors = 20", losses);
  return load_experiment(parse_config(text, "tiny.toml", more));
}

// Normal draws around every initial value, so that loads are uneven and no norm or gate is at its start. Its generator is its
// own: ranks are threads.
inline void shake(const Model& model) {
  const at::NoGradGuard no_grad;
  at::Generator draw = at::detail::createCPUGenerator(11);
  for (const NamedTensor& entry : model.parameters())
    entry.tensor.add_(at::randn(entry.tensor.sizes(), draw, at::kDouble).to(entry.tensor.scalar_type()), 0.3);
}

inline Tensors copies_of(const std::vector<NamedTensor>& list) {
  Tensors all;
  for (const NamedTensor& entry : list) all[entry.name] = entry.tensor.detach().clone();
  return all;
}

inline Tensors gradients_of(const Model& model) {
  Tensors all;
  for (const NamedTensor& entry : model.trainable())
    all[entry.name] = entry.tensor.grad().defined() ? entry.tensor.grad().clone() : at::zeros_like(entry.tensor);
  return all;
}

// The largest max|a-b| / max(max|b|, 1e-30) of all; infinite where the names differ.
inline double largest_error(const Tensors& a, const Tensors& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (const auto& [name, tensor] : b) {
    if (a.count(name) == 0) return INFINITY;
    const double scale = std::max(tensor.abs().max().item<double>(), 1e-30);
    const double error = (a.at(name) - tensor).abs().max().item<double>() / scale;
    if (!(error <= largest)) largest = error;  // NaN counts as the largest
    if (std::isnan(largest)) return INFINITY;
  }
  return largest;
}

inline bool bitwise_equal(const Tensors& a, const Tensors& b) {
  if (a.size() != b.size()) return false;
  for (const auto& [name, tensor] : b)
    if (a.count(name) == 0 || !at::equal(a.at(name), tensor)) return false;
  return true;
}

// Everything that a run leaves behind: parameters, buffers, moments.
inline Tensors state_of(const Trainer& trainer) {
  Tensors all = copies_of(trainer.model().parameters());
  all.merge(copies_of(trainer.model().buffers()));
  all.merge(copies_of(trainer.optimizer().state()));
  return all;
}

inline Trainer trainer_of(const Experiment& e, const std::string& checkpoints = "", std::vector<Observer*> observers = {},
                          std::shared_ptr<Comm> comm = single_comm()) {
  return Trainer(e.train, e.model, e.data, std::move(comm), checkpoints, std::move(observers));
}

inline Tensors trained(const Experiment& e, std::vector<Observer*> observers = {}, std::shared_ptr<Comm> comm = single_comm()) {
  Trainer trainer = trainer_of(e, "", std::move(observers), std::move(comm));
  trainer.run();
  return state_of(trainer);
}

inline double far(double a, double b) { return std::abs(a - b) / std::max(std::abs(b), 1e-30); }

// The balance loss of one set of statistics by loops: E · Σ_e (c_e / T) · (p_e / T).
inline Tensor balance_by_hand(const Tensor& counts_E, const Tensor& probability_E, double rows) {
  Tensor sum = at::zeros({}, at::kDouble);
  for (int64_t e = 0; e < 4; ++e) sum = sum + counts_E[e].detach() / rows * probability_E[e] / rows * 4;
  return sum;
}

// Switch layers with a balance loss of coefficient 0.3, in float64, shaken.
inline Experiment balanced(const std::string& scope, const std::string& layers = "each") {
  Experiment e = tiny_experiment(
      "switch", {"model.dtype=float64", "moe.noise.kind=none"},
      fmt::format("[[loss]]\nname = \"balance\"\ncoefficient = 0.3\nscope = \"{}\"\nlayers = \"{}\"\n", scope, layers));
  shake(*e.model);
  return e;
}

}  // namespace moelab::test
