// Shared steps of routers: noise, scores, stable top-k, gates. A router file holds only what is its own.
#pragma once

#include "core/router.h"

namespace moelab {

// Rows must be finite; NaN and Inf are errors that name the tensor, layer and step.
void require_finite(const Tensor& tensor, const char* name, const RouteInput& in);

// x·weightᵀ in float32 or better, whatever autocast says. [T,E]
Tensor router_logits(const Tensor& x_TD, const Tensor& weight_ED);

// Softmax of each row and its k largest entries in one pass over the logits; ties go to the lowest column. Gradients reach the
// logits from both.
struct SoftmaxTopk {
  Tensor probs_TE;
  Tensor choice_TK;  // int64
  Tensor prob_TK;    // probs_TE at choice_TK
};
SoftmaxTopk softmax_topk(const Tensor& logits_TE, int64_t k);

// The k largest of each row, largest first; ties go to the lowest column. int64 [T,k], not differentiable.
Tensor stable_topk(const Tensor& score_TE, int64_t k);

// The choice to take the gates at: the forced one where there is one, else the top-k of score_TE. A router that computes its
// gates from this replays a selection with the scores of now.
Tensor chosen_topk(const RouteInput& in, const Tensor& score_TE, int64_t k);

// What `[moe.noise]` does to a linear router's scores. `noisy` equals `clean` where nothing was drawn.
struct NoisyLogits {
  Tensor clean_TE;
  Tensor noisy_TE;
  Tensor std_TE;  // standard deviation of the additive noise; undefined where there is none
};

// The raw draws of this pass: `in.noise` where an outside program gave them, else from the stream. Shapes are checked.
Tensor raw_normal(const RouteInput& in, int64_t columns);
Tensor raw_uniform(const RouteInput& in, int64_t columns);
Tensor raw_gumbel(const RouteInput& in, int64_t columns);

// Applies kind = none | normal (std) | jitter (epsilon, on the input); kind `paper` is resolved by the router before.
NoisyLogits noisy_logits(const RouteInput& in, const Tensor& weight_ED, const NoiseSpec& noise);

// The value without its gradient, by which a router declares its surrogate: straight-through terms, constants of a backward
// pass. Checks of gradients hold it where it was (`in.held`); a name stands for one value of a call.
Tensor stop_gradient(const RouteInput& in, const char* name, const Tensor& value);

// Gathers score_TE at choice_TK; 0 where the choice is -1.
Tensor gather_choices(const Tensor& score_TE, const Tensor& choice_TK);

// Softmax of each row over its own choices alone; 0 where the choice is -1.
Tensor softmax_of_choices(const Tensor& logits_TE, const Tensor& choice_TK);

// The rows of each key, ascending; the keys too. key_T is int64 [T].
std::vector<Tensor> rows_by_key(const Tensor& key_T);

// Softmax of each column over the rows of a group. Every row is in one group.
Tensor softmax_over_rows(const Tensor& logits_TE, const std::vector<Tensor>& groups);

// Divides by the sum over the row's kept entries, guard 1e-9. `counted_TK` (bool) says which entries enter the sum.
Tensor renormalised(const Tensor& gate_TK, const Tensor& counted_TK);

// Everything after the choice: capacity (or the forced outcome), renormalisation, plan. `chosen.allowed_TK` marks the pairs
// that the router's own policy did not refuse (undefined: all chosen ones).
struct Chosen {
  Tensor choice_TK;       // int64, -1 = none
  Tensor gate_TK;         // on the graph, before renormalisation
  Tensor priority_TK;     // probability of each pair, with noise where there was noise; serves `batch` and `score`
  Tensor allowed_TK;      // bool or undefined
};
RouteOutput finish_sparse(const RouteInput& in, const RouterSpec& spec, Chosen chosen, Scores scores);

// The same for routers without scores: each of the K choices has the gate 1/K.
RouteOutput finish_unscored(const RouteInput& in, const RouterSpec& spec, const Tensor& choice_TK);

}  // namespace moelab
