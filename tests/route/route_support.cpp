#include "route_support.h"

#include "method_inputs.h"

#include "core/io/files.h"
#include "core/io/safetensors.h"
#include "tests/support/program.h"

#include <ATen/ops/empty.h>
#include <catch2/catch_test_macros.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <set>
#include <sstream>
#include <unistd.h>

namespace moelab::testing {
namespace {

using oracle::Array;
using oracle::Arrays;
using oracle::Layer;

const std::set<std::string> kIndexNames{"token_ids", "positions", "sequence_ids", "segment_ids", "domain"};

std::string capacity_keys(const oracle::Capacity& c) {
  return fmt::format("mode = \"{}\"\nfactor = {:.17g}\nvalue = {}\ntimes_k = {}\nround = \"{}\"\nmin = {}\nmultiple_of = {}\n"
                     "scope = \"{}\"\npriority = \"{}\"\norder = \"{}\"\n",
                     c.mode, c.factor, c.value, c.times_k, c.round, c.min, c.multiple_of, c.scope, c.priority, c.order);
}

std::string router_keys(const Layer& layer) {
  if (has_own_oracle(layer)) return method_keys(layer);
  std::string text = fmt::format("name = \"{}\"\n", layer.router);
  if (layer.router == "gshard") {
    text += fmt::format("{} = \"{}\"\nthreshold = {:.17g}\n", layer.train ? "second_expert" : "second_expert_eval",
                        layer.second_expert, layer.threshold);
  } else if (layer.router != "switch") {
    text += fmt::format("k = {}\n", layer.k);
  }
  if (layer.groups > 1) text += fmt::format("groups = {}\nk_groups = {}\n", layer.groups, layer.k_groups);
  if (layer.router == "softmax_topk" || layer.router == "frozen") text += fmt::format("softmax = \"{}\"\n", layer.softmax);
  const std::set<std::string> plain{"switch", "uniform", "random"};
  if (!plain.count(layer.router)) text += fmt::format("renormalise = \"{}\"\n", layer.renormalise);
  return text;
}

std::string noise_keys(const Layer& layer) {
  std::string text = fmt::format("kind = \"{}\"\n", layer.noise);
  if (layer.noise == "normal" && layer.noise_std >= 0) text += fmt::format("std = {:.17g}\n", layer.noise_std);
  if (layer.noise_epsilon >= 0) text += fmt::format("epsilon = {:.17g}\n", layer.noise_epsilon);
  return text;
}

std::string loss_table(const oracle::LossCase& loss) {
  std::string text = fmt::format("[[loss]]\nname = \"{}\"\ncoefficient = {:.17g}\nscope = \"{}\"\n", loss.name, loss.coefficient,
                                 loss.scope);
  if (!loss.label.empty()) text += fmt::format("label = \"{}\"\n", loss.label);
  for (const auto& [key, word] : loss.options)
    text += toml_line(key, word);
  return text;
}

class InputMaker {
 public:
  InputMaker(const Layer& layer, const RouteSizes& sizes, uint64_t seed) : layer_(layer), sizes_(sizes), random_(seed) {}

  Arrays make() {
    const int64_t rows = sizes_.rows, width = sizes_.width;
    add_normal("x", {rows, width});
    add_normal("grad_y", {rows, width});
    if (sizes_.padding) add("padding", {rows}, [](int64_t t) { return t == 3 || t == 7 ? 1.0 : 0.0; });
    if (sizes_.sequences) add("sequence_ids", {rows}, [](int64_t t) { return t % 3 == 1 ? 7.0 : 40.0; });
    const std::set<std::string> without_matrix{"uniform", "random", "hash", "thor", "domain"};
    if (!without_matrix.count(layer_.router)) add_normal("router.weight", {layer_.experts, width});
    if (layer_.router == "noisy_topk") add_normal("router.noise_weight", {layer_.experts, width});
    if (layer_.groups > 1)
      for (const char* name : {"router.group_weight", "router.group_noise_weight"}) add_normal(name, {layer_.groups, width});
    add_experts("experts", layer_.experts, layer_.width);
    if (layer_.shared_count > 0) add_experts("shared", 1, layer_.shared_count * layer_.shared_width);
    if (layer_.shared_gate) add_normal("shared.gate_weight", {1, width});
    add_noise();
    if (layer_.capacity.priority == "random") add_uniform("noise.capacity", {rows, layer_.experts});
    if (has_own_oracle(layer_)) add_method_inputs(layer_, random_, arrays_);
    return std::move(arrays_);
  }

 private:
  template <class Value>
  void add(const std::string& name, std::vector<int64_t> shape, Value value) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    Array array{std::move(shape), {}};
    for (int64_t i = 0; i < count; ++i) array.value.push_back(value(i));
    arrays_[name] = std::move(array);
  }
  void add_normal(const std::string& name, std::vector<int64_t> shape) {
    std::normal_distribution<double> draw(0, 0.7);
    add(name, std::move(shape), [&](int64_t) { return draw(random_); });
  }
  void add_uniform(const std::string& name, std::vector<int64_t> shape) {
    std::uniform_real_distribution<double> draw(0, 1);
    add(name, std::move(shape), [&](int64_t) { return draw(random_); });
  }

  void add_map(const std::string& prefix, const std::string& map, int64_t experts, int64_t out, int64_t in) {
    add_normal(prefix + ".w_" + map, {experts, out, in});
    if (layer_.bias) add_normal(prefix + ".b_" + map, {experts, out});
  }
  void add_experts(const std::string& prefix, int64_t experts, int64_t hidden) {
    const bool gated = layer_.activation == "swiglu";
    add_map(prefix, gated ? "gate" : "in", experts, hidden, sizes_.width);
    if (gated) add_map(prefix, "up", experts, hidden, sizes_.width);
    add_map(prefix, gated ? "down" : "out", experts, sizes_.width, hidden);
  }

  void add_noise() {
    const int64_t rows = sizes_.rows;
    const bool random_second = layer_.router == "gshard" && layer_.second_expert.starts_with("random");
    const bool gumbel = layer_.router == "gshard" && layer_.second_expert == "gumbel";
    if (layer_.router == "random") {
      // k different experts per row: a starting point and the next ones.
      add("noise", layer_.k == 1 ? std::vector<int64_t>{rows} : std::vector<int64_t>{rows, layer_.k}, [&](int64_t i) {
        return static_cast<double>(((i / layer_.k) * 5 % 7 + i % layer_.k) % layer_.experts);
      });
    } else if (random_second) {
      add_uniform("noise", {rows});
    } else if (gumbel) {
      std::extreme_value_distribution<double> draw(0, 1);
      add("noise", {rows, layer_.experts}, [&](int64_t) { return draw(random_); });
    } else if (layer_.train && (layer_.noise == "jitter" || (layer_.noise == "paper" && layer_.router == "switch"))) {
      add_uniform("noise", {rows, sizes_.width});
    } else if (layer_.train && (layer_.noise == "normal" || (layer_.noise == "paper" && noisy_.count(layer_.router)))) {
      add_normal("noise", {rows, layer_.experts + (layer_.groups > 1 ? layer_.groups : 0)});
    }
  }

  const std::set<std::string> noisy_{"noisy_topk", "vmoe"};
  const Layer& layer_;
  RouteSizes sizes_;
  std::mt19937_64 random_;
  Arrays arrays_;
};

std::vector<double> values_of(const oracle::Mat& rows) {
  std::vector<double> flat;
  for (const oracle::Vec& row : rows)
    for (const oracle::Dual& one : row) flat.push_back(one.v);
  return flat;
}

// max|a-b| / max(max|b|, 1e-30)
double error_between(const std::vector<double>& got, const std::vector<double>& expected) {
  if (got.size() != expected.size()) return 1e300;
  double difference = 0, largest = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    difference = std::max(difference, std::abs(got[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  return difference / largest;
}

class Comparison {
 public:
  Comparison(const RouteRun& run, double tolerance) : run_(run), tolerance_(tolerance) {}

  void close(const std::string& name, const std::vector<double>& expected) const {
    INFO("tensor " << name);
    REQUIRE(run_.tensors.count(name) == 1);
    CHECK(error_between(numbers(run_.tensors.at(name)), expected) <= tolerance_);
  }
  size_t count_of(const std::string& prefix) const {
    size_t count = 0;
    for (const auto& entry : run_.tensors) count += entry.first.starts_with(prefix);
    return count;
  }
  void absent(const std::string& name) const {
    INFO("tensor " << name);
    CHECK(run_.tensors.count(name) == 0);
  }
  void same(const std::string& name, const std::vector<int64_t>& expected) const {
    INFO("tensor " << name);
    REQUIRE(run_.tensors.count(name) == 1);
    CHECK(integers(run_.tensors.at(name)) == expected);
  }

 private:
  const RouteRun& run_;
  double tolerance_;
};

void compare_values(const Comparison& compare, const oracle::Result& expected) {
  compare.same("token", expected.token);
  compare.same("expert", expected.expert);
  compare.same("offsets", expected.offsets);
  compare.same("dropped_token", expected.dropped_token);
  compare.same("dropped_expert", expected.dropped_expert);
  compare.close("gate", values_of({expected.gate}));
  compare.close("y", values_of(expected.y));
  for (const auto& [label, value] : expected.loss) compare.close("loss." + label, {value.v});
  CHECK(compare.count_of("loss.") == expected.loss.size());  // exactly the listed ones
  for (const auto& [name, value] : expected.probe) compare.close("probe." + name, values_of(value));
  for (const std::string promised : {"logits", "probs", "importance", "load", "gap"})
    if (!expected.probe.count(promised)) compare.absent("probe." + promised);
}

bool is_parameter(const std::string& name) {
  return name.starts_with("router.") || name.starts_with("experts.") || name.starts_with("shared.");
}

void compare_state(const Comparison& compare, const Layer& layer, const Arrays& arrays) {
  for (const auto& [name, array] : arrays) {
    if (!is_parameter(name)) continue;
    compare.close(name, array.value);
    if (array.buffer) {
      compare.absent("grad." + name);
      continue;
    }
    const bool frozen = layer.router == "frozen" && name.starts_with("router.");
    compare.close("grad." + name, frozen ? std::vector<double>(array.value.size(), 0.0) : oracle::gradient(layer, arrays, name));
  }
  compare.close("grad.x", oracle::gradient(layer, arrays, "x"));
}

Arrays rounded_to_float(Arrays arrays) {
  for (auto& entry : arrays)
    for (double& value : entry.second.value) value = static_cast<float>(value);
  return arrays;
}

}  // namespace

RouteFolder::RouteFolder() {
  static int count = 0;
  path_ = fmt::format("{}/moelab_route_{}_{}", std::filesystem::temp_directory_path().string(), getpid(), count++);
  make_folders(path_);
}

RouteFolder::~RouteFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void RouteFolder::write(const std::string& name, const std::string& text) const { write_file(file(name), text); }

RouteRun RouteFolder::run(const std::string& arguments) const {
  return run_bare(fmt::format("exp.toml --in in.safetensors --out out.safetensors {}", arguments));
}

RouteRun RouteFolder::run_bare(const std::string& arguments) const {
  std::istringstream words("route " + arguments);
  const test::ProgramResult ended = test::run_moelab(
      {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()}, path_);
  RouteRun run;
  run.code = ended.code;
  run.out = ended.out;
  run.err = ended.err;
  run.wrote = std::filesystem::exists(file("out.safetensors"));
  if (!run.wrote) return run;
  for (NamedTensor& named : read_safetensors(file("out.safetensors")).tensors) run.tensors[named.name] = named.tensor;
  return run;
}

std::string toml_of(const Layer& layer) {
  const int64_t active = layer.active > 0 ? layer.active : layer.experts;
  std::string text = fmt::format("[moe]\nexperts = {}\nmax_experts = {}\n", active, layer.experts);
  if (layer.losses.empty()) text += "losses = \"none\"\n";
  text += "[moe.router]\n" + router_keys(layer) + "[moe.noise]\n" + noise_keys(layer);
  text += fmt::format("[moe.expert]\nname = \"ffn\"\nactivation = \"{}\"\nwidth = {}\nbias = {}\n", layer.activation, layer.width,
                      layer.bias);
  if (layer.shared_count > 0)
    text += fmt::format("[moe.shared]\ncount = {}\nwidth = {}\ngate = {}\n", layer.shared_count, layer.shared_width,
                        layer.shared_gate);
  text += (layer.train ? "[moe.capacity]\n" : "[moe.capacity.eval]\n") + capacity_keys(layer.capacity);
  for (const oracle::LossCase& loss : layer.losses) text += loss_table(loss);
  if (layer.step > 0) text += fmt::format("[route]\nstep = {}\ntotal_steps = {}\n", layer.step, layer.step + 1);
  return text;
}

Arrays random_inputs(const Layer& layer, const RouteSizes& sizes, uint64_t seed) { return InputMaker(layer, sizes, seed).make(); }

std::vector<NamedTensor> file_tensors(const Arrays& arrays, at::ScalarType dtype) {
  const bool whole_noise = arrays.count("noise") && !arrays.count("router.weight");
  std::vector<NamedTensor> tensors;
  for (const auto& [name, array] : arrays) {
    Tensor tensor = at::empty(array.shape, at::TensorOptions().dtype(at::kDouble));
    std::copy(array.value.begin(), array.value.end(), tensor.mutable_data_ptr<double>());
    const bool index = array.whole || kIndexNames.count(name) || (name == "noise" && whole_noise);
    tensors.push_back({name, tensor.to(index ? at::kLong : name == "padding" ? at::kBool : dtype)});
  }
  return tensors;
}

RouteRun run_layer(const Layer& layer, const Arrays& arrays, const std::string& more, at::ScalarType dtype) {
  const RouteFolder folder;
  folder.write("exp.toml", toml_of(layer));
  write_safetensors(folder.file("in.safetensors"), file_tensors(arrays, dtype));
  return folder.run(fmt::format("{} {}", layer.train ? "--train" : "--eval", more));
}

void expect_agreement(const Layer& layer, const Arrays& given, at::ScalarType dtype) {
  const Arrays arrays = dtype == at::kFloat ? rounded_to_float(given) : given;
  expect_agreement(run_layer(layer, arrays, "--grad", dtype), layer, arrays, dtype == at::kFloat ? 1e-5 : 1e-10);
}

void expect_agreement(const RouteRun& run, const Layer& layer, const Arrays& arrays, double tolerance) {
  INFO(toml_of(layer));
  INFO(run.err);
  REQUIRE(run.code == 0);
  const Comparison compare(run, tolerance);
  compare_values(compare, oracle::evaluate(layer, arrays));
  compare_state(compare, layer, arrays);
}

void expect_agreement_after_step(const Layer& layer, const Arrays& arrays) {
  const RouteRun run = run_layer(layer, arrays, "--grad --end-step");
  expect_agreement(run, layer, arrays);
  for (const auto& [name, array] : oracle::after_step(layer, arrays)) Comparison(run, 1e-10).close("after." + name, array.value);
}

std::vector<double> numbers(const Tensor& tensor) {
  const Tensor plain = tensor.to(at::kDouble).contiguous();
  const auto* data = plain.const_data_ptr<double>();
  return {data, data + plain.numel()};
}

std::vector<int64_t> integers(const Tensor& tensor) {
  REQUIRE(tensor.scalar_type() == at::kLong);
  const Tensor plain = tensor.contiguous();
  const auto* data = plain.const_data_ptr<int64_t>();
  return {data, data + plain.numel()};
}

}  // namespace moelab::testing
