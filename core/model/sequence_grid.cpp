#include "core/model/sequence_grid.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

// Place of every row within its sequence.
Tensor ranks_within(const Tensor& sequence_T, const Tensor& position_T, const Tensor& count_B) {
  const Tensor by_position_T = position_T.argsort(/*stable=*/true, 0, /*descending=*/false);
  const Tensor order_T =
      by_position_T.index_select(0, sequence_T.index_select(0, by_position_T).argsort(/*stable=*/true, 0, false));
  const Tensor first_B = count_B.cumsum(0).sub(count_B);
  const Tensor rank_T =
      at::arange(sequence_T.numel(), at::kLong).sub(first_B.index_select(0, sequence_T.index_select(0, order_T)));
  return at::empty({sequence_T.numel()}, at::kLong).index_copy_(0, order_T, rank_T);
}

}  // namespace

SequenceGrid::SequenceGrid(const Tensor& sequence_T, const Tensor& position_T, int64_t sequences) : sequences_(sequences) {
  const int64_t rows = sequence_T.numel();
  if (rows == 0) return;
  const Tensor count_B = at::bincount(sequence_T, {}, sequences);
  length_ = count_B.max().item<int64_t>();
  const Tensor cell_T = sequence_T.mul(length_).add(ranks_within(sequence_T, position_T, count_B));
  if (rows < sequences_ * length_) real_BL_ = at::arange(length_, at::kLong).lt(count_B.unsqueeze(1));
  if (real_BL_.defined() || !cell_T.equal(at::arange(rows, at::kLong))) cell_T_ = cell_T;
}

Tensor SequenceGrid::lay(const Tensor& rows) const {
  std::vector<int64_t> shape{sequences_, length_};
  for (const int64_t size : rows.sizes().slice(1)) shape.push_back(size);
  if (!cell_T_.defined()) return rows.reshape(shape);
  std::vector<int64_t> flat = rows.sizes().vec();
  flat.front() = sequences_ * length_;
  return at::zeros(flat, rows.options()).index_copy(0, cell_T_.to(rows.device()), rows).view(shape);
}

Tensor SequenceGrid::take(const Tensor& grid) const {
  const Tensor flat = grid.flatten(0, 1);
  return cell_T_.defined() ? flat.index_select(0, cell_T_.to(grid.device())) : flat;
}

}  // namespace moelab
