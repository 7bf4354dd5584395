// What a router decides. Every router of the literature computes Y = C · F(Dᵀ X ; A Θ) over J slots: D (T×J) says what each
// slot reads, A (J×E) which mixture of expert parameters it uses, C (T×J) what each row gets back. Three forms hold it
// without ever storing D, A or C; the reference executor (execute.h) materialises them.
#pragma once

#include "core/random.h"
#include "core/tensor.h"

#include <string>
#include <variant>

namespace moelab {

// D and A one-hot, C sparse: kept (row, expert, gate) triples sorted by expert, then by row.
struct SparsePlan {
  int64_t rows = 0;
  int64_t experts = 0;
  Tensor token_N;           // int64, the row that each pair reads and writes
  Tensor expert_N;          // int64, ascending
  Tensor gate_N;            // on the graph
  Tensor offsets_E1;        // int64 on the CPU: expert e owns the pairs [offsets[e], offsets[e+1])
  Tensor slot_TK;           // int64: where in the sorted pairs choice k of row t went, -1 = not chosen, refused or dropped
  Tensor dropped_token_M;   // int64: pairs that were chosen and did not fit, in the order of rows, then of choices
  Tensor dropped_expert_M;
};

enum class SlotWeights { kSoft, kUniform, kIdentity };

// D and C dense, made block by block from logits = query · keyᵀ · scale (+ noise); one set of slots per sequence.
struct SoftPlan {
  int64_t experts = 0;
  int64_t slots_per_expert = 1;  // slot s belongs to expert s / slots_per_expert
  Tensor query_TD;               // on the graph, normalised where the method does
  Tensor key_SD;                 // on the graph; it may lack the slots of the last experts: those have no weight in D and C
  Tensor scale;                  // one element, on the graph
  Tensor sequence_T;             // int64, 0 … sequences-1
  int64_t sequences = 0;
  double noise_std = 0;          // added to the logits of each block, keyed per row
  Tensor noise_TS;               // overrides the draw (outside programs); undefined = draw
  RandomKey noise_key;
  Tensor position_T;             // keys the noise beside sequence_key_T
  Tensor sequence_key_T;
  SlotWeights dispatch = SlotWeights::kSoft;
  SlotWeights combine = SlotWeights::kSoft;
};

// D and C identity, A dense: rows of group g run through one expert whose parameters are Σ_e alpha[g,e]·θ_e.
struct MergePlan {
  Tensor alpha_GE;           // on the graph
  Tensor group_of_token_T;   // int64
};

using Plan = std::variant<SparsePlan, SoftPlan, MergePlan>;

enum class PlanForm { kSparse, kSoft, kMerge };
const char* to_string(PlanForm form);

// Throws Error(kBug) naming the broken rule: shapes, ranges, order, offsets, slots that do not match the pairs, non-finite
// gates. `rows` and `experts` are what the layer handed to the router.
void validate(const Plan& plan, int64_t rows, int64_t experts);

// What was chosen and what survived: enough to replay a decision without asking the router again (recomputation, finite
// differences, traces). Column k holds the k-th choice of each row.
struct Assignment {
  Tensor choice_TK;  // int64, -1 = none
  Tensor kept_TK;    // bool: not refused by a policy and not dropped by the capacity
  Tensor dropped_TK; // bool: chosen, not refused, did not fit
  bool defined() const { return choice_TK.defined(); }
};

// Sorts the kept pairs by expert (stable counting sort: by row within an expert). gate_TK is on the graph; entries of pairs
// that are not kept are ignored.
SparsePlan make_sparse_plan(const Assignment& assignment, const Tensor& gate_TK, int64_t experts);

}  // namespace moelab
