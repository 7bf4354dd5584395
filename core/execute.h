// Carries out a plan. The reference executor materialises D, A and C and evaluates any plan with any bank: slow, and what
// every fast path is tested against. A combination without a fast path falls back to it, with one log line saying so.
#pragma once

#include "core/expert.h"
#include "core/plan.h"
#include "core/router.h"

namespace moelab {

enum class Execution { kAuto, kReference };

struct ExecuteInput {
  Tensor x_TD;
  Tensor sequence_T;
  Tensor cu_seqlens_B1;
  Tensor carried_TD;           // second stage of a two-stage bank
  DecodeCache* cache = nullptr;
  bool training = true;
};

// y [T, output width of the stage]: Σ over a row's slots of gate · expert(row). Stage 0 of a two-stage bank returns what the
// module's code between the stages reads.
Tensor execute(const Plan& plan, const ExpertBank& bank, const ExecuteInput& input, Execution execution = Execution::kAuto,
               int stage = 0);

// Rows in the order of the plan's pairs, x[token_N]; the gradient is a gather-reduce over slot_TK (no atomic adds).
Tensor dispatch_rows(const Tensor& x_TD, const SparsePlan& plan);

// Σ_k gate · rows[slot_TK], rows that have no slot get 0. Gradients reach the rows and the gates.
Tensor combine_rows(const Tensor& rows_ND, const SparsePlan& plan);

// What D and C of a soft plan are, per sequence; the reference and `moelab route` use it.
struct SoftMatrices {
  Tensor row_M;        // the rows of this sequence
  Tensor dispatch_MS;  // columns sum to 1
  Tensor combine_MS;   // rows sum to 1
};
SoftMatrices soft_matrices(const SoftPlan& plan, int64_t sequence);

}  // namespace moelab
