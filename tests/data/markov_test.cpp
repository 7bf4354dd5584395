#include "datasets/dirichlet.h"
#include "datasets/markov_chain.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

#include <cmath>
#include <map>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

bool close(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance; }

double binary_entropy(double p) { return -p * std::log2(p) - (1 - p) * std::log2(1 - p); }

// Entropy of the next token given the last `order` ones and the label, estimated from counts, in bits.
double empirical_entropy(const Dataset& data, int64_t order, int steps) {
  std::map<std::vector<int64_t>, std::map<int64_t, double>> followers;
  double total = 0;
  for (int step = 0; step < steps; ++step) {
    const Batch batch = data.train_batch(3, step, 0, 16, 16);
    const int64_t length = batch.tokens_BL.size(1);
    const std::vector<int64_t> tokens = values(batch.tokens_BL), targets = values(batch.targets_BL),
                               label = values(batch.domain_B);
    for (int64_t b = 0; b < 16; ++b) {
      for (int64_t i = order - 1; i < length; ++i) {
        std::vector<int64_t> context{label[b]};
        for (int64_t j = i - order + 1; j <= i; ++j) context.push_back(tokens[b * length + j]);
        followers[context][targets[b * length + i]] += 1;
        ++total;
      }
    }
  }
  double bits = 0;
  for (const auto& [context, counts] : followers) {
    double row = 0;
    for (const auto& [token, count] : counts) row += count;
    for (const auto& [token, count] : counts) bits -= count * std::log2(count / row);
  }
  return bits / total;
}

}  // namespace

TEST_CASE("the entropy rate of a two-state chain is the one worked by hand") {
  // Leaves 0 with 0.1 and 1 with 0.4: pi = (0.8, 0.2), rate = 0.8·H(0.1) + 0.2·H(0.4).
  const MarkovMixture chain{.sources = 1, .states = 2, .order = 1, .switching = 0, .prior = {1}, .rows = {0.9, 0.1, 0.4, 0.6}};
  const std::vector<double> stationary = stationary_distribution(chain);
  CHECK(close(stationary[0], 0.8, 1e-11));
  CHECK(close(stationary[1], 0.2, 1e-11));
  CHECK(close(entropy_rate_bits(chain, stationary), 0.8 * binary_entropy(0.1) + 0.2 * binary_entropy(0.4), 1e-10));
}

TEST_CASE("a chain that alternates has a stationary distribution and no entropy") {
  const MarkovMixture chain{.sources = 1, .states = 2, .order = 1, .switching = 0, .prior = {1}, .rows = {0, 1, 1, 0}};
  const std::vector<double> stationary = stationary_distribution(chain);
  CHECK(close(stationary[0], 0.5, 1e-12));
  CHECK(entropy_rate_bits(chain, stationary) == 0);
}

TEST_CASE("a mixture weighs its sources by their prior") {
  // Source 0 as above; source 1 draws fair coins: rate 1.
  const MarkovMixture mixture{.sources = 2, .states = 2, .order = 1, .switching = 0, .prior = {0.25, 0.75},
                              .rows = {0.9, 0.1, 0.4, 0.6, 0.5, 0.5, 0.5, 0.5}};
  const double first = 0.8 * binary_entropy(0.1) + 0.2 * binary_entropy(0.4);
  CHECK(close(entropy_rate_bits(mixture, stationary_distribution(mixture)), 0.25 * first + 0.75, 1e-10));
}

TEST_CASE("order two puts the oldest token first") {
  // The next token repeats the one before the last with 0.9: contexts 00, 01, 10, 11 give 0 with 0.9, 0.9, 0.1, 0.1. By
  // symmetry every context is equally likely, so the rate is H(0.1).
  const MarkovMixture chain{.sources = 1, .states = 2, .order = 2, .switching = 0, .prior = {1},
                            .rows = {0.9, 0.1, 0.9, 0.1, 0.1, 0.9, 0.1, 0.9}};
  const std::vector<double> stationary = stationary_distribution(chain);
  for (const double share : stationary) CHECK(close(share, 0.25, 1e-11));
  CHECK(close(entropy_rate_bits(chain, stationary), binary_entropy(0.1), 1e-10));
}

TEST_CASE("always switching between two sources gives the chain of their mean row") {
  // The source is drawn anew before each token, so tokens follow the mean row: from 0 to 1 with 0.3, from 1 to 0 with 0.45:
  // pi = (0.6, 0.4). Told the source: 0.6·(H(0.1)+H(0.5))/2 + 0.4·(H(0.4)+H(0.5))/2.
  const MarkovMixture mixture{.sources = 2, .states = 2, .order = 1, .switching = 1, .prior = {0.5, 0.5},
                              .rows = {0.9, 0.1, 0.4, 0.6, 0.5, 0.5, 0.5, 0.5}};
  const std::vector<double> stationary = stationary_distribution(mixture);
  CHECK(close(stationary[0] + stationary[2], 0.6, 1e-11));
  const double expected = 0.6 * (binary_entropy(0.1) + 1) / 2 + 0.4 * (binary_entropy(0.4) + 1) / 2;
  CHECK(close(entropy_rate_bits(mixture, stationary), expected, 1e-10));
}

TEST_CASE("what the generator writes has the entropy it claims") {
  for (const int64_t order : {1, 2}) {
    const auto data = make("markov", 256,
                           {{"sources", int64_t{3}}, {"states", int64_t{5}}, {"order", order}, {"prior_zipf", 1.0}});
    const double known = data->known_entropy_bits();
    // 1.2 million tokens, at most 3·25 contexts of 5 tokens: bias (300/2)/1.2e6/ln 2 = 2e-4 bits. The documents' labels are the
    // larger part: 4800 draws of three sources, whose rates differ by less than 1 bit, give 0.007.
    CHECK(known > 0.2);
    CHECK(known < std::log2(5));
    CHECK(close(empirical_entropy(*data, order, 300), known, 0.025));
  }
}

TEST_CASE("a shorter memory than the chain's costs bits") {
  const auto data = make("markov", 256, {{"sources", int64_t{1}}, {"states", int64_t{4}}, {"order", int64_t{2}}});
  CHECK(close(empirical_entropy(*data, 2, 100), data->known_entropy_bits(), 0.01));
  CHECK(empirical_entropy(*data, 1, 100) > data->known_entropy_bits() + 0.05);
}

TEST_CASE("labels follow the prior and token counts the long run") {
  const auto data = make("markov", 128, {{"sources", int64_t{2}}, {"states", int64_t{4}}, {"prior_zipf", 1.0}});
  std::vector<double> labels(2), tokens(4);
  for (int step = 0; step < 200; ++step) {
    const Batch batch = data->train_batch(0, step, 0, 20, 20);
    for (const int64_t label : values(batch.domain_B)) labels[label] += 1.0 / 4000;
    for (const int64_t token : values(batch.tokens_BL)) tokens[token] += 1.0 / (4000 * 128);
  }
  CHECK(close(labels[0], 2.0 / 3, 0.035));  // prior 1 : 1/2; sd = 0.0075
  const std::vector<int64_t> counts = values(data->token_counts_V());
  for (size_t v = 0; v < 4; ++v) CHECK(close(tokens[v], static_cast<double>(counts[v]) / (1 << 20), 0.03));
}

TEST_CASE("validation documents do not depend on the training seed and are not among the training documents") {
  const auto data = make("markov", 64, {{"validation_documents", int64_t{8}}});
  CHECK(data->eval_sequences() == 8);
  const std::vector<int64_t> eval = values(data->eval_batch(0, 8).tokens_BL);
  for (const int64_t seed : {0, 1}) {
    for (int64_t step = 0; step < 50; ++step) CHECK(values(data->train_batch(seed, step, 0, 8, 8).tokens_BL) != eval);
  }
  const auto other = make("markov", 64, {{"validation_documents", int64_t{8}}, {"source_seed", int64_t{1}}});
  CHECK(values(other->eval_batch(0, 8).tokens_BL) != eval);
}

TEST_CASE("Dirichlet rows are probabilities with the right mean square, also for tiny alpha") {
  // E[p²] = (alpha + 1)/(V·(V·alpha + 1)); over 4000 rows of 4 the mean is within a few per cent.
  for (const double alpha : {0.01, 0.5, 1.0, 20.0}) {
    DrawSequence draws(random_key(1, "test"));
    double square = 0;
    for (int row = 0; row < 4000; ++row) {
      double p[4];
      draw_dirichlet(draws, alpha, p, 4);
      CHECK(close(p[0] + p[1] + p[2] + p[3], 1, 1e-12));
      square += (p[0] * p[0] + p[1] * p[1] + p[2] * p[2] + p[3] * p[3]) / 16000;
    }
    const double expected = (alpha + 1) / (4 * (4 * alpha + 1));
    CHECK(close(square, expected, 0.03 * expected));
  }
}

TEST_CASE("a table too large for memory is refused before it is made") {
  const Failure failure = failure_of([] { make("markov", 16, {{"states", int64_t{4096}}, {"order", int64_t{8}}}); });
  CHECK(failure.code == ExitCode::kUsage);
  CHECK(failure.says("lower one of them"));
}
