// The classifiers of images and of vectors: plain loops, groups that are images, counts by hand, and what each refuses.
#include "model_fixture.h"
#include "plain_layers.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include <cmath>
#include <map>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::ContainsSubstring;

namespace {

// Two channels of 4 × 6 pixels: six patches of 2 × 2, so eight numbers each.
const DataShape kImages{DataKind::kImages, /*classes=*/5, {2, 4, 6}};
const DataShape kVectors{DataKind::kVectors, /*classes=*/5, {3}};

std::string classifier_text(const std::string& keys, const std::string& router, const std::string& more = "") {
  return "[model]\nlayers = 2\nwidth = 8\nmoe_layers = \"1\"\ndense_width = 6\ndtype = \"float64\"\n" + keys +
         "[moe]\nexperts = 3\n[moe.expert]\nactivation = \"swiglu\"\nwidth = 5\n[moe.router]\nname = \"" + router + "\"\n" + more;
}

std::string patches_text(const std::string& router, const std::string& more = "", const std::string& keys = "") {
  return classifier_text("name = \"patches\"\nheads = 2\npatch = 2\n" + keys, router, more);
}

std::string mlp_text(const std::string& router, const std::string& more = "") {
  return classifier_text("name = \"mlp\"\n", router, more);
}

Batch random_samples(const DataShape& shape, int64_t samples, int64_t seed = 3) {
  at::manual_seed(seed);
  std::vector<int64_t> sizes{samples};
  sizes.insert(sizes.end(), shape.sample.begin(), shape.sample.end());
  return {.values = at::randn(sizes), .targets_BL = at::randint(shape.classes, {samples, 1}, at::kLong),
          .sequence_B = at::arange(samples, at::kLong)};
}

// The same samples in the order of `sample_B`.
Batch in_order(const Batch& batch, const Tensor& sample_B) {
  return {.values = batch.values.index_select(0, sample_B), .targets_BL = batch.targets_BL.index_select(0, sample_B),
          .sequence_B = batch.sequence_B.index_select(0, sample_B)};
}

// Channel by channel, row by row.
Vector patch_of(const Tensor& image, int64_t row, int64_t column) {
  Vector pixels;
  for (int64_t c = 0; c < 2; ++c)
    for (int64_t y = 0; y < 2; ++y)
      for (int64_t x = 0; x < 2; ++x) pixels.push_back(image[c][2 * row + y][2 * column + x].item<double>());
  return pixels;
}

Vector unit(const Vector& x) {
  double square = 1e-6;
  for (const double v : x) square += v * v;
  Vector y = x;
  for (double& v : y) v /= std::sqrt(square);
  return y;
}

void normalise(Vector& weights) {
  double total = 0;
  for (const double w : weights) total += w;
  for (double& w : weights) w /= total;
}

// Soft MoE over the rows of one image, `slots` per expert.
Matrix plain_soft_moe(const Model& model, const std::string& moe, const Matrix& x, size_t slots) {
  const Tensor phi_SD = parameter_of(model, moe + "router.phi");
  const double scale = parameter_of(model, moe + "router.scale").item<double>();
  const auto all = static_cast<size_t>(phi_SD.size(0));
  Matrix e_of(x.size(), Vector(all));  // exp of the logits
  for (size_t t = 0; t < x.size(); ++t)
    for (size_t s = 0; s < all; ++s) {
      const Vector row = unit(x[t]), key = unit(vector_of(phi_SD[static_cast<int64_t>(s)]));
      double dot = 0;
      for (size_t i = 0; i < row.size(); ++i) dot += row[i] * key[i];
      e_of[t][s] = std::exp(scale * dot);
    }
  Matrix y(x.size(), Vector(x[0].size(), 0.0));
  Matrix combine = e_of;
  for (Vector& row : combine) normalise(row);
  for (size_t s = 0; s < all; ++s) {
    Vector dispatch(x.size()), slot(x[0].size(), 0.0);
    for (size_t t = 0; t < x.size(); ++t) dispatch[t] = e_of[t][s];
    normalise(dispatch);
    for (size_t t = 0; t < x.size(); ++t)
      for (size_t i = 0; i < slot.size(); ++i) slot[i] += dispatch[t] * x[t][i];
    const Vector out = swiglu(model, moe + "experts.", static_cast<int64_t>(s / slots), slot);
    for (size_t t = 0; t < x.size(); ++t)
      for (size_t i = 0; i < slot.size(); ++i) y[t][i] += combine[t][s] * out[i];
  }
  return y;
}

Matrix norms_of(const Matrix& x, const Tensor& weight_D) {
  Matrix all;
  for (const Vector& row : x) all.push_back(normed(row, weight_D));
  return all;
}

Vector head(const Model& model, const Vector& read) {
  Vector logits = times(parameter_of(model, "head.weight"), read);
  add_to(logits, vector_of(parameter_of(model, "head.bias")));
  return logits;
}

// One image, by loops. With a class token that is row 0 and is read alone.
Vector plain_patches(const Model& model, const Tensor& image, bool class_token) {
  Matrix x;
  if (class_token) x.push_back(vector_of(parameter_of(model, "class_embedding.weight")));
  for (int64_t p = 0; p < 6; ++p) {
    x.push_back(times(parameter_of(model, "patch.weight"), patch_of(image, p / 3, p % 3)));
    add_to(x.back(), vector_of(parameter_of(model, "patch.bias")));
  }
  for (size_t t = 0; t < x.size(); ++t)
    add_to(x[t], vector_of(parameter_of(model, "position_embedding.weight")[static_cast<int64_t>(t)]));
  for (const std::string block : {"layers.0.", "layers.1."}) {
    const Matrix attended = plain_attention(model, block, norms_of(x, parameter_of(model, block + "norm_attention")), 2,
                                            /*causal=*/false);
    for (size_t t = 0; t < x.size(); ++t) add_to(x[t], attended[t]);
    if (block == "layers.0.") {
      for (Vector& row : x)
        add_to(row, swiglu(model, "layers.0.dense.", 0, normed(row, parameter_of(model, "layers.0.norm_dense"))));
    } else {
      const Matrix y = plain_soft_moe(model, "layers.1.moe.", norms_of(x, parameter_of(model, "layers.1.norm_moe")), 2);
      for (size_t t = 0; t < x.size(); ++t) add_to(x[t], y[t]);
    }
  }
  const Matrix last = norms_of(x, parameter_of(model, "norm.weight"));
  if (class_token) return head(model, last[0]);
  Vector mean(8, 0.0);
  for (const Vector& row : last)
    for (size_t i = 0; i < mean.size(); ++i) mean[i] += row[i] / 6;
  return head(model, mean);
}

Vector plain_mlp(const Model& model, const Tensor& vector_F) {
  Vector x = times(parameter_of(model, "input.weight"), vector_of(vector_F.to(at::kDouble)));
  add_to(x, vector_of(parameter_of(model, "input.bias")));
  add_to(x, swiglu(model, "layers.0.dense.", 0, normed(x, parameter_of(model, "layers.0.norm_dense"))));
  add_to(x, softmax_top2(model, "layers.1.moe.", normed(x, parameter_of(model, "layers.1.norm_moe"))));
  return head(model, normed(x, parameter_of(model, "norm.weight")));
}

void check_logits(const Tensor& logits_1V, const Vector& expected) {
  CHECK(relative_error(logits_1V.squeeze(0), at::tensor(expected, at::kDouble)) < 1e-10);
}

std::string refused(const DataShape& data, const std::string& text) {
  try {
    model_for(data, text);
    return "";
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
}

}  // namespace

TEST_CASE("a patch classifier with soft MoE equals plain loops, image by image") {
  const bool class_token = GENERATE(false, true);
  const auto model = model_for(kImages,
                               patches_text("soft_moe", "slots_per_expert = 2\n", class_token ? "readout = \"class\"\n" : ""));
  shake(*model);
  const Batch batch = random_samples(kImages, 3);
  const Tensor logits_BLV = logits_of(*model, batch, context_of(GENERATE(Mode::kTrain, Mode::kEval)));
  REQUIRE(logits_BLV.sizes() == at::IntArrayRef({3, 1, 5}));
  for (int64_t b = 0; b < 3; ++b)
    check_logits(logits_BLV[b], plain_patches(*model, batch.values[b].to(at::kDouble), class_token));
}

TEST_CASE("a classifier of vectors equals plain loops, and its loss is their mean negative log probability") {
  const auto model = model_for(kVectors, mlp_text("softmax_topk", "k = 2\n"));
  shake(*model);
  const Batch batch = random_samples(kVectors, 4);
  const Tensor logits_BLV = logits_of(*model, batch, context_of(Mode::kEval));
  double loss = 0;
  for (int64_t b = 0; b < 4; ++b) {
    const Vector logits = plain_mlp(*model, batch.values[b]);
    check_logits(logits_BLV[b], logits);
    double total = 0;
    for (const double z : logits) total += std::exp(z);
    loss += std::log(total) - logits[static_cast<size_t>(batch.targets_BL[b].item<int64_t>())];
  }
  CHECK(batch.target_tokens() == 4);
  CHECK(std::abs(cross_entropy_sum(logits_BLV, batch.targets_BL).item<double>() - loss) < 1e-10 * loss);
}

TEST_CASE("each image is a group of its own: neither the other images nor their order change it") {
  const std::string router = GENERATE("soft_moe", "smear", "expert_choice", "lory");
  const Mode mode = GENERATE(Mode::kTrain, Mode::kEval);
  CAPTURE(router, to_string(mode));
  const auto model = model_for(kImages, patches_text(router, router == "lory" ? "segment_length = 2\n" : ""));
  shake(*model);
  const Batch batch = random_samples(kImages, 4);
  const Tensor logits_BLV = logits_of(*model, batch, context_of(mode)), turned_B = at::tensor({2, 0, 3, 1}, at::kLong);
  CHECK(relative_error(logits_of(*model, in_order(batch, turned_B), context_of(mode)), logits_BLV.index_select(0, turned_B)) <
        1e-12);
  for (int64_t b = 0; b < 4; ++b)
    CHECK(relative_error(logits_of(*model, in_order(batch, at::tensor({b}, at::kLong)), context_of(mode))[0], logits_BLV[b]) <
          1e-12);
}

TEST_CASE("a patch is told by its place: exchanging two patches changes the prediction, in every router") {
  const auto model = model_for(kImages, patches_text("soft_moe"));
  shake(*model);
  Batch batch = random_samples(kImages, 1);
  const Tensor before = logits_of(*model, batch, context_of(Mode::kEval));
  const Tensor left = batch.values.narrow(3, 0, 2).clone();
  batch.values.narrow(3, 0, 2).copy_(batch.values.narrow(3, 4, 2));
  batch.values.narrow(3, 4, 2).copy_(left);
  CHECK(relative_error(logits_of(*model, batch, context_of(Mode::kEval)), before) > 1e-3);
}

TEST_CASE("every row of every image is routed and counted, and nothing is padding") {
  const auto model = model_for(kImages, patches_text("softmax_topk", "k = 2\n", "readout = \"class\"\n"));
  const Batch batch = random_samples(kImages, 3);
  CHECK(model->context() == 7);  // six patches and the class token
  CHECK(model->rows(batch) == 21);
  const RoutingRecord record = model->forward(batch, context_of(Mode::kTrain)).sites.at(0).record;
  CHECK(record.rows == 21);
  CHECK(record.chosen_E.at(0) + record.chosen_E.at(1) + record.chosen_E.at(2) == 42);
  const auto mlp = model_for(kVectors, mlp_text("softmax_topk", "k = 2\n"));
  const Batch vectors = random_samples(kVectors, 6);
  CHECK(mlp->rows(vectors) == 6);
  CHECK(mlp->forward(vectors, context_of(Mode::kEval)).sites.at(0).record.rows == 6);
}

TEST_CASE("expert choice fills each expert in each image, and in the micro-batch of vectors") {
  const auto model = model_for(kImages, patches_text("expert_choice"));
  const RoutingRecord images = model->forward(random_samples(kImages, 3), context_of(Mode::kEval)).sites.at(0).record;
  CHECK(images.chosen_E == std::vector<int64_t>{6, 6, 6});  // round(6 / 3) = 2 rows of each of three images
  const auto mlp = model_for(kVectors, mlp_text("expert_choice", "group = \"micro\"\n"));
  const RoutingRecord vectors = mlp->forward(random_samples(kVectors, 12), context_of(Mode::kTrain)).sites.at(0).record;
  CHECK(vectors.chosen_E == std::vector<int64_t>{4, 4, 4});
}

// The softmax of one logit is 1, so the only expert's gate is 1: a layer without routing.
TEST_CASE("one expert is a dense layer, and one image is enough") {
  for (const bool images : {true, false}) {
    const DataShape& shape = images ? kImages : kVectors;
    const std::string one = "k = 1\n[[layer]]\nwhere = \"all\"\n[layer.moe]\nexperts = 1\n";
    const auto routed = model_for(shape, images ? patches_text("softmax_topk", one) : mlp_text("softmax_topk", one));
    std::string dense_text = images ? patches_text("softmax_topk", one) : mlp_text("softmax_topk", one);
    dense_text.insert(dense_text.find("layers = 2"), "twin = \"dense_total\"\n");
    const auto dense = model_for(shape, dense_text);
    shake(*routed);
    const at::NoGradGuard no_grad;
    for (const NamedTensor& entry : dense->parameters()) {
      std::string name = entry.name;
      if (const size_t at = name.find("layers.1.dense."); at == 0) name.replace(0, 15, "layers.1.moe.experts.");
      if (name == "layers.1.norm_dense") name = "layers.1.norm_moe";
      entry.tensor.copy_(parameter_of(*routed, name));
    }
    const Batch batch = random_samples(shape, 1);
    CHECK(relative_error(logits_of(*routed, batch, context_of(Mode::kEval)), logits_of(*dense, batch, context_of(Mode::kEval))) <
          1e-12);
  }
}

TEST_CASE("routers and capacities that look ahead are no matter for a model without time") {
  CHECK(refused(kImages, patches_text("soft_moe")).empty());
  CHECK(refused(kImages, patches_text("base", "eval = \"greedy\"\n")).empty());
  CHECK(refused(kVectors, mlp_text("smear")).empty());
  const auto model = model_for(
      kImages, patches_text("vmoe",
                            "k = 2\n[moe.capacity]\nmode = \"factor\"\npriority = \"batch\"\norder = \"k_major\"\n"
                            "[moe.capacity.eval]\nfactor = 0.5\n"));
  CHECK(model->training_sees_future().empty());
  CHECK(model->forward(random_samples(kImages, 2), context_of(Mode::kEval)).sites.at(0).record.dropped > 0);
}

TEST_CASE("what belongs to another model, or does not fit the images, is refused at its place") {
  CHECK_THAT(refused(kImages, "[model]\nname = \"patches\"\ncontext = 3\n"),
             ContainsSubstring("tiny.toml:3:") && ContainsSubstring("unknown key 'context'"));
  CHECK_THAT(refused(kVectors, "[model]\nname = \"mlp\"\nheads = 3\n"),
             ContainsSubstring("tiny.toml:3:") && ContainsSubstring("unknown key 'heads'"));
  CHECK_THAT(refused(kImages, "[model]\nname = \"patches\"\npatch = 4\n"),
             ContainsSubstring("tiny.toml:3:") && ContainsSubstring("patch = 4 does not divide images of 4 × 6"));
  CHECK_THAT(refused(kImages, "[model]\nname = \"pathces\"\n"),
             ContainsSubstring("tiny.toml:2:") && ContainsSubstring("did you mean 'patches'?"));
  CHECK_THAT(refused(kImages, "[model]\nname = \"patches\"\npatch = 2\nwidth = 8\nheads = 3\n"),
             ContainsSubstring("is not divisible by heads = 3"));
  CHECK_THAT(refused(kImages, patches_text("hash")), ContainsSubstring("router 'hash' needs token ids"));
  CHECK(refused(kImages, "[model]\nname = \"patches\"\npatch = 2\nwidth = 6\nheads = 2\n").empty());  // odd heads turn nothing
}

TEST_CASE("samples of another shape, and text from a classifier, are refused") {
  const auto model = model_for(kImages, patches_text("softmax_topk"));
  const DataShape wide{DataKind::kImages, 5, {2, 4, 8}};
  CHECK_THROWS_AS(model->forward(random_samples(wide, 1), StepContext{}), Error);
  DecodeState state;
  CHECK_THROWS_AS(model->decode(at::zeros({1, 1}, at::kLong), state), Error);
}

TEST_CASE("parameters of the classifiers have their names, and counts and FLOPs are those made by hand") {
  const auto model = model_for(kImages, patches_text("softmax_topk", "k = 2\n", "readout = \"class\"\n"));
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const NamedTensor& entry : model->parameters()) shapes[entry.name] = entry.tensor.sizes().vec();
  CHECK((shapes["patch.weight"] == std::vector<int64_t>{8, 8} && shapes["patch.bias"] == std::vector<int64_t>{8}));
  CHECK((shapes["class_embedding.weight"] == std::vector<int64_t>{1, 8} &&
         shapes["position_embedding.weight"] == std::vector<int64_t>{7, 8}));
  CHECK((shapes["head.weight"] == std::vector<int64_t>{5, 8} && shapes["head.bias"] == std::vector<int64_t>{5}));
  // patches 8·8 + 8, class 8, positions 7·8; per block attention 4·64, norms 2·8; dense 3·6·8; router 3·8, experts 3·3·5·8; norm
  // 8, head 5·8 + 5
  const int64_t shared = 72 + 8 + 56 + 2 * (256 + 16) + 144 + 24 + 8 + 45;
  CHECK(model->parameter_count() == shared + 360);
  CHECK(model->active_parameters() == shared + 240);
  // patches 2·64; attention 8·64 + 4·8·7 keys; dense 2·144; router 2·24, two experts 2·2·120; head 2·40 for seven rows
  CHECK(model->flops_per_token() == 128 + 2 * (512 + 224) + 288 + 48 + 480 + 80.0 / 7);
  const auto mlp = model_for(kVectors, mlp_text("softmax_topk", "k = 2\n"));
  // input 3·8 + 8; a norm per block, dense, router, experts; norm and head
  CHECK(mlp->parameter_count() == 32 + 2 * 8 + 144 + 24 + 360 + 8 + 45);
  CHECK(mlp->flops_per_token() == 48 + 288 + 48 + 480 + 80);
}

TEST_CASE("recomputation and replayed choices change nothing in a classifier") {
  const bool images = GENERATE(true, false);
  const std::string router = GENERATE("noisy_topk", "soft_moe", "expert_choice");
  CAPTURE(images, router);
  const DataShape& shape = images ? kImages : kVectors;
  const std::string k = router == "noisy_topk" ? "k = 2\n" : "";
  const auto model = model_for(shape, images ? patches_text(router, k) : mlp_text(router, k));
  shake(*model);
  const Batch batch = random_samples(shape, 3);
  StepContext context = context_of(Mode::kTrain);
  const double loss = loss_and_gradients(*model, batch, context);
  std::vector<Tensor> gradients;
  for (const NamedTensor& entry : model->parameters())
    gradients.push_back(entry.tensor.grad().defined() ? entry.tensor.grad().clone() : Tensor());
  context.recompute = true;
  CHECK(loss_and_gradients(*model, batch, context) == loss);
  size_t i = 0;
  for (const NamedTensor& entry : model->parameters()) {
    const Tensor& before = gradients[i++];
    REQUIRE(before.defined() == entry.tensor.grad().defined());
    if (before.defined()) CHECK(at::equal(entry.tensor.grad(), before));
  }
  const std::vector<Assignment> record{model->forward(batch, context_of(Mode::kTrain)).sites.at(0).assignment};
  StepContext other = context_of(Mode::kTrain);
  other.step = 77;
  other.forced = &record;
  if (record[0].defined()) CHECK(at::equal(model->forward(batch, other).sites.at(0).assignment.choice_TK, record[0].choice_TK));
}

TEST_CASE("under bf16 autocast the residual stream of a classifier stays in float32") {
  std::string text = GENERATE(patches_text("softmax_topk"), mlp_text("softmax_topk"));
  const DataShape& shape = text.find("patches") != std::string::npos ? kImages : kVectors;
  text.replace(text.find("float64"), 7, "float32");
  const auto model = model_for(shape, text);
  const Batch batch = random_samples(shape, 3);
  const Tensor exact = logits_of(*model, batch, context_of(Mode::kEval));
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const Tensor rounded = logits_of(*model, batch, context_of(Mode::kEval));
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  CHECK_FALSE(at::equal(rounded.to(at::kFloat), exact));
  CHECK(relative_error(rounded.to(at::kDouble), exact.to(at::kDouble)) < 0.05);
}
