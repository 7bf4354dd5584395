// Feed-forward experts forward and backward as one function of rows, gates and weights.
//
// Expert by expert, in blocks of at most 1280 rows: gather the block's rows, multiply, activate, multiply, add gate · output to
// the rows it came from. Only the pre-activations are kept for the backward pass (with `recompute` not even they): it gathers
// again, activates again, and takes the gates' gradients from the same loop. The rows of all pairs, the activations and the
// outputs of all pairs never exist as a whole.
//
// Threads take blocks in ascending order and add to shared memory in the order of the blocks; a thread whose turn has not come
// goes on with its next block before it waits. So every sum has one order: the bits do not depend on the number of threads.
#pragma once

#include "core/row_loops.h"
#include "core/tensor.h"

#include <vector>

namespace moelab {

// Experts of one width. Biases may be undefined, all of them; `up` belongs to swiglu alone.
struct FfnGroup {
  int64_t first = 0;  // global id of slot 0
  Tensor in_EFD;      // swiglu: the gate's
  Tensor up_EFD = {};
  Tensor out_EDF;
  Tensor in_bias_EF = {};
  Tensor up_bias_EF = {};
  Tensor out_bias_ED = {};
};

struct FfnRows {
  Tensor x_TD;
  Tensor token_N = {};  // int64, the row of x that pair n reads and adds to; undefined: pair n is row n
  Tensor gate_N = {};   // undefined: 1; needs token_N
  Tensor offsets_E1;    // int64 on the CPU, over all experts, those of no group included
};

// A bank of feed-forward experts of one width. Parts of one activation in a bank of several run as groups of one layer.
class FfnPart {
 public:
  virtual ~FfnPart() = default;
  virtual FfnActivation ffn_activation() const = 0;
  virtual FfnGroup ffn_group() const = 0;  // of all its experts, from slot 0 on; handles of the parameters
};

// [rows of x, D]. Pairs of experts that are in no group are left out, and their gates' gradients are 0. Rows without a pair get
// 0. CPU; float, double, bfloat16 (sums over experts in float). Inside autocast it runs in autocast's dtype. Experts without rows
// get zero gradients. Second derivatives are refused.
Tensor ffn_layer(FfnActivation activation, const std::vector<FfnGroup>& groups, const FfnRows& rows, bool recompute);

}  // namespace moelab
