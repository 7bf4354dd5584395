// A mixture of Markov chains over V states, as plain tables, with its exact entropy rate.
#pragma once

#include <cstdint>
#include <vector>

namespace moelab {

// A context is the last `order` tokens as a number in base V, the oldest most significant: H = V^order of them.
struct MarkovMixture {
  int64_t sources = 1;
  int64_t states = 2;  // V
  int64_t order = 1;
  double switching = 0;        // probability, before each token, to draw the source anew
  std::vector<double> prior;   // [S]
  std::vector<double> rows;    // [S, H, V]: P(next | source, context)

  int64_t contexts() const;    // H
  const double* row(int64_t source, int64_t context) const { return rows.data() + (source * contexts() + context) * states; }
  int64_t shift(int64_t context, int64_t token) const { return (context * states + token) % contexts(); }
};

// [S, H]: the long-run distribution of (source, context) seen just after a token, started from the prior. Error(kUsage) when
// the chain mixes too slowly to find it.
std::vector<double> stationary_distribution(const MarkovMixture& mixture);

// Bits per token, given the source of each token: Σ over (source, context) of probability · entropy of the row. Without
// switching this is the entropy rate of the mixture; with it, a lower bound.
double entropy_rate_bits(const MarkovMixture& mixture, const std::vector<double>& stationary);

}  // namespace moelab
