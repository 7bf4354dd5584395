// An MoE layer in plain loops over std::vector, written from the contract and the papers, without any code of the library:
// what `moelab route` must agree with. Options carry the words of the experiment file.
#pragma once

#include "oracle_dual.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace moelab::oracle {

struct Array {
  std::vector<int64_t> shape;
  std::vector<double> value;
  bool whole = false;   // int64 in the file
  bool buffer = false;  // of the router: it has no gradient
};
using Arrays = std::map<std::string, Array>;

struct Capacity {
  std::string mode = "none";
  double factor = 1;
  int64_t value = 0;
  bool times_k = false;
  std::string round = "ceil";
  int64_t min = 0;
  int64_t multiple_of = 1;
  std::string scope = "sequence";
  std::string priority = "position";
  std::string order = "k_major";
};

struct LossCase {
  std::string name;
  double coefficient = 0.5;
  std::string scope = "step";
  std::map<std::string, std::string> options = {};  // words as TOML writes them, strings without quotes
  std::string label = {};                           // default: the name

  std::string option(const std::string& key, const std::string& fallback) const;
};

// One layer and how it is run.
struct Layer {
  std::string router = "softmax_topk";
  int64_t experts = 4;                      // rows of every tensor with one per expert
  int64_t k = 2;
  int64_t groups = 1;                       // noisy_topk: more than 1 = its hierarchical form, k experts in each chosen group
  int64_t k_groups = 2;
  std::string softmax = "before";
  std::string renormalise = "none";
  std::string second_expert = "random_2g";  // of the mode that runs
  double threshold = 0.5;
  std::string noise = "paper";              // [moe.noise] kind
  double noise_std = 1;                     // negative: not given
  double noise_epsilon = -1;                // negative: not given
  std::string activation = "relu";
  int64_t width = 3;
  bool bias = false;
  int64_t shared_count = 0;
  int64_t shared_width = 2;
  bool shared_gate = false;
  Capacity capacity = {};
  std::vector<LossCase> losses = {};
  bool train = true;
  std::map<std::string, std::string> options = {};  // of routers that have files of their own, as in LossCase
  int64_t active = 0;                       // [moe] experts, `experts` being max_experts; 0 = all
  int64_t step = 0;
  // Expert of each routed row, from outside: for solvers whose outcome no definition fixes, only its quality.
  std::vector<int64_t> given_choice = {};

  std::string option(const std::string& key, const std::string& fallback) const;
  double number(const std::string& key, double fallback) const;
};

struct Result {
  std::vector<int64_t> token, expert, offsets, dropped_token, dropped_expert;  // rows as in IN
  Vec gate;
  Mat y;                            // rows as in IN
  std::map<std::string, Dual> loss;  // by label
  std::map<std::string, Mat> probe;  // rows as in IN; [E] ones have one row
  Dual objective;                   // Σ y·grad_y + Σ coefficient·loss
};

// `seed` names the scalar whose derivative is carried ("" = none).
Result evaluate(const Layer& layer, const Arrays& in, const std::string& seed = "", size_t index = 0);

// d objective / d in[name], entry by entry.
std::vector<double> gradient(const Layer& layer, const Arrays& in, const std::string& name);

// The router's tensors after end_step, by their names in IN; not base's prices, which no formula fixes.
Arrays after_step(const Layer& layer, const Arrays& in);

}  // namespace moelab::oracle
