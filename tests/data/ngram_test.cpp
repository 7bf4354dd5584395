#include "datasets/ngram.h"

#include <catch2/catch_test_macros.hpp>

#include <cmath>
#include <map>
#include <string>

using namespace moelab;

namespace {

std::vector<uint8_t> to_bytes(const std::string& text) { return {text.begin(), text.end()}; }

bool near(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(b); }

// The definition, word by word, on maps from context to counts.
struct SlowNgram {
  std::map<std::string, std::map<uint8_t, double>> followers;

  SlowNgram(const std::string& text, size_t longest) {
    for (size_t i = 0; i < text.size(); ++i) {
      for (size_t k = 0; k <= std::min(i, longest); ++k) followers[text.substr(i - k, k)][static_cast<uint8_t>(text[i])] += 1;
    }
  }

  double probability(const std::string& history, uint8_t next) const {
    const double shorter = history.empty() ? 1.0 / 256 : probability(history.substr(1), next);
    const auto found = followers.find(history);
    if (found == followers.end()) return shorter;
    double total = 0;
    for (const auto& [byte, count] : found->second) total += count;
    const double kinds = static_cast<double>(found->second.size());
    const double hits = found->second.count(next) ? found->second.at(next) : 0;
    return (hits + kinds * shorter) / (total + kinds);
  }
};

std::string random_text(uint32_t seed, size_t size, uint32_t kinds) {
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    seed = seed * 1664525u + 1013904223u;
    text += static_cast<char>(255 - (seed >> 24) % kinds);  // high bytes: signs must not matter
  }
  return text;
}

}  // namespace

TEST_CASE("Witten-Bell probabilities of abracadabra are those worked by hand") {
  // Eleven bytes: a 5, b 2, r 2, c 1, d 1, so c() = 11 and N() = 5. After a: b 2, c 1, d 1 (the last a has no follower), so
  // c(a) = 4 and N(a) = 3. After ra: c once. In units of 1/256: 5/256 = 0.01953125.
  const std::vector<uint8_t> train = to_bytes("abracadabra");
  const NgramModel model(train, 2);
  const auto p = [&](const std::string& history, char next) { return model.probabilities(to_bytes(history), next); };

  // P_0(a) = (5 + 5/256)/16
  CHECK(near(p("", 'a')[0], 5.01953125 / 16));
  // P_1(b|a) = (2 + 3·(2.01953125/16))/7 = 2.378662109375/7
  CHECK(near(p("a", 'b')[1], 2.378662109375 / 7));
  // P_0(c) = 1.01953125/16 = 0.063720703125, P_1(c|a) = (1 + 3·P_0)/7 = 0.170166015625, P_2(c|ra) = (1 + P_1)/2
  CHECK(near(p("ra", 'c')[0], 0.063720703125));
  CHECK(near(p("ra", 'c')[1], 0.170166015625));
  CHECK(near(p("ra", 'c')[2], 0.5850830078125));
  // A byte never seen: P_0(z) = (5/256)/16, P_1(z|a) = 3·P_0/7, P_2(z|ra) = P_1/2
  CHECK(near(p("ra", 'z')[2], 0.01953125 / 16 * 3 / 7 / 2));
  // A history never seen falls back wholly; so does one that is too short.
  CHECK(near(p("az", 'a')[2], 5.01953125 / 16));
  CHECK(near(p("a", 'b')[2], 2.378662109375 / 7));

  // The text "ab" after nothing: a by P_0 (twice), b by P_0 or P_1.
  const std::vector<double> bits = bits_per_byte(model, to_bytes("ab"));
  CHECK(near(bits[0], -(std::log2(5.01953125 / 16) + std::log2(2.01953125 / 16)) / 2));
  CHECK(near(bits[1], -(std::log2(5.01953125 / 16) + std::log2(2.378662109375 / 7)) / 2));
}

TEST_CASE("the probabilities of all bytes after any history sum to one") {
  const std::vector<uint8_t> train = to_bytes(random_text(1, 500, 5));
  const NgramModel model(train, 7);
  for (const std::string& history : {std::string(), random_text(2, 7, 5), random_text(3, 3, 5), std::string("\0\1unseen", 8)}) {
    std::vector<double> sums(8, 0.0);
    for (int byte = 0; byte < 256; ++byte) {
      const std::vector<uint8_t> context = to_bytes(history).size() > 7 ? to_bytes(history.substr(1)) : to_bytes(history);
      const std::vector<double> probability = model.probabilities(context, static_cast<uint8_t>(byte));
      for (size_t k = 0; k < 8; ++k) sums[k] += probability[k];
    }
    for (const double sum : sums) CHECK(near(sum, 1));
  }
}

TEST_CASE("n-gram bits per byte equal a slow implementation on maps") {
  for (const uint32_t kinds : {2u, 4u, 30u, 256u}) {
    const std::string train = random_text(kinds, 400, kinds), text = random_text(kinds + 1, 150, kinds);
    const std::vector<double> bits = bits_per_byte(NgramModel(to_bytes(train), 7), to_bytes(text));
    const SlowNgram slow(train, 7);
    for (size_t k = 0; k <= 7; ++k) {
      double expected = 0;
      for (size_t i = 0; i < text.size(); ++i) {
        const size_t known = std::min(i, k);
        expected -= std::log2(slow.probability(text.substr(i - known, known), static_cast<uint8_t>(text[i])));
      }
      CHECK(near(bits[k], expected / static_cast<double>(text.size())));
    }
  }
}

TEST_CASE("an untrained n-gram model spends eight bits on every byte") {
  const std::vector<double> bits = bits_per_byte(NgramModel({}, 5), to_bytes("any text"));
  for (const double value : bits) CHECK(near(value, 8));
}
