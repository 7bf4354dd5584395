// What the oracle's files share: the inputs as numbers, the routed rows, the decision. Private to oracle*.cpp.
#pragma once

#include "oracle.h"

#include <optional>

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
  std::vector<std::vector<int64_t>> choice;    // [T,k]; k may differ from row to row
  Mat gate;                                    // before any drop
  Mat probability;                             // of each choice, with noise
  std::vector<std::vector<bool>> allowed, kept;
  double scale = 1;                            // of the gates, after any renormalisation
  bool capacity_is_choice = false;             // experts chose their rows: nothing is dropped
  Mat distilled;                               // [T,E], of the second router
  bool learns_distilled = true;                // stage 1
  Mat indicator;                               // [T,E]: 1 where active, with the gradient of the declared surrogate
  Mat direction;                               // the router's matrix
  std::vector<bool> active;                    // [E]
  std::map<std::string, Mat> probe;            // rows are routed rows, or one row of [E] or [1]
  Mat group_clean, group_noisy, group_std;     // [T,G], of noisy_topk's hierarchical form
  Mat inside_clean, inside_noisy, inside_std;  // [T,E]; clean and noisy are the joint logits there
  std::vector<std::vector<int64_t>> group;     // [T,k_groups] chosen groups
};

// noisy_topk with groups.
Decision decide_in_two_levels(const Layer& layer, const Inputs& in, const Rows& rows);
Vec load_in_two_levels(const Layer& layer, const Decision& decision, const std::vector<size_t>& of, bool include_self);

Decision decide(const Layer& layer, const Inputs& in, const Rows& rows);

// The same of routers with files of their own; nothing of others.
using Decide = Decision (*)(const Layer&, const Inputs&, const Rows&);
Decide method_of(const Layer& layer);
Decision decide_base(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_expert_choice(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_hash(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_stablemoe(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_thor(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_domain(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_top_p(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_dynmoe(const Layer& layer, const Inputs& in, const Rows& rows);
Decision decide_sigmoid_topk(const Layer& layer, const Inputs& in, const Rows& rows);

// What two of them leave after a step.
Vec last_chosen_scores(const Layer& layer, const Inputs& in, const Rows& rows);  // [E], the mean over groups of the smallest
Arrays dynmoe_after_window(const Layer& layer, const Inputs& in, const Rows& rows);  // of one step

// Steps that the methods share.
Decision scored(const Layer& layer, const Inputs& in, const Rows& rows);  // logits and probabilities of x·weightᵀ, no choice
// The next row's: the gates are what priorities read, then renormalised where the layer says before_drop.
void add_choice(const Layer& layer, Decision& decision, std::vector<int64_t> choice, Vec gate);
Vec noise_row(const Inputs& in, int64_t file_row);                        // as it lies in IN
Vec products(const Mat& weight, const Vec& x);                            // weight·x
int64_t best_of(const Vec& score, const std::vector<int64_t>& taken);     // lowest index of the largest not taken
std::vector<int64_t> top(const Vec& score, int64_t k);
int64_t places(const Layer& layer, int64_t n, int64_t k);                 // of an expert in a scope of n rows
void apply_capacity(const Layer& layer, const Inputs& in, const Rows& rows, Decision& decision);

// Of a loss that belongs to one method.
std::optional<Dual> method_loss(const LossCase& loss, const Layer& layer, const Decision& d, const std::vector<size_t>& of);
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
