// Carries out a plan. The reference executor materialises D, A and C and evaluates any plan with any bank: slow, and what
// the fast path of each form is tested against.
#pragma once

#include "core/expert.h"
#include "core/plan.h"

namespace moelab {

// How a plan is carried out, `execution` in [moe]. kAuto takes what was measured to be the fastest for the bank and the shapes
// (core/README.md); it never times anything itself, so a run is the same twice. kLoop, kGrouped and kBmm take the three steps
// below with one kind of product (grouped.h).
enum class Execution { kAuto, kLoop, kGrouped, kBmm, kReference };
Execution execution_of(const std::string& word);
const std::vector<std::string>& execution_words();

// What keys a draw for each row of the input: dropout inside experts.
struct RowDraws {
  RandomKey key;
  Tensor sequence_T;  // global sequence of each row
  Tensor position_T;
};

struct ExecuteInput {
  Tensor x_TD;
  Tensor sequence_T = {};
  Tensor cu_seqlens_B1 = {};
  DecodeCache* cache = nullptr;
  bool training = true;
  bool recompute = false;  // pre-activations are made again in the backward pass
  RowDraws draws = {};
};

// y [T, output width]: Σ over a row's slots of gate · expert(row). Banks of two stages are refused: their module's code runs
// between the stages, so the module calls the three steps below itself.
Tensor execute(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input, Execution execution = Execution::kAuto);

// The steps of a sparse plan. One decision may serve several banks and several places of a module:
//
//   q_NW = map_pairs(plan, bank, dispatch_rows(x_TD, plan), input, 0);      query side, one row per pair
//   a_NW = attention over pairs, the module's own code (plan.token_N says which row of x each pair is)
//   y_TD = combine_rows(map_pairs(plan, bank, a_NW, input, 1), plan);       output side of the same decision

// Rows in the order of the plan's pairs, x[token_N]; the gradient is a gather-reduce over slot_TK (no atomic adds).
Tensor dispatch_rows(const Tensor& x_TD, const SparsePlan& plan);

// Every pair's row through its own expert, gates not applied.
Tensor map_pairs(const SparsePlan& plan, const ExpertBank& bank, const Tensor& rows_ND, const ExecuteInput& input,
                 int stage = 0);

// Σ_k gate · rows[slot_TK] in the rows' dtype; rows that have no slot get 0. Gradients reach the rows and the gates.
Tensor combine_rows(const Tensor& rows_ND, const SparsePlan& plan);

// The plain evaluation of any plan form.
Tensor execute_reference(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input);

// What D and C of a soft plan are, per sequence; the reference and `moelab route` use it.
struct SoftMatrices {
  Tensor row_M;        // the rows of this sequence
  Tensor dispatch_MS;  // columns sum to 1 (identity: row m feeds slot m, later rows and slots are empty)
  Tensor combine_MS;   // rows sum to 1 (identity: row m reads slot m)
};
SoftMatrices soft_matrices(const SoftPlan& plan, int64_t sequence);

// Σ over the rows of the share that each expert has in a row's output, float64 [E] on the CPU: of plans that mix all experts.
// Undefined for sparse plans.
Tensor expert_weights_E(const Plan& plan);

}  // namespace moelab
