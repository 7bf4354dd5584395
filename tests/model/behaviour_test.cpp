// Causality, padding, keys of the random draws, replay, decoding, and the smallest shapes.
#include "model_fixture.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::test;

namespace {

std::string routed_by(const std::string& router, const std::string& more = "") {
  return "[model]\nlayers = 3\nwidth = 8\nheads = 2\ncontext = 12\ndtype = \"float64\"\nmoe_layers = \"0,2\"\n[moe]\nexperts = "
         "4\n"
         "[moe.router]\nname = \"" +
         router + "\"\n" + more;
}

// The first `length[b]` columns of each sequence of a padded result, stacked.
Tensor real_rows(const Tensor& logits_BLV, const std::vector<int64_t>& length) {
  std::vector<Tensor> rows;
  for (size_t b = 0; b < length.size(); ++b) rows.push_back(logits_BLV[static_cast<int64_t>(b)].narrow(0, 0, length[b]));
  return at::cat(rows);
}

// Sequences of the given lengths in a rectangle `columns` wide; padding holds whatever `filler` says.
Batch padded(const Batch& batch, const std::vector<int64_t>& length, int64_t columns, int64_t filler) {
  Batch wide = batch;
  const auto sequences = static_cast<int64_t>(length.size());
  wide.length_B = at::tensor(length, at::kLong);
  wide.tokens_BL = at::full({sequences, columns}, filler, at::kLong);
  wide.targets_BL = at::full({sequences, columns}, -1, at::kLong);
  for (int64_t b = 0; b < sequences; ++b) {
    wide.tokens_BL[b].narrow(0, 0, length[b]).copy_(batch.tokens_BL[b].narrow(0, 0, length[b]));
    wide.targets_BL[b].narrow(0, 0, length[b]).copy_(batch.targets_BL[b].narrow(0, 0, length[b]));
  }
  return wide;
}

}  // namespace

TEST_CASE("a later token changes no earlier logit, in training and in evaluation") {
  for (const std::string router : {"softmax_topk", "noisy_topk", "switch", "gshard"}) {
    const auto model = model_of(routed_by(router, "[moe.capacity]\nmode = \"factor\"\norder = \"token_major\"\n"));
    shake(*model);
    for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
      Batch batch = random_batch(2, 10);
      const Tensor before = logits_of(*model, batch, context_of(mode));
      batch.tokens_BL.select(1, 6).add_(1).remainder_(11);
      const Tensor after = logits_of(*model, batch, context_of(mode));
      INFO(router << " in " << to_string(mode));
      CHECK(relative_error(after.narrow(1, 0, 6), before.narrow(1, 0, 6)) <= 1e-12);
      CHECK_FALSE(at::equal(after.narrow(1, 6, 4), before.narrow(1, 6, 4)));
    }
  }
}

TEST_CASE("padding changes no logit, gradient or counter, whatever it holds") {
  const std::string text = routed_by(
      "noisy_topk", "[moe.capacity]\nmode = \"factor\"\norder = \"token_major\"\n[[loss]]\nname = \"z\"\nscope = \"sequence\"\n");
  const auto model = model_of(text);
  shake(*model);
  const Batch batch = random_batch(3, 8);
  const std::vector<int64_t> length{8, 3, 5};
  const Batch tight = padded(batch, length, 8, 0), loose = padded(batch, length, 12, -7);
  CHECK(loose.rows() == 16);
  CHECK(loose.target_tokens() == 16);
  const StepContext context = context_of(Mode::kTrain);
  CHECK(relative_error(real_rows(logits_of(*model, loose, context), length),
                       real_rows(logits_of(*model, tight, context), length)) < 1e-12);
  for (int64_t b = 0; b < 3; ++b) {  // each sequence alone
    Batch alone;
    alone.tokens_BL = batch.tokens_BL.narrow(0, b, 1).narrow(1, 0, length[b]);
    alone.sequence_B = batch.sequence_B.narrow(0, b, 1);
    CHECK(relative_error(logits_of(*model, loose, context)[b].narrow(0, 0, length[b]), logits_of(*model, alone, context)[0]) <
          1e-12);
  }
  const double loss = loss_and_gradients(*model, tight, context);
  std::vector<Tensor> gradients;
  for (const NamedTensor& entry : model->parameters()) gradients.push_back(entry.tensor.grad().clone());
  CHECK(std::abs(loss_and_gradients(*model, loose, context) - loss) < 1e-12 * loss);
  size_t i = 0;
  for (const NamedTensor& entry : model->parameters()) CHECK(relative_error(entry.tensor.grad(), gradients[i++]) < 1e-12);
  const RoutingRecord record = model->forward(loose, context).sites[0].record;
  CHECK(record.rows == 16);
  CHECK(record.chosen_E == model->forward(tight, context).sites[0].record.chosen_E);
}

TEST_CASE("training draws anew in each step and layer, evaluation does not know the step") {
  const auto model = model_of(routed_by("random"));
  shake(*model);
  const Batch batch = random_batch(2, 12);
  const auto choices = [&](Mode mode, int64_t step) {
    StepContext context = context_of(mode);
    context.step = step;
    const ModelOutput out = model->forward(batch, context);
    return std::vector<Tensor>{out.sites[0].assignment.choice_TK, out.sites[1].assignment.choice_TK};
  };
  const auto train = choices(Mode::kTrain, 1), eval = choices(Mode::kEval, 1);
  CHECK(at::equal(train[0], choices(Mode::kTrain, 1)[0]));
  CHECK_FALSE(at::equal(train[0], train[1]));
  CHECK_FALSE(at::equal(train[0], choices(Mode::kTrain, 2)[0]));
  CHECK_FALSE(at::equal(train[0], eval[0]));
  CHECK(at::equal(eval[0], choices(Mode::kEval, 2)[0]));
}

TEST_CASE("a forced selection is replayed at its site") {
  const auto model = model_of(routed_by("random"));
  const Batch batch = random_batch(2, 6);
  const StepContext first = context_of(Mode::kTrain);
  const ModelOutput out = model->forward(batch, first);
  const std::vector<Assignment> record{out.sites[0].assignment, out.sites[1].assignment};
  StepContext other = first;
  other.step = 77;
  other.forced = &record;
  CHECK(at::equal(model->forward(batch, other).logits_BLV, out.logits_BLV));
}

TEST_CASE("one expert and one token are enough") {
  const auto model = model_of("[model]\nlayers = 1\nwidth = 4\nheads = 1\ncontext = 1\n[moe]\nexperts = 1\n[moe.router]\nk = 1\n",
                              1);
  const Batch batch = random_batch(1, 1, 1);
  CHECK(loss_and_gradients(*model, batch, context_of(Mode::kTrain)) >= 0);
  CHECK(model->forward(batch, context_of(Mode::kEval)).sites[0].record.chosen_E == std::vector<int64_t>{1});
}

TEST_CASE("sequences past the context and tokens outside the vocabulary are refused") {
  const auto model = model_of(routed_by("softmax_topk"));
  CHECK_THROWS_AS(model->forward(random_batch(1, 13), StepContext{}), Error);
  CHECK_THROWS_AS(model->forward(random_batch(1, 12, 50), StepContext{}), Error);
}
