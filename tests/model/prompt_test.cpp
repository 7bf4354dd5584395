// Evaluation after a prompt: what is scored against plain loops in double, who sees what, and decoding from the same prompt.
#include "model_fixture.h"
#include "plain_layers.h"

#include "core/dataset.h"
#include "trainers/evaluate.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

using namespace moelab;
using namespace moelab::test;

namespace {

const std::string kPromptTables = R"(
[model]
layers = 2
width = 8
heads = 2
context = 8
dtype = "float64"
[moe]
experts = 3
[moe.expert]
activation = "swiglu"
width = 5
[moe.router]
)";
const std::string kPromptLory = kPromptTables + "name = \"lory\"\neval = \"prompt\"\nsegment_length = 2\n";

std::shared_ptr<Model> prompted_model(const std::string& text, int64_t prompt) {
  const auto model = make_model({parse_config(text, "prompt.toml"), {DataKind::kTokens, 11}, /*seed=*/5, false, prompt});
  shake(*model);
  return model;
}

// Validation texts of 9 tokens, 8 of which are read, and shorter ones. Token v is v + 1 bytes long.
struct FewTexts : Dataset {
  std::vector<std::vector<int64_t>> texts{
      {1, 5, 2, 10, 3, 3, 0, 7, 4}, {9, 0, 6, 1, 1, 8, 2, 5, 10}, {4, 4, 7, 0, 9, 2}, {3, 8, 6}, {0, 2, 4, 6, 8, 10, 1, 3, 5}};

  DataShape shape() const override { return {DataKind::kTokens, 11}; }
  Batch train_batch(int64_t, int64_t, int64_t first, int64_t count, int64_t) const override { return eval_batch(first, count); }
  int64_t eval_sequences() const override { return std::ssize(texts); }
  Batch eval_batch(int64_t first, int64_t count) const override {
    Batch batch;
    batch.tokens_BL = at::zeros({count, 8}, at::kLong);
    batch.targets_BL = at::full({count, 8}, -1, at::kLong);
    batch.sequence_B = at::arange(first, first + count, at::kLong);
    for (int64_t b = 0; b < count; ++b)
      for (size_t l = 0; l + 1 < texts[first + b].size(); ++l) {
        batch.tokens_BL[b][static_cast<int64_t>(l)] = texts[first + b][l];
        batch.targets_BL[b][static_cast<int64_t>(l)] = texts[first + b][l + 1];
      }
    return batch;
  }
  double bytes_of(const Tensor& targets_BL) const override {
    return targets_BL.add(1).sum().item<double>();  // -1 stands for no byte
  }
};

// Softmax of R · the mean of the first `prompt` rows.
Vector mixture_of_prompt(const Model& model, const std::string& moe, const Matrix& rows, size_t prompt) {
  const size_t given = std::min(prompt, rows.size());
  Vector mean(rows[0].size(), 0.0);
  for (size_t t = 0; t < given; ++t)
    for (size_t i = 0; i < mean.size(); ++i) mean[i] += rows[t][i] / static_cast<double>(given);
  Vector alpha = times(parameter_of(model, moe + "router.weight"), mean);
  double total = 0;
  for (double& a : alpha) total += a = std::exp(a);
  for (double& a : alpha) a /= total;
  return alpha;
}

Tensor merged_weight(const Model& model, const std::string& name, const Vector& alpha) {
  const Tensor stacked = parameter_of(model, name);
  Tensor sum = at::zeros_like(stacked[0]);
  for (size_t e = 0; e < alpha.size(); ++e) sum = sum + stacked[static_cast<int64_t>(e)] * alpha[e];
  return sum;
}

Vector merged_swiglu(const Model& model, const std::string& bank, const Vector& alpha, const Vector& x) {
  Vector hidden = times(merged_weight(model, bank + "w_gate", alpha), x);
  const Vector up = times(merged_weight(model, bank + "w_up", alpha), x);
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] *= up[i] / (1 + std::exp(-hidden[i]));
  return times(merged_weight(model, bank + "w_down", alpha), hidden);
}

Matrix plain_lory_logits(const Model& model, const std::vector<int64_t>& tokens, size_t prompt) {
  const Tensor embedding = parameter_of(model, "embedding.weight");
  Matrix x;
  for (const int64_t token : tokens) x.push_back(vector_of(embedding[token]));
  for (const std::string block : {"layers.0.", "layers.1."}) {
    Matrix in, rows;
    for (const Vector& row : x) in.push_back(normed(row, parameter_of(model, block + "norm_attention")));
    const Matrix attended = plain_attention(model, block, in, 2, /*causal=*/true);
    for (size_t t = 0; t < x.size(); ++t) add_to(x[t], attended[t]);
    for (const Vector& row : x) rows.push_back(normed(row, parameter_of(model, block + "norm_moe")));
    const Vector alpha = mixture_of_prompt(model, block + "moe.", rows, prompt);
    for (size_t t = 0; t < x.size(); ++t) add_to(x[t], merged_swiglu(model, block + "moe.experts.", alpha, rows[t]));
  }
  Matrix logits;
  for (const Vector& row : x) logits.push_back(times(embedding, normed(row, parameter_of(model, "norm.weight"))));
  return logits;
}

struct PlainScore {
  double nats = 0, bytes = 0;
  int64_t tokens = 0, right = 0;

  void add(const Vector& logits, int64_t target) {
    double total = 0;
    for (const double z : logits) total += std::exp(z);
    nats += std::log(total) - logits[target];
    bytes += static_cast<double>(target) + 1;
    tokens += 1;
    right += std::max_element(logits.begin(), logits.end()) - logits.begin() == target;
  }
};

// A token is scored where at least `prompt` tokens come before it.
PlainScore plain_score(const Model& model, const FewTexts& data, int64_t prompt) {
  PlainScore score;
  for (const std::vector<int64_t>& text : data.texts) {
    const Matrix logits = plain_lory_logits(model, {text.begin(), text.end() - 1}, static_cast<size_t>(prompt));
    for (int64_t at = 1; at < std::ssize(text); ++at)
      if (at >= prompt) score.add(logits[at - 1], text[at]);
  }
  return score;
}

StepContext with_prompt(int64_t prompt) {
  StepContext context = context_of(Mode::kEval);
  context.prompt = prompt;
  return context;
}

TEST_CASE("lory after a prompt, evaluated: loss, bits per byte and accuracy of the tokens after it equal plain loops") {
  const FewTexts data;
  for (const int64_t prompt : {1, 2, 3, 5, 8}) {
    CAPTURE(prompt);
    const auto model = prompted_model(kPromptLory, prompt);
    const PlainScore score = plain_score(*model, data, prompt);
    const Evaluation found = evaluate(*model, data, {0, 2, 4, 9, 20, prompt}, *single_comm());
    CHECK(found.prompt == prompt);
    CHECK(found.tokens == score.tokens);
    CHECK(found.bytes == score.bytes);
    CHECK(std::abs(found.loss * static_cast<double>(score.tokens) - score.nats) < 1e-10 * score.nats);
    CHECK(std::abs(found.bits_per_byte - score.nats / std::numbers::ln2 / score.bytes) < 1e-10 * found.bits_per_byte);
    CHECK(found.accuracy == static_cast<double>(score.right) / static_cast<double>(score.tokens));
  }
}

TEST_CASE("the scored tokens by hand: texts of 9, 9, 6, 3 and 9 tokens after prompts of 5") {
  const FewTexts data;
  const auto model = prompted_model(kPromptLory, 5);
  const Evaluation found = evaluate(*model, data, {0, 4, 4, 9, 20, 5}, *single_comm());
  CHECK(found.tokens == 4 + 4 + 1 + 0 + 4);
  CHECK(found.bytes == (3 + 0 + 7 + 4 + 4) + (8 + 2 + 5 + 10 + 4) + (2 + 1) + (10 + 1 + 3 + 5 + 4));
}

TEST_CASE("after a prompt no row that is scored sees a later token; within the prompt rows do") {
  constexpr int64_t kPrompt = 4;
  const auto model = prompted_model(kPromptLory, kPrompt);
  const Batch batch = random_batch(2, 8);
  const Tensor before_BLV = logits_of(*model, batch, with_prompt(kPrompt));
  for (int64_t j = 0; j < 8; ++j) {
    CAPTURE(j);
    Batch changed = batch;
    changed.tokens_BL = batch.tokens_BL.clone();
    changed.tokens_BL[0][j].add_(1).remainder_(11);
    const Tensor moved_BLV = logits_of(*model, changed, with_prompt(kPrompt)).sub(before_BLV).abs();
    const auto moved = [&](int64_t row) { return moved_BLV[0][row].max().item<double>(); };
    CHECK(moved_BLV[1].max().item<double>() == 0);  // another sequence
    for (int64_t row = 0; row < 8; ++row) {
      CAPTURE(row);
      if (row >= j || j < kPrompt) CHECK(moved(row) > 1e-9);
      else CHECK(moved(row) < 1e-14);
    }
  }
}

TEST_CASE("what comes after a prompt is predicted as decoding from that prompt predicts it") {
  for (const int64_t prompt : {1, 3, 6}) {
    const auto model = prompted_model(kPromptLory, prompt);
    const Batch batch = random_batch(2, 8);
    const Tensor expected_BLV = logits_of(*model, batch, with_prompt(prompt));
    DecodeState state;
    for (int64_t next = prompt; next <= 8; ++next) {
      const Tensor logits_BV = model->decode(batch.tokens_BL.slice(1, state.position, next), state);
      CHECK(relative_error(logits_BV, expected_BLV.select(1, next - 1)) < 1e-10);
    }
  }
}

TEST_CASE("a router that reads no prompt decides as ever; its tokens before the prompt's end are not scored") {
  const FewTexts data;
  const auto model = prompted_model(kPromptTables + "name = \"softmax_topk\"\nk = 2\n", 0);
  const Batch batch = with_lengths(data.eval_batch(0, 5));
  const Tensor logits_BLV = logits_of(*model, batch, context_of(Mode::kEval));
  CHECK(logits_of(*model, batch, with_prompt(3)).equal(logits_BLV));
  PlainScore score;
  for (int64_t b = 0; b < 5; ++b)
    for (int64_t l = 2; l < 8; ++l)
      if (const auto target = batch.targets_BL[b][l].item<int64_t>(); target >= 0) score.add(vector_of(logits_BLV[b][l]), target);
  const Evaluation found = evaluate(*model, data, {0, 3, 4, 9, 20, 3}, *single_comm());
  CHECK(found.tokens == score.tokens);
  CHECK(std::abs(found.loss - score.nats / static_cast<double>(score.tokens)) < 1e-10);
}

TEST_CASE("a causal model refuses lory's prompts until [eval] names one, and a router that looks beyond a prompt always") {
  const std::string refusal = refusal_of(kPromptLory);
  CHECK(refusal.find("layer 0: router 'lory' looks ahead in evaluation of a causal model") != std::string::npos);
  CHECK(refusal.find("set [eval] prompt = N") != std::string::npos);
  CHECK_NOTHROW(prompted_model(kPromptLory, 3));
  CHECK_THROWS_AS(prompted_model(kPromptTables + "name = \"smear\"\n", 3), Error);
  CHECK_THROWS_AS(prompted_model(kPromptLory + "first_segment = \"own_stopgrad\"\n", 3), Error);  // its training looks ahead
}

}  // namespace
