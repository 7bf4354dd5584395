#include "method_inputs.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

namespace moelab::testing {
namespace {

using oracle::Array;
using oracle::Layer;

const std::set<std::string> kOwnOracles{"base",   "expert_choice", "hash",   "stablemoe",   "thor",
                                        "domain", "top_p",         "dynmoe", "sigmoid_topk"};
constexpr int64_t kTokens = 6, kDomains = 5;

int64_t entries(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

class MethodInputs {
 public:
  MethodInputs(const Layer& layer, std::mt19937_64& random, oracle::Arrays& arrays)
      : layer_(layer), random_(random), arrays_(arrays), rows_(arrays.at("x").shape[0]), experts_(layer.experts) {}

  void add() {
    if (layer_.router == "base") add_base();
    if (layer_.router == "expert_choice") buffer("thresholds", uniform({experts_}));
    if (layer_.router == "hash") add_hash();
    if (layer_.router == "stablemoe") add_stablemoe();
    if (layer_.router == "thor") add_thor();
    if (layer_.router == "dynmoe") add_dynmoe();
    if (layer_.router == "sigmoid_topk") buffer("bias", normal({experts_}));
    if (layer_.router == "domain") add_domain();
  }

 private:
  Array normal(std::vector<int64_t> shape) {
    std::normal_distribution<double> draw(0, 0.7);
    return filled(std::move(shape), [&] { return draw(random_); });
  }
  Array uniform(std::vector<int64_t> shape) {
    std::uniform_real_distribution<double> draw(0, 1);
    return filled(std::move(shape), [&] { return draw(random_); });
  }
  Array whole(std::vector<int64_t> shape, int64_t below) {
    Array array = filled(std::move(shape), [&] { return static_cast<double>(random_() % static_cast<uint64_t>(below)); });
    array.whole = true;
    return array;
  }
  template <class Draw>
  static Array filled(std::vector<int64_t> shape, Draw draw) {
    Array array{std::move(shape), {}};
    array.value.resize(static_cast<size_t>(entries(array.shape)));
    std::generate(array.value.begin(), array.value.end(), draw);
    return array;
  }

  void parameter(const std::string& name, Array array) { arrays_["router." + name] = std::move(array); }
  void buffer(const std::string& name, Array array) {
    array.buffer = true;
    parameter(name, std::move(array));
  }

  // Scores on a coarse grid, so that rounding them to the solver's changes nothing.
  void add_base() {
    for (const char* name : {"x", "router.weight"})
      for (double& value : arrays_.at(name).value) value = std::round(value * 1024) / 1024;
    buffer("prices", normal({experts_}));
    for (double& price : arrays_.at("router.prices").value) price = std::round(price * 1024) / 1024;
    if (layer_.option("shuffle", "false") == "false") return;
    Array order{{rows_}, {}, true};
    for (int64_t t = 0; t < rows_; ++t) order.value.push_back(static_cast<double>(t));
    std::shuffle(order.value.begin(), order.value.end(), random_);
    arrays_["noise"] = order;
  }

  // The k experts of a line differ.
  void add_hash() {
    arrays_["token_ids"] = whole({rows_}, kTokens);
    const auto k = static_cast<int64_t>(layer_.number("k", 1));
    Array table{k == 1 ? std::vector<int64_t>{kTokens} : std::vector<int64_t>{kTokens, k}, {}, true};
    for (int64_t v = 0; v < kTokens; ++v) {
      const auto first = static_cast<int64_t>(random_() % 1000);
      for (int64_t j = 0; j < k; ++j) table.value.push_back(static_cast<double>((first + j) % experts_));
    }
    buffer("table", std::move(table));
  }

  void add_stablemoe() {
    const auto dim = static_cast<int64_t>(layer_.number("distill_dim", 50));
    arrays_["token_ids"] = whole({rows_}, kTokens);
    parameter("embedding", normal({kTokens, dim}));
    parameter("distilled", normal({experts_, dim}));
    if (layer_.option("distilled", "word") == "word") return;
    parameter("taps", normal({dim, 5, dim}));
    parameter("taps_bias", normal({dim}));
  }

  // More draws than any granularity needs; the case cuts them to its shape.
  void add_thor() {
    if (!layer_.train && layer_.option("inference", "random") != "random") return;
    arrays_["noise"] = whole({rows_}, experts_);
  }

  // Expert e of the room to grow has a direction too, but is masked out.
  void add_dynmoe() {
    parameter("thresholds", normal({experts_}));
    Array mask{{experts_}, std::vector<double>(static_cast<size_t>(experts_), 1.0)};
    for (int64_t e = layer_.active; layer_.active > 0 && e < experts_; ++e) mask.value[static_cast<size_t>(e)] = 0;
    buffer("mask", std::move(mask));
  }

  void add_domain() {
    arrays_["domain"] = whole({rows_}, kDomains);
    if (layer_.option("hard", "true") == "false") parameter("weight", normal({kDomains, experts_}));
  }

  const Layer& layer_;
  std::mt19937_64& random_;
  oracle::Arrays& arrays_;
  int64_t rows_, experts_;
};

}  // namespace

bool has_own_oracle(const Layer& layer) { return kOwnOracles.count(layer.router) > 0; }

std::string toml_line(const std::string& key, const std::string& word) {
  const bool bare = word == "true" || word == "false" || word.find_first_not_of("0123456789.-e") == std::string::npos;
  return bare ? fmt::format("{} = {}\n", key, word) : fmt::format("{} = \"{}\"\n", key, word);
}

std::string method_keys(const Layer& layer) {
  std::string text = fmt::format("name = \"{}\"\n", layer.router);
  if (layer.router == "sigmoid_topk") text += fmt::format("k = {}\n", layer.k);
  if (layer.renormalise != "none") text += fmt::format("renormalise = \"{}\"\n", layer.renormalise);
  if (layer.router == "hash" || layer.router == "stablemoe") text += fmt::format("vocabulary = {}\n", kTokens);
  if (layer.router == "domain") text += fmt::format("domains = {}\n", kDomains);
  for (const auto& [key, word] : layer.options) text += toml_line(key, word);
  return text;
}

void add_method_inputs(const Layer& layer, std::mt19937_64& random, oracle::Arrays& arrays) {
  MethodInputs(layer, random, arrays).add();
}

}  // namespace moelab::testing
