#include "core/ffn_engine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <type_traits>
#include <utility>

namespace moelab {
namespace {

// Every block packs its expert's weights anew and reads and writes their gradients: longer blocks of up to 1280 rows save a
// fortieth of a layer against 512 at f = 1024, blocks of 256 cost a fifth of the backward pass. bfloat16 sums of weights'
// gradients are rounded once per block, so there blocks are longer still.
template <class Scalar>
constexpr int64_t kMostRows = std::is_same_v<Scalar, c10::BFloat16> ? 4096 : 1280;
template <class Scalar>
constexpr int64_t kFewestRows = std::is_same_v<Scalar, c10::BFloat16> ? 4096 : 256;

// Rows of tokens lie on pages of their own, where the processor foresees nothing: they are fetched this many rows before.
constexpr int64_t kAhead = 2;

// Gradients of more bytes have left the caches before anyone reads them.
constexpr size_t kCached = 16 << 20;

template <class Scalar>
void fetch_row(const Scalar* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(Scalar);
  for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(row + i);
}

int64_t work_threads(size_t blocks) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(blocks)));
}

// Every thread's buffers start at whole 64 bytes: the library's sums depend on where its operands lie.
template <class Scalar>
int64_t aligned_count(int64_t count) {
  constexpr int64_t kUnit = 64 / sizeof(Scalar);
  return (count + kUnit - 1) / kUnit * kUnit;
}

template <class Scalar>
MatrixView<Scalar> expert_matrix(const Tensor& stacked, int64_t slot) {
  return {stacked.const_data_ptr<Scalar>() + slot * stacked.size(1) * stacked.size(2), stacked.size(1), stacked.size(2)};
}

template <class Scalar>
Scalar* expert_slice(const Tensor& stacked, int64_t slot) {
  return stacked.mutable_data_ptr<Scalar>() + slot * (stacked.numel() / stacked.size(0));
}

template <class Scalar>
void add_bias(Scalar* rows_NF, const Tensor& bias_EF, int64_t slot, int64_t rows, int64_t width) {
  if (!bias_EF.defined()) return;
  const Scalar* bias = bias_EF.const_data_ptr<Scalar>() + slot * width;
  for (int64_t n = 0; n < rows; ++n) shift_row(rows_NF + n * width, bias, width);
}

template <class Scalar>
void add_column_sums(const Scalar* rows_NF, int64_t rows, const Tensor& out_EF, int64_t slot, int64_t width) {
  if (!out_EF.defined()) return;
  auto* out = expert_slice<at::opmath_type<Scalar>>(out_EF, slot);
  for (int64_t n = 0; n < rows; ++n) add_row(out, rows_NF + n * width, 1, width);
}

}  // namespace

std::vector<FfnBlock> ffn_blocks(const std::vector<FfnGroup>& groups, const Tensor& offsets_E1, int64_t most_rows,
                                 int64_t fewest_rows) {
  const int64_t* offset = offsets_E1.const_data_ptr<int64_t>();
  const int64_t pairs = offset[offsets_E1.numel() - 1];
  std::vector<FfnBlock> blocks;
  for (size_t g = 0; g < groups.size(); ++g)
    for (int64_t slot = 0; slot < groups[g].in_EFD.size(0); ++slot) {
      const int64_t first = offset[groups[g].first + slot], end = offset[groups[g].first + slot + 1];
      for (int64_t at = first; at < end;) {
        const int64_t most = std::clamp((pairs - at) / 4, fewest_rows, most_rows), pieces = (end - at + most - 1) / most;
        const int64_t even = (end - at + pieces - 1) / pieces;
        const int64_t rows = at == first && pieces > 1 ? std::min(even, fewest_rows) : even;
        blocks.push_back({.group = g, .slot = slot, .first = at, .rows = rows, .in_group = at - offset[groups[g].first],
                          .before = at == first ? -1 : static_cast<int64_t>(blocks.size()) - 1});
        at += rows;
      }
    }
  return blocks;
}

template <class Scalar>
FfnEngine<Scalar>::FfnEngine(FfnActivation activation, const std::vector<FfnGroup>& groups, const FfnRows& rows,
                             const std::vector<FfnHidden>& hidden)
    : activation_(activation),
      groups_(groups),
      hidden_(hidden),
      width_(rows.x_TD.size(1)),
      x_(rows.x_TD.const_data_ptr<Scalar>()),
      options_(rows.x_TD.options()),
      token_(rows.token_N.defined() ? rows.token_N.const_data_ptr<int64_t>() : nullptr),
      gate_(rows.gate_N.defined() ? rows.gate_N.const_data_ptr<Sum>() : nullptr),
      blocks_(ffn_blocks(groups, rows.offsets_E1, kMostRows<Scalar>, kFewestRows<Scalar>)),
      moved_(static_cast<int64_t>(blocks_.size())),
      out_weighed_(static_cast<int64_t>(blocks_.size())),
      in_weighed_(static_cast<int64_t>(blocks_.size())) {
  for (const FfnGroup& group : groups) most_hidden_ = std::max(most_hidden_, group.in_EFD.size(1));
  for (const FfnBlock& block : blocks_) most_rows_ = std::max(most_rows_, block.rows);
}

// In the order of Scratch, with two places for grad_ND; what a pass does not need is empty.
template <class Scalar>
typename FfnEngine<Scalar>::Starts FfnEngine<Scalar>::scratch_starts(bool backward) const {
  const int64_t narrow = aligned_count<Scalar>(most_rows_ * width_), wide = aligned_count<Scalar>(most_rows_ * most_hidden_);
  const bool again = !hidden_.front().in_NF.defined();
  const int64_t counts[] = {narrow, narrow, narrow, again ? wide : 0, again && gated() ? wide : 0,
                            wide, backward ? wide : 0, backward && gated() ? wide : 0};
  Starts starts{};
  std::partial_sum(std::begin(counts), std::end(counts), starts.begin() + 1);
  return starts;
}

template <class Scalar>
typename FfnEngine<Scalar>::Scratch FfnEngine<Scalar>::laid_out(Scalar* at, const Starts& starts, bool second) {
  return {.x_ND = at, .grad_ND = at + starts[second ? 2 : 1], .in_NF = at + starts[3], .up_NF = at + starts[4],
          .a_NF = at + starts[5], .grad_NF = at + starts[6], .grad_up_NF = at + starts[7]};
}

template <class Scalar>
template <class Run>
void FfnEngine<Scalar>::run_blocks(bool backward, const Sums& sums, Run run) {
  if (blocks_.empty()) return;
  const int64_t blocks = static_cast<int64_t>(blocks_.size()), threads = work_threads(blocks_.size());
  const Starts starts = scratch_starts(backward);
  const int64_t each = starts.back();
  const Tensor memory = at::empty({threads, each}, options_);
  Scalar* start = memory.mutable_data_ptr<Scalar>();
  std::vector<Waiting> waiting_of(static_cast<size_t>(threads));
  const auto run_block = [&](int64_t block, int64_t thread) {
    Waiting& waiting = waiting_of[static_cast<size_t>(thread)];
    const Scalar* rows_ND = run(block, laid_out(start + thread * each, starts, waiting.second));
    if (rows_ND != nullptr) hand_in(block, rows_ND, sums, waiting);
  };
  for_ordered_blocks(blocks, threads, run_block,
                     [&](int64_t thread) { add_up_waiting(waiting_of[static_cast<size_t>(thread)], sums); });
}

template <class Scalar>
const Scalar* FfnEngine<Scalar>::gathered(const Scalar* from_TD, const FfnBlock& block, Scalar* to_ND) const {
  if (token_ == nullptr) return from_TD + block.first * width_;
  const int64_t* token = token_ + block.first;
  for (int64_t n = 0; n < block.rows; ++n) {
    if (n + kAhead < block.rows) fetch_row(from_TD + token[n + kAhead] * width_, width_);
    std::copy_n(from_TD + token[n] * width_, width_, to_ND + n * width_);
  }
  return to_ND;
}

template <class Scalar>
void FfnEngine<Scalar>::add_up(int64_t index, const Scalar* rows_ND, const Sums& sums) {
  const FfnBlock& block = blocks_[static_cast<size_t>(index)];
  const int64_t* token = token_ + block.first;
  moved_.wait_for(index - 1);
  for (int64_t n = 0; n < block.rows; ++n) {
    if (n + kAhead < block.rows) fetch_row(sums.to_TD + token[n + kAhead] * width_, width_);
    const Sum gate = sums.gate_N == nullptr ? Sum(1) : sums.gate_N[block.first + n];
    add_row(sums.to_TD + token[n] * width_, rows_ND + n * width_, gate, width_);
  }
  moved_.finish(index);
}

template <class Scalar>
void FfnEngine<Scalar>::add_up_waiting(Waiting& waiting, const Sums& sums) {
  if (waiting.block >= 0) add_up(std::exchange(waiting.block, -1), waiting.rows_ND, sums);
}

// What waits has its weights' gradients already, so whoever holds an earlier block never waits for this thread in turn.
template <class Scalar>
void FfnEngine<Scalar>::hand_in(int64_t index, const Scalar* rows_ND, const Sums& sums, Waiting& waiting) {
  add_up_waiting(waiting, sums);
  if (moved_.done(index - 1)) return add_up(index, rows_ND, sums);
  waiting = {.block = index, .rows_ND = rows_ND, .second = !waiting.second};
}

template <class Scalar>
Scalar* FfnEngine<Scalar>::hidden_rows(const Tensor& kept_NF, const FfnBlock& block, int64_t width, Scalar* spare_NF) const {
  return kept_NF.defined() ? kept_NF.mutable_data_ptr<Scalar>() + block.in_group * width : spare_NF;
}

template <class Scalar>
void FfnEngine<Scalar>::pre_activate(const FfnBlock& block, const Scalar* x_ND, Scalar* in_NF, Scalar* up_NF) const {
  const FfnGroup& group = groups_[block.group];
  const MatrixView<Scalar> x{x_ND, block.rows, width_};
  multiply(x, expert_matrix<Scalar>(group.in_EFD, block.slot).t(), in_NF);
  add_bias(in_NF, group.in_bias_EF, block.slot, block.rows, group.in_EFD.size(1));
  if (!gated()) return;
  multiply(x, expert_matrix<Scalar>(group.up_EFD, block.slot).t(), up_NF);
  add_bias(up_NF, group.up_bias_EF, block.slot, block.rows, group.in_EFD.size(1));
}

template <class Scalar>
const Scalar* FfnEngine<Scalar>::run_forward(const FfnBlock& block, const Scratch& scratch, const Tensor& y_TD) {
  const FfnGroup& group = groups_[block.group];
  const int64_t hidden = group.in_EFD.size(1);
  Scalar* in_NF = hidden_rows(hidden_[block.group].in_NF, block, hidden, scratch.in_NF);
  Scalar* up_NF = hidden_rows(hidden_[block.group].up_NF, block, hidden, scratch.up_NF);
  pre_activate(block, gathered(x_, block, scratch.x_ND), in_NF, up_NF);
  activate_row(activation_, in_NF, up_NF, scratch.a_NF, block.rows * hidden);
  Scalar* out_ND = token_ ? scratch.grad_ND : y_TD.mutable_data_ptr<Scalar>() + block.first * width_;
  multiply({scratch.a_NF, block.rows, hidden}, expert_matrix<Scalar>(group.out_EDF, block.slot).t(), out_ND);
  add_bias(out_ND, group.out_bias_ED, block.slot, block.rows, width_);
  return token_ ? out_ND : nullptr;
}

template <class Scalar>
void FfnEngine<Scalar>::forward(const Tensor& y_TD) {
  const Sums sums{gate_, token_ ? y_TD.mutable_data_ptr<Sum>() : nullptr};
  run_blocks(/*backward=*/false, sums, [&](int64_t block, const Scratch& scratch) {
    return run_forward(blocks_[static_cast<size_t>(block)], scratch, y_TD);
  });
}

// Activations again; scratch.grad_NF, until now ∂/∂a without gates, becomes the gradient of the pre-activations.
template <class Scalar>
void FfnEngine<Scalar>::slopes(const FfnBlock& block, const Scratch& scratch, const Scalar* grad_ND, const Scalar* in_NF,
                               const Scalar* up_NF, const Tensor& grad_gate_N) const {
  const FfnGroup& group = groups_[block.group];
  const int64_t hidden = group.in_EFD.size(1);
  Sum* grad_gate = grad_gate_N.defined() ? grad_gate_N.mutable_data_ptr<Sum>() : nullptr;
  const Scalar* bias = group.out_bias_ED.defined() ? group.out_bias_ED.const_data_ptr<Scalar>() + block.slot * width_ : nullptr;
  for (int64_t n = 0; n < block.rows; ++n) {
    const int64_t at = n * hidden;
    Sum product = activate_row_backward(activation_, in_NF + at, up_NF + at, gate_ ? gate_[block.first + n] : Sum(1),
                                        scratch.a_NF + at, scratch.grad_NF + at, scratch.grad_up_NF + at, hidden);
    if (grad_gate && bias) product += dot_rows(grad_ND + n * width_, bias, width_);
    if (grad_gate) grad_gate[block.first + n] = product;
  }
}

template <class Scalar>
void FfnEngine<Scalar>::add_weights(int64_t index, const Scratch& scratch, const Scalar* x_ND, const Scalar* grad_ND,
                                    const FfnGroup& out) {
  const FfnBlock& block = blocks_[static_cast<size_t>(index)];
  const int64_t hidden = groups_[block.group].in_EFD.size(1);
  const auto put = [&](const Tensor& stacked) {
    return block.before >= 0 ? Put::kAdd : stacked.nbytes() > kCached ? Put::kStream : Put::kStore;
  };
  const MatrixView<Scalar> x{x_ND, block.rows, width_}, grad{grad_ND, block.rows, width_}, a{scratch.a_NF, block.rows, hidden};
  const MatrixView<Scalar> grad_in{scratch.grad_NF, block.rows, hidden}, grad_up{scratch.grad_up_NF, block.rows, hidden};
  out_weighed_.wait_for(block.before);
  if (out.out_EDF.defined()) multiply(grad.t(), a, expert_slice<Scalar>(out.out_EDF, block.slot), put(out.out_EDF));
  add_column_sums(grad_ND, block.rows, out.out_bias_ED, block.slot, width_);
  out_weighed_.finish(index);
  in_weighed_.wait_for(block.before);
  if (out.in_EFD.defined()) multiply(grad_in.t(), x, expert_slice<Scalar>(out.in_EFD, block.slot), put(out.in_EFD));
  if (out.up_EFD.defined()) multiply(grad_up.t(), x, expert_slice<Scalar>(out.up_EFD, block.slot), put(out.up_EFD));
  add_column_sums(scratch.grad_NF, block.rows, out.in_bias_EF, block.slot, hidden);
  if (gated()) add_column_sums(scratch.grad_up_NF, block.rows, out.up_bias_EF, block.slot, hidden);
  in_weighed_.finish(index);
}

template <class Scalar>
void FfnEngine<Scalar>::input_gradient(const FfnBlock& block, const Scratch& scratch, Scalar* to_ND) const {
  const FfnGroup& group = groups_[block.group];
  const int64_t hidden = group.in_EFD.size(1);
  multiply({scratch.grad_NF, block.rows, hidden}, expert_matrix<Scalar>(group.in_EFD, block.slot), to_ND);
  if (gated()) multiply({scratch.grad_up_NF, block.rows, hidden}, expert_matrix<Scalar>(group.up_EFD, block.slot), to_ND,
                        Put::kAdd);
}

template <class Scalar>
const Scalar* FfnEngine<Scalar>::run_backward(int64_t index, const Scratch& scratch, const Scalar* grad_TD,
                                              const FfnGradients& out) {
  const FfnBlock& block = blocks_[static_cast<size_t>(index)];
  const FfnGroup& group = groups_[block.group];
  const int64_t hidden = group.in_EFD.size(1);
  const Scalar* x_ND = gathered(x_, block, scratch.x_ND);
  const Scalar* grad_ND = gathered(grad_TD, block, scratch.grad_ND);
  Scalar* in_NF = hidden_rows(hidden_[block.group].in_NF, block, hidden, scratch.in_NF);
  Scalar* up_NF = hidden_rows(hidden_[block.group].up_NF, block, hidden, scratch.up_NF);
  if (!hidden_[block.group].in_NF.defined()) pre_activate(block, x_ND, in_NF, up_NF);
  multiply({grad_ND, block.rows, width_}, expert_matrix<Scalar>(group.out_EDF, block.slot), scratch.grad_NF);
  slopes(block, scratch, grad_ND, in_NF, up_NF, out.gate_N);
  for (int64_t n = 0; gate_ && n < block.rows; ++n) scale_row(scratch.grad_ND + n * width_, gate_[block.first + n], width_);
  add_weights(index, scratch, x_ND, grad_ND, out.groups[block.group]);
  if (!out.x_TD.defined()) return nullptr;
  input_gradient(block, scratch, token_ ? scratch.grad_ND : out.x_TD.mutable_data_ptr<Scalar>() + block.first * width_);
  return token_ ? scratch.grad_ND : nullptr;
}

template <class Scalar>
void FfnEngine<Scalar>::backward(const Tensor& grad_TD, const FfnGradients& out) {
  const Scalar* grad = grad_TD.const_data_ptr<Scalar>();
  const Sums sums{nullptr, token_ && out.x_TD.defined() ? out.x_TD.mutable_data_ptr<Sum>() : nullptr};
  run_blocks(/*backward=*/true, sums,
             [&](int64_t block, const Scratch& scratch) { return run_backward(block, scratch, grad, out); });
}

template class FfnEngine<float>;
template class FfnEngine<double>;
template class FfnEngine<c10::BFloat16>;

}  // namespace moelab
