// Soft and merging routers in plain loops, written from the contract and the papers, without any code of the library.
#pragma once

#include "oracle.h"

namespace moelab::oracle {

struct MixtureLayer {
  std::string router = "soft_moe";  // soft_moe | smear | lory | thor (its averaged evaluation)
  int64_t experts = 3;
  int64_t slots_per_expert = 1;
  bool normalise = true;
  double normalise_eps = 1e-6;
  std::string dispatch = "soft", combine = "soft";
  double noise_std = 0;             // 0: no noise
  int64_t segment_length = 2;
  bool own_first = false;           // first_segment = "own_stopgrad"
  bool prompt = false;              // eval = "prompt"
  double entropy = 0;               // coefficient of the entropy loss, merging routers only
  int64_t width = 3;                // of the experts: GELU with biases
  bool train = true;
};

struct MixtureResult {
  Mat dispatch, combine;                 // rows as in IN, [T,S]
  std::vector<Mat> slots;                // per sequence [S,D]
  Mat alpha;                             // groups in the order of their first row
  std::vector<int64_t> group_of_token;   // -1 at padding
  Mat y;
  Dual entropy;
  Dual objective;
};

MixtureResult evaluate(const MixtureLayer& layer, const Arrays& in, const std::string& seed = "", size_t index = 0);
std::vector<double> gradient(const MixtureLayer& layer, const Arrays& in, const std::string& name);

}  // namespace moelab::oracle
