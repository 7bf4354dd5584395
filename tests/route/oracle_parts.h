// What the oracle's files share: the inputs as numbers, the routed rows, the decision. Private to oracle*.cpp.
#pragma once

#include "oracle.h"

namespace moelab::oracle {

struct Inputs {
  const Arrays& arrays;
  std::string seed;
  size_t seed_index;

  bool has(const std::string& name) const { return arrays.count(name) != 0; }
  // Entry `i` of a tensor, with derivative 1 where it is the seed.
  Dual at(const std::string& name, size_t i) const;
  Mat matrix(const std::string& name, int64_t block = 0) const;  // matrix `block` of a [.., rows, columns] tensor
  Vec vector(const std::string& name, int64_t block = 0) const;
};

// Rows without padding, in IN's order.
struct Rows {
  std::vector<int64_t> file_row;
  std::vector<int64_t> sequence;
  std::vector<int64_t> position;
  int64_t sequences = 0;
  size_t count() const { return file_row.size(); }
};
Rows routed_rows(const Inputs& in);

struct Decision {
  Mat clean, noisy, std;                       // [T,E]; empty where the router has none
  Mat clean_probability, noisy_probability;
  std::vector<std::vector<int64_t>> choice;    // [T,k]
  Mat gate;                                    // before any drop
  Mat probability;                             // of each choice, with noise
  std::vector<std::vector<bool>> allowed, kept;
  Mat group_clean, group_noisy, group_std;     // [T,G], of noisy_topk's hierarchical form
  Mat inside_clean, inside_noisy, inside_std;  // [T,E]; clean and noisy are the joint logits there
  std::vector<std::vector<int64_t>> group;     // [T,k_groups] chosen groups
};

// noisy_topk with groups.
Decision decide_in_two_levels(const Layer& layer, const Inputs& in, const Rows& rows);
Vec load_in_two_levels(const Layer& layer, const Decision& decision, const std::vector<size_t>& of, bool include_self);

Decision decide(const Layer& layer, const Inputs& in, const Rows& rows);
void apply_capacity(const Layer& layer, const Inputs& in, const Rows& rows, Decision& decision);

Dual loss_value(const LossCase& loss, const Layer& layer, const Rows& rows, const Decision& decision);
Vec load(const Layer& layer, const Decision& decision, const std::vector<size_t>& of, bool include_self);
Vec importance(const Layer& layer, const Decision& decision, const std::vector<size_t>& of, bool gates);

// One expert's output for one row. `prefix` is "experts" or "shared".
Vec expert_output(const Layer& layer, const Inputs& in, const std::string& prefix, int64_t expert, const Vec& x);

Vec softmax(const Vec& z);
std::vector<int64_t> top(const Vec& score, int64_t k);               // the k largest, ties to the lowest
Dual kth_largest(const Vec& noisy, int64_t k, int64_t without);      // `without` left out, -1: none
Dual dot(const Vec& a, const Vec& b);

}  // namespace moelab::oracle
