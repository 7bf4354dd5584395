#include "datasets/markov_chain.h"

#include "core/error.h"

#include <cmath>
#include <utility>

namespace moelab {
namespace {

constexpr int kMaxSweeps = 10000;
constexpr double kTolerance = 1e-13;  // largest total change of a sweep

// The source may be drawn anew: (1 - s) · p(source, context) + s · prior(source) · p(context).
std::vector<double> switch_sources(const MarkovMixture& mixture, const std::vector<double>& before) {
  if (mixture.switching == 0) return before;
  const int64_t contexts = mixture.contexts();
  std::vector<double> after(before.size());
  for (int64_t h = 0; h < contexts; ++h) {
    double total = 0;
    for (int64_t s = 0; s < mixture.sources; ++s) total += before[s * contexts + h];
    for (int64_t s = 0; s < mixture.sources; ++s) {
      const double kept = (1 - mixture.switching) * before[s * contexts + h];
      after[s * contexts + h] = kept + mixture.switching * mixture.prior[s] * total;
    }
  }
  return after;
}

std::vector<double> emit_token(const MarkovMixture& mixture, const std::vector<double>& before) {
  const int64_t contexts = mixture.contexts();
  std::vector<double> after(before.size(), 0.0);
  for (int64_t s = 0; s < mixture.sources; ++s) {
    for (int64_t h = 0; h < contexts; ++h) {
      const double* row = mixture.row(s, h);
      const double weight = before[s * contexts + h];
      for (int64_t v = 0; v < mixture.states; ++v) after[s * contexts + mixture.shift(h, v)] += weight * row[v];
    }
  }
  return after;
}

double row_entropy_bits(const double* row, int64_t states) {
  double bits = 0;
  for (int64_t v = 0; v < states; ++v) bits -= row[v] > 0 ? row[v] * std::log2(row[v]) : 0;
  return bits;
}

}  // namespace

int64_t MarkovMixture::contexts() const {
  int64_t count = 1;
  for (int64_t i = 0; i < order; ++i) count *= states;
  return count;
}

// Power iteration of the lazy chain, which has the same stationary distribution and cannot oscillate.
std::vector<double> stationary_distribution(const MarkovMixture& mixture) {
  const int64_t contexts = mixture.contexts();
  std::vector<double> now(mixture.sources * contexts);
  for (size_t i = 0; i < now.size(); ++i) now[i] = mixture.prior[i / contexts] / static_cast<double>(contexts);
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    const std::vector<double> next = emit_token(mixture, switch_sources(mixture, now));
    double change = 0;
    for (size_t i = 0; i < now.size(); ++i) {
      change += std::abs(next[i] - now[i]);
      now[i] = 0.5 * (now[i] + next[i]);
    }
    if (change < kTolerance) return now;
  }
  usage_error("data set 'markov': the chain mixes too slowly for an exact entropy rate; raise `alpha` or change `source_seed`");
}

double entropy_rate_bits(const MarkovMixture& mixture, const std::vector<double>& stationary) {
  const std::vector<double> emitting = switch_sources(mixture, stationary);
  const int64_t contexts = mixture.contexts();
  double bits = 0;
  for (int64_t s = 0; s < mixture.sources; ++s) {
    for (int64_t h = 0; h < contexts; ++h) {
      bits += emitting[s * contexts + h] * row_entropy_bits(mixture.row(s, h), mixture.states);
    }
  }
  return bits;
}

}  // namespace moelab
