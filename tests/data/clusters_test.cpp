// Clusters of vectors: their geometry, their rules, and the entropy they claim.
#include "tests/data/data_support.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <cmath>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

const std::map<std::string, OptionValue> kFew{{"clusters", int64_t{3}}, {"features", int64_t{4}}, {"classes", int64_t{3}}};

std::shared_ptr<const Dataset> clusters(std::map<std::string, OptionValue> set) {
  set.insert(kFew.begin(), kFew.end());
  return make("clusters", 0, set);
}

// Many training vectors at once.
Batch many(const Dataset& data, int64_t count = 30000) { return data.train_batch(5, 0, 0, count, count); }

Tensor mean_of_cluster(const Batch& batch, int64_t cluster) {
  return batch.values.index_select(0, batch.domain_B.eq(cluster).nonzero().squeeze(1)).to(at::kDouble).mean(0);
}

// Accuracy on `batch` of the best linear map with a constant, fitted by least squares to one-hot labels of the same batch.
double linear_accuracy(const Batch& batch) {
  const Tensor x = at::cat({batch.values.to(at::kDouble), at::ones({batch.values.size(0), 1}, at::kDouble)}, 1);
  const Tensor y = at::one_hot(batch.targets_BL.squeeze(1)).to(at::kDouble);
  const Tensor weight = at::linalg_solve(x.t().matmul(x), x.t().matmul(y));
  return x.matmul(weight).argmax(1).eq(batch.targets_BL.squeeze(1)).to(at::kDouble).mean().item<double>();
}

Batch rows_of(const Batch& batch, const Tensor& index_N) {
  return {.values = batch.values.index_select(0, index_N), .targets_BL = batch.targets_BL.index_select(0, index_N)};
}

}  // namespace

TEST_CASE("clusters lie at the asked distance, with variance 1 around their centres and the asked prior") {
  const auto data = clusters({{"separation", 6.0}, {"prior_zipf", 1.0}});
  CHECK((data->shape().kind == DataKind::kVectors && data->domains() == 3));
  const Batch batch = many(*data);
  const double prior[] = {6.0 / 11, 3.0 / 11, 2.0 / 11};  // 1 : 1/2 : 1/3
  for (int64_t k = 0; k < 3; ++k) {
    const Tensor member_N = batch.domain_B.eq(k).nonzero().squeeze(1);
    CHECK(std::abs(static_cast<double>(member_N.numel()) / 30000 - prior[k]) < 0.012);  // 4 standard deviations
    const Tensor centre_F = mean_of_cluster(batch, k);
    CHECK(std::abs(centre_F.norm().item<double>() - 6) < 0.12);  // the mean of 5454 vectors is off by 0.0135 in each feature
    const Tensor spread = rows_of(batch, member_N).values.to(at::kDouble).sub(centre_F);
    CHECK(std::abs(spread.square().mean().item<double>() - 1) < 0.06);
  }
}

TEST_CASE("each cluster is linear and all together are not, so that experts have something to find") {
  const Batch batch = many(*clusters({{"separation", 6.0}}));
  CHECK(linear_accuracy(batch) < 0.75);
  for (int64_t k = 0; k < 3; ++k) CHECK(linear_accuracy(rows_of(batch, batch.domain_B.eq(k).nonzero().squeeze(1))) > 0.9);
}

// Far apart the cluster is certain, and so is the class. At distance 0 all centres are one, and the cluster says nothing: given x
// the class is that of rule k with probability 1/3 each, so the entropy is 0 where all agree, 1.585 where all differ.
TEST_CASE("the known entropy is 0 far apart, and that of a blind choice of rules when all centres are one") {
  CHECK(clusters({{"separation", 60.0}})->known_entropy_bits() < 1e-12);
  const auto data = clusters({{"separation", 0.0}, {"validation_vectors", int64_t{20000}}});
  const double claimed = data->known_entropy_bits();
  CHECK((claimed > 0.3 && claimed < std::log2(3.0)));
  // Every predictor needs at least as much: one that counts, in cells of a rough grid, which classes follow. Cells mix x with
  // different classes, which costs bits; with signs of 4 features it is a weak one.
  const Batch batch = many(*data, 20000);
  const Tensor cell_N = batch.values.gt(0).to(at::kLong).mul(at::tensor({1, 2, 4, 8}, at::kLong)).sum(1);
  double bits = 0;
  for (int64_t cell = 0; cell < 16; ++cell) {
    const Tensor label_M = batch.targets_BL.squeeze(1).index_select(0, cell_N.eq(cell).nonzero().squeeze(1));
    const Tensor share_V = at::bincount(label_M, {}, 3).to(at::kDouble).div(label_M.numel());
    bits -= share_V.mul(share_V.clamp_min(1e-9).log2()).sum().item<double>() * static_cast<double>(label_M.numel()) / 20000;
  }
  CHECK(bits > claimed);
}

// Two clusters on a line of one feature: p(class | x) is worked out by hand in closed form and integrated by Simpson's rule.
TEST_CASE("the known entropy of two clusters of one feature is the integral over the line") {
  const auto data = make("clusters", 0,
                         {{"clusters", int64_t{2}},
                          {"features", int64_t{1}},
                          {"classes", int64_t{2}},
                          {"separation", 1.0},
                          {"source_seed", int64_t{3}},
                          {"validation_vectors", int64_t{200000}}});
  const Batch batch = many(*data, 4000);
  // Directions of one feature are ±1, so a rule says one class above its centre and one below. Both may be the same.
  const auto only_label = [&](const Tensor& chosen_N) {
    const Tensor label_M = batch.targets_BL.squeeze(1).index_select(0, chosen_N.nonzero().squeeze(1));
    REQUIRE(label_M.eq(label_M[0]).all().item<bool>());
    return label_M[0].item<double>();
  };
  double centre[2], above[2], below[2];
  for (int64_t k = 0; k < 2; ++k) {
    const Tensor member_N = batch.domain_B.eq(k), x_N = batch.values.squeeze(1);
    centre[k] = mean_of_cluster(batch, k).item<double>() > 0 ? 1 : -1;
    above[k] = only_label(member_N.logical_and(x_N.gt(centre[k])));
    below[k] = only_label(member_N.logical_and(x_N.lt(centre[k])));
  }
  double bits = 0;
  const double step = 0.001;
  for (int i = 0; i <= 20000; ++i) {
    const double x = -10 + step * i, weight = (i == 0 || i == 20000 ? 1 : i % 2 == 1 ? 4 : 2) * step / 3;
    double one = 0, density = 0;
    for (int k = 0; k < 2; ++k) {
      const double p = std::exp(-(x - centre[k]) * (x - centre[k]) / 2) / std::sqrt(2 * M_PI) / 2;
      density += p;
      one += p * (x > centre[k] ? above[k] : below[k]);
    }
    const double p1 = one / density;
    if (p1 > 0 && p1 < 1) bits -= weight * density * (p1 * std::log2(p1) + (1 - p1) * std::log2(1 - p1));
  }
  CHECK(std::abs(data->known_entropy_bits() - bits) < 0.01);  // 200000 vectors: a standard deviation of 0.001
}

TEST_CASE("vectors depend on seed, step and index alone, and validation is another stream") {
  const auto data = clusters({{"validation_vectors", int64_t{8}}});
  const Batch whole = data->train_batch(1, 5, 0, 12, 12), slice = data->train_batch(1, 5, 3, 4, 12);
  CHECK(at::equal(slice.values, whole.values.narrow(0, 3, 4)));
  CHECK(at::equal(slice.targets_BL, whole.targets_BL.narrow(0, 3, 4)));
  CHECK(at::equal(slice.domain_B, whole.domain_B.narrow(0, 3, 4)));
  CHECK((values(slice.sequence_B) == std::vector<int64_t>{3, 4, 5, 6}));
  CHECK_FALSE(at::equal(whole.values, data->train_batch(1, 6, 0, 12, 12).values));
  CHECK_FALSE(at::equal(whole.values, data->train_batch(2, 5, 0, 12, 12).values));
  const Batch eval = data->eval_batch(0, 8);
  CHECK(at::equal(data->eval_batch(5, 2).values, eval.values.narrow(0, 5, 2)));
  for (int64_t step = 0; step < 50; ++step)
    for (const int64_t seed : {0, 1}) {
      const Tensor same = data->train_batch(seed, step, 0, 8, 8).values.unsqueeze(1).eq(eval.values.unsqueeze(0)).all(2);
      CHECK_FALSE(same.any().item<bool>());
    }
  CHECK_FALSE(at::equal(clusters({{"validation_vectors", int64_t{8}}, {"source_seed", int64_t{1}}})->eval_batch(0, 8).values,
                        eval.values));
}
