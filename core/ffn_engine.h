// The arithmetic of ffn_layer, apart from autograd. One engine serves one call; its pointers live as long as the tensors given.
#pragma once

#include "core/ffn_layer.h"
#include "core/gemm.h"
#include "core/ordered_blocks.h"

#include <ATen/OpMathType.h>

#include <array>
#include <vector>

namespace moelab {

// Consecutive pairs of one expert.
struct FfnBlock {
  size_t group;
  int64_t slot;       // of the expert in its group
  int64_t first;      // pair
  int64_t rows;
  int64_t in_group;   // first, counted from the group's first pair
  int64_t before;     // the block of the same expert before this one; -1 = none
};
// Blocks of at most `most_rows`. Towards the last pair they become shorter, down to `fewest_rows`, so that threads end together.
// Short is the first of several of one expert, too: the thread with the second waits for its gradients.
std::vector<FfnBlock> ffn_blocks(const std::vector<FfnGroup>& groups, const Tensor& offsets_E1, int64_t most_rows,
                                 int64_t fewest_rows);

// Per group; undefined = not wanted. Sums over experts and biases' gradients are in float or better.
struct FfnGradients {
  Tensor x_TD;
  Tensor gate_N;
  std::vector<FfnGroup> groups;
};

// Pre-activations of each group, [pairs of the group, F]; undefined = computed again where they are needed.
struct FfnHidden {
  Tensor in_NF;
  Tensor up_NF;
};

template <class Scalar>
class FfnEngine {
 public:
  using Sum = at::opmath_type<Scalar>;

  FfnEngine(FfnActivation activation, const std::vector<FfnGroup>& groups, const FfnRows& rows,
            const std::vector<FfnHidden>& hidden);

  // Adds to y_TD (Sum, zeros before) where there are tokens, else writes it (Scalar).
  void forward(const Tensor& y_TD);

  // Every tensor of `out` that is defined: x_TD (as y_TD above) and the biases' hold zeros before, weights' anything.
  void backward(const Tensor& grad_TD, const FfnGradients& out);

 private:
  struct Scratch {
    Scalar *x_ND, *grad_ND, *in_NF, *up_NF, *a_NF, *grad_NF, *grad_up_NF;
  };

  // Where rows of blocks are added up; without tokens they are written in place and nothing is added.
  struct Sums {
    const Sum* gate_N;  // null: 1
    Sum* to_TD;
  };

  // A thread goes on with its next block while the rows of the one before wait for their turn.
  struct Waiting {
    int64_t block = -1;
    const Scalar* rows_ND = nullptr;
    bool second = false;  // of the two buffers that such rows may lie in
  };

  using Starts = std::array<int64_t, 9>;  // of the buffers in a thread's memory, and their sum

  Starts scratch_starts(bool backward) const;
  static Scratch laid_out(Scalar* at, const Starts& starts, bool second);
  template <class Run>
  void run_blocks(bool backward, const Sums& sums, Run run);
  const Scalar* gathered(const Scalar* from_TD, const FfnBlock& block, Scalar* to_ND) const;
  void add_up(int64_t index, const Scalar* rows_ND, const Sums& sums);
  void add_up_waiting(Waiting& waiting, const Sums& sums);
  void hand_in(int64_t index, const Scalar* rows_ND, const Sums& sums, Waiting& waiting);
  Scalar* hidden_rows(const Tensor& kept_NF, const FfnBlock& block, int64_t width, Scalar* spare_NF) const;
  void pre_activate(const FfnBlock& block, const Scalar* x_ND, Scalar* in_NF, Scalar* up_NF) const;
  // Both answer with the rows that are to be added up; null: they are in place already, or not wanted.
  const Scalar* run_forward(const FfnBlock& block, const Scratch& scratch, const Tensor& y_TD);
  const Scalar* run_backward(int64_t index, const Scratch& scratch, const Scalar* grad_TD, const FfnGradients& out);
  void slopes(const FfnBlock& block, const Scratch& scratch, const Scalar* grad_ND, const Scalar* in_NF, const Scalar* up_NF,
              const Tensor& grad_gate_N) const;
  void add_weights(int64_t index, const Scratch& scratch, const Scalar* x_ND, const Scalar* grad_ND, const FfnGroup& out);
  void input_gradient(const FfnBlock& block, const Scratch& scratch, Scalar* to_ND) const;
  bool gated() const { return activation_ == FfnActivation::kSwiglu; }

  FfnActivation activation_;
  const std::vector<FfnGroup>& groups_;
  const std::vector<FfnHidden>& hidden_;
  int64_t width_, most_hidden_ = 0, most_rows_ = 0;
  const Scalar* x_;
  at::TensorOptions options_;
  const int64_t* token_;  // null: pair n is row n
  const Sum* gate_;       // null: 1
  std::vector<FfnBlock> blocks_;
  BlockTurns moved_, out_weighed_, in_weighed_;
};

extern template class FfnEngine<float>;
extern template class FfnEngine<double>;
extern template class FfnEngine<c10::BFloat16>;

}  // namespace moelab
