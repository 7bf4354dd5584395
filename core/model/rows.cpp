#include "core/model/rows.h"

#include "core/error.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

namespace moelab {
namespace {

Comm* comm_of_one() {
  static const std::shared_ptr<Comm> alone = single_comm();
  return alone.get();
}

Tensor rising_offsets(const Tensor& length_B) {
  Tensor offsets_B1 = at::zeros({length_B.numel() + 1}, at::kLong);
  offsets_B1.narrow(0, 1, length_B.numel()).copy_(length_B.cumsum(0));
  return offsets_B1;
}

}  // namespace

BatchRows::BatchRows(const Batch& batch, int64_t first) : BatchRows(batch, batch.tokens_BL.size(1), first) {}

BatchRows BatchRows::of_samples(const Batch& batch, int64_t positions) {
  check_invariant(!batch.tokens_BL.defined(), "a batch of tokens says itself how long its sequences are");
  return {batch, positions, 0};
}

BatchRows::BatchRows(const Batch& batch, int64_t length, int64_t first) : batch_(batch.samples()), length_(length) {
  if (batch.tokens_BL.defined()) tokens_BL_ = batch.tokens_BL.cpu();
  const Tensor column_BL = at::arange(length_, at::kLong).expand({batch_, length_});
  const Tensor ordinal_B = at::arange(batch_, at::kLong);
  Tensor length_B = at::full({batch_}, length_, at::kLong);
  if (batch.length_B.defined()) {
    length_B = batch.length_B.cpu();
    const Tensor real_BL = column_BL.lt(length_B.unsqueeze(1));
    if (tokens_BL_.defined()) tokens_BL_ = tokens_BL_.masked_fill(real_BL.logical_not(), 0);
    index_T_ = real_BL.reshape({-1}).nonzero().squeeze(1);
  }
  const auto rows_of = [&](const Tensor& entry_BL) {
    const Tensor flat = entry_BL.reshape({-1}).contiguous();  // one expanded sequence reshapes to a view of stride 0
    return index_T_.defined() ? flat.index_select(0, index_T_) : flat;
  };
  const auto per_sequence = [&](const Tensor& entry_B) { return rows_of(entry_B.cpu().unsqueeze(1).expand({batch_, length_})); };
  if (tokens_BL_.defined()) channels_.token_ids_T = rows_of(tokens_BL_);
  channels_.position_T = rows_of(column_BL).add(first);
  channels_.sequence_T = per_sequence(ordinal_B);
  channels_.sequence_key_T = per_sequence(batch.sequence_B.defined() ? batch.sequence_B : ordinal_B);
  if (batch.domain_BL.defined()) channels_.domain_T = rows_of(batch.domain_BL.cpu());
  else if (batch.domain_B.defined()) channels_.domain_T = per_sequence(batch.domain_B);
  channels_.sequences = batch_;
  channels_.cu_seqlens_B1 = rising_offsets(length_B);
}

Tensor BatchRows::gather(const Tensor& x_BLD) const {
  const Tensor flat_TD = x_BLD.reshape({batch_ * length_, x_BLD.size(2)});
  return index_T_.defined() ? flat_TD.index_select(0, index_T_.to(flat_TD.device())) : flat_TD;
}

Tensor BatchRows::scatter(const Tensor& y_TD) const {
  const int64_t width = y_TD.size(1);
  if (!index_T_.defined()) return y_TD.view({batch_, length_, width});
  const Tensor empty_TD = at::zeros({batch_ * length_, width}, y_TD.options());
  return empty_TD.index_copy(0, index_T_.to(y_TD.device()), y_TD).view({batch_, length_, width});
}

RouteInput BatchRows::route_input(const StepContext& context) const {
  RouteInput in = channels_;
  in.mode = context.mode;
  in.step = context.step;
  in.total_steps = context.total_steps;
  in.pass = context.pass;
  in.prompt = context.prompt;
  in.comm = context.comm ? context.comm : comm_of_one();
  return in;
}

RandomKey layer_key(const StepContext& context, int64_t layer) {
  const bool training = context.mode == Mode::kTrain;
  const RandomKey key = random_key(context.seed, training ? "train" : "eval").with("layer", layer).with("pass");
  return (training ? key.with("step", context.step) : key).in_pass(context.pass);
}

}  // namespace moelab
