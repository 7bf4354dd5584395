// Vectors from Gaussian clusters, each with a classification rule of its own: what experts are for, with the right partition
// known.
//
//   x = c_k + ξ,  ξ ~ N(0, I) of F features;  c_k a random direction times `separation`;  k drawn with probability ∝ (k +
//   1)^-prior_zipf class = argmax_j ⟨w_kj, ξ⟩,  w_kj random directions;  k is the vector's domain label
//
// One linear map fits no cluster but its own, and a model that finds the clusters needs a linear map in each.
//
// Known entropy (bits per vector): the mean over the validation split of -log2 p(class | x) of the best predictor, who knows all
// c and w but not k: p(class | x) = Σ_k p(k | x) [rule k says class], p(k | x) ∝ prior_k exp(-|x - c_k|² / 2).
//
// Centres and rules depend on `source_seed` alone; training vectors on (seed, step, index); validation vectors on `source_seed`
// and their number, under another key.
#include "core/dataset.h"
#include "core/error.h"
#include "datasets/dirichlet.h"
#include "datasets/discrete.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

namespace moelab {
namespace {

using Point = std::vector<double>;

Point random_direction(DrawSequence& draws, int64_t features, double length) {
  Point point(features);
  double square = 0;
  for (double& x : point) {
    x = draws.normal();
    square += x * x;
  }
  for (double& x : point) x *= length / std::sqrt(square);
  return point;
}

struct Cluster {
  Point centre;
  std::vector<Point> rule;  // one direction per class

  int64_t class_of(const Point& x) const {
    std::vector<double> score(rule.size(), 0.0);
    for (size_t j = 0; j < rule.size(); ++j)
      for (size_t i = 0; i < x.size(); ++i) score[j] += rule[j][i] * (x[i] - centre[i]);
    return std::max_element(score.begin(), score.end()) - score.begin();
  }

  double square_distance(const Point& x) const {
    double square = 0;
    for (size_t i = 0; i < x.size(); ++i) square += (x[i] - centre[i]) * (x[i] - centre[i]);
    return square;
  }
};

struct ClusterSample {
  Point x;
  int64_t cluster = 0;
  int64_t label = 0;
};

std::vector<Cluster> draw_clusters(const Options& options) {
  DrawSequence draws(random_key(options.integer("source_seed"), "clusters.rules"));
  std::vector<Cluster> clusters(options.integer("clusters"));
  for (Cluster& cluster : clusters) {
    cluster.centre = random_direction(draws, options.integer("features"), options.real("separation"));
    for (int64_t j = 0; j < options.integer("classes"); ++j)
      cluster.rule.push_back(random_direction(draws, options.integer("features"), 1));
  }
  return clusters;
}

class ClustersDataset : public Dataset {
 public:
  explicit ClustersDataset(const Options& options)
      : clusters_(draw_clusters(options)),
        prior_(zipf_prior(options.integer("clusters"), options.real("prior_zipf"))),
        prior_sums_(running_sums(prior_, options.integer("clusters"))),
        features_(options.integer("features")),
        classes_(options.integer("classes")),
        eval_vectors_(options.integer("validation_vectors")),
        eval_key_(random_key(options.integer("source_seed"), "clusters.validation")) {}

  DataShape shape() const override { return {.kind = DataKind::kVectors, .classes = classes_, .sample = {features_}}; }
  int64_t domains() const override { return static_cast<int64_t>(clusters_.size()); }

  Batch train_batch(int64_t seed, int64_t step, int64_t first, int64_t count, int64_t batch) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= batch, "a slice of a training batch lies outside it");
    return vectors(random_key(seed, "data").with("step", step), first, count);
  }

  int64_t eval_sequences() const override { return eval_vectors_; }
  Batch eval_batch(int64_t first, int64_t count) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= eval_vectors_, "a validation slice lies outside the split");
    return vectors(eval_key_, first, count);
  }

  double known_entropy_bits() const override {
    double bits = 0;
    for (int64_t v = 0; v < eval_vectors_; ++v) bits -= std::log2(probability_of_label(draw_vector(eval_key_, v)));
    return bits / static_cast<double>(eval_vectors_);
  }

 private:
  ClusterSample draw_vector(RandomKey key, int64_t index) const {
    DrawSequence draws(key.with("vector", index));
    ClusterSample sample;
    sample.cluster = draw_from(prior_sums_.data(), domains(), draws.uniform());
    const Cluster& cluster = clusters_[sample.cluster];
    for (const double centre : cluster.centre) sample.x.push_back(centre + draws.normal());
    sample.label = cluster.class_of(sample.x);
    return sample;
  }

  Batch vectors(RandomKey key, int64_t first, int64_t count) const {
    Batch out{.values = at::empty({count, features_}, at::kFloat),
              .targets_BL = at::empty({count, 1}, at::kLong),
              .sequence_B = at::arange(first, first + count, at::kLong),
              .domain_B = at::empty({count}, at::kLong)};
    for (int64_t b = 0; b < count; ++b) {
      const ClusterSample sample = draw_vector(key, first + b);
      std::copy(sample.x.begin(), sample.x.end(), out.values.mutable_data_ptr<float>() + b * features_);
      out.targets_BL.mutable_data_ptr<int64_t>()[b] = sample.label;
      out.domain_B.mutable_data_ptr<int64_t>()[b] = sample.cluster;
    }
    return out;
  }

  // Of the best predictor that is not told the cluster. Weights are taken relative to the sample's own cluster, so none overflows
  // and their sum is never 0.
  double probability_of_label(const ClusterSample& sample) const {
    const double own = clusters_[sample.cluster].square_distance(sample.x);
    double right = 0, all = 0;
    for (size_t k = 0; k < clusters_.size(); ++k) {
      const double weight = prior_[k] * std::exp(std::min(500.0, (own - clusters_[k].square_distance(sample.x)) / 2));
      all += weight;
      if (clusters_[k].class_of(sample.x) == sample.label) right += weight;
    }
    return right / all;
  }

  std::vector<Cluster> clusters_;
  std::vector<double> prior_;
  std::vector<double> prior_sums_;
  int64_t features_;
  int64_t classes_;
  int64_t eval_vectors_;
  RandomKey eval_key_;
};

const Registration<DatasetEntry> clusters_registration{{
    .name = "clusters",
    .title = "Gaussian clusters of vectors, each with its own classification rule",
    .citation = "generated; after Chen, Deng, Wu, Gu, Li, 2022, arXiv:2208.02813, whose clusters differ in more",
    .doc = "The cluster is the domain label, the class is the largest of a few linear maps that belong to the cluster. Training "
           "vectors never end and never repeat; validation vectors come from another stream.",
    .holds = DataKind::kVectors,
    .options = {option("clusters", 8, "number of clusters").between(1, 4096),
                option("features", 16, "length of a vector").between(1, 4096),
                option("classes", 4, "labels to predict").between(2, 4096),
                option("separation", 4.0, "distance of each centre from the origin, in standard deviations of a feature")
                    .between(0, 100),
                option("prior_zipf", 0.0, "cluster k has probability in proportion to (k + 1)^-prior_zipf").between(0, 10),
                option("source_seed", 0, "draws centres, rules and the validation vectors"),
                option("validation_vectors", 1024, "number of validation vectors").between(1, 1e6)},
    .make = [](const DatasetSpec& spec) -> std::shared_ptr<const Dataset> {
      return std::make_shared<ClustersDataset>(spec.options);
    },
}};

}  // namespace
}  // namespace moelab
