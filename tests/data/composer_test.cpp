// Composers: whole documents end to end, at random or along a path of similar ones.
#include "datasets/byte_text.h"
#include "datasets/composer.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <map>
#include <numeric>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

std::vector<int64_t> path_of(const std::vector<std::vector<int64_t>>& documents) {
  DocumentProfiles profiles(std::ssize(documents));
  for (size_t d = 0; d < documents.size(); ++d) profiles.set(static_cast<int64_t>(d), documents[d]);
  return profiles.similar_path();
}

bool is_permutation_of_all(std::vector<int64_t> order, int64_t count) {
  std::sort(order.begin(), order.end());
  std::vector<int64_t> all(count);
  std::iota(all.begin(), all.end(), 0);
  return order == all;
}

// 26 documents, each of one letter and of a length of its own: 31 … 56 bytes.
ByteSplit lettered_split() {
  ByteSplit split;
  for (int d = 0; d < 26; ++d) {
    split.train.insert(split.train.end(), 31 + d, static_cast<uint8_t>('a' + d));
    split.document_ends.push_back(std::ssize(split.train));
  }
  split.validation.assign(40, '9');
  return split;
}

constexpr int64_t kLetteredBytes = 26 * 31 + 25 * 26 / 2, kLetteredContext = 16;
constexpr int64_t kLetteredSequences = (kLetteredBytes + kLetteredContext - 1) / kLetteredContext;

// Documents of two kinds of words, one kind and the other by turns.
ByteSplit two_kinds(int documents) {
  ByteSplit split;
  for (int d = 0; d < documents; ++d) {
    std::string text = wordy_text(300, static_cast<uint32_t>(d + 1));
    if (d % 2 == 1) std::transform(text.begin(), text.end(), text.begin(), [](char c) { return std::toupper(c); });
    split.train.insert(split.train.end(), text.begin(), text.end());
    split.document_ends.push_back(std::ssize(split.train));
  }
  split.validation.assign(700, 'x');
  return split;
}

// How often the document of a place and another one that follows it in the same sequence are of one kind.
struct Neighbours {
  int64_t alike = 0, all = 0;
  double share() const { return static_cast<double>(alike) / static_cast<double>(all); }
};

Neighbours neighbours_in(const Tensor& document_BL, const Tensor& kind_BL) {
  Neighbours found;
  const int64_t length = document_BL.size(1);
  const std::vector<int64_t> document = values(document_BL), kind = values(kind_BL);
  for (size_t i = 1; i < document.size(); ++i) {
    if (i % length == 0 || document[i] == document[i - 1] || document[i] < 0) continue;
    ++found.all;
    found.alike += kind[i] == kind[i - 1];
  }
  return found;
}

// Of each document in sequences of 8 + 8 + 4 targets: its label and its first three tokens behind the boundary.
std::map<int64_t, std::vector<int64_t>> starts_of_documents(const Batch& batch) {
  std::map<int64_t, std::vector<int64_t>> starts;
  for (int64_t b = 0; b < batch.tokens_BL.size(0); ++b)
    for (const int64_t begin : {1, 9, 17}) {
      const std::vector<int64_t> tokens = values(batch.tokens_BL[b].narrow(0, begin, 3));
      std::vector<int64_t>& start = starts[batch.document_BL[b][begin].item<int64_t>()];
      start = {batch.domain_BL[b][begin].item<int64_t>()};
      start.insert(start.end(), tokens.begin(), tokens.end());
    }
  return starts;
}

}  // namespace

TEST_CASE("a shuffled order has everything once and depends on the key alone") {
  const std::vector<int64_t> order = shuffled_order(random_key(1, "test"), 500);
  CHECK(is_permutation_of_all(order, 500));
  CHECK(order == shuffled_order(random_key(1, "test"), 500));
  CHECK(order != shuffled_order(random_key(2, "test"), 500));
  CHECK(shuffled_order(random_key(1, "test"), 0).empty());
}

TEST_CASE("a path of similar documents is the one worked by hand") {
  // Roots of counts over (1, 2, 5, pair 11, pair 12), each divided by its length:
  //   d0 = 1 → (1,0,0,0,0)   d1 = 5 → (0,0,1,0,0)   d2 = 1 2 → (1,1,0,0,1)/√3   d3 = 1 1 → (√2,0,0,1,0)/√3
  //   d0·d3 = 0.816 > d0·d2 = 0.577 > d0·d1 = 0;  then d3·d2 = √2/3 > d3·d1 = 0
  CHECK((path_of({{1}, {5}, {1, 2}, {1, 1}}) == std::vector<int64_t>{0, 3, 2, 1}));
  // Equal similarities: the lower number first.
  CHECK((path_of({{1}, {1}, {1}}) == std::vector<int64_t>{0, 1, 2}));
  CHECK(path_of({}).empty());
  CHECK((path_of({{}, {3}, {}}) == std::vector<int64_t>{0, 1, 2}));
}

TEST_CASE("where a path has seen all near documents it starts again at the first that is left") {
  // Two kinds by turns, 40 each. The 32 nearest of an even document are the even ones with the lowest numbers. From 0 the path
  // takes 2, 4 … 64, which knows of none that is left; then, from 1, 3 … 65. Each of 66 … 79 knows seen ones alone.
  std::vector<std::vector<int64_t>> many;
  for (int d = 0; d < 80; ++d) many.push_back(d % 2 == 0 ? std::vector<int64_t>{1, 2} : std::vector<int64_t>{8, 9});
  std::vector<int64_t> expected;
  for (int64_t d = 0; d <= 64; d += 2) expected.push_back(d);
  for (int64_t d = 1; d <= 65; d += 2) expected.push_back(d);
  for (int64_t d = 66; d < 80; ++d) expected.push_back(d);
  CHECK(path_of(many) == expected);
  // 20 of each kind: the path takes all of one kind, then, with 32 near ones, all of the other.
  std::vector<std::vector<int64_t>> turns;
  for (int d = 0; d < 40; ++d) turns.push_back(d % 2 == 0 ? std::vector<int64_t>{1, 2} : std::vector<int64_t>{8, 9});
  const std::vector<int64_t> path = path_of(turns);
  CHECK(is_permutation_of_all(path, 40));
  for (size_t i = 0; i < 40; ++i) CHECK(path[i] % 2 == (i < 20 ? 0 : 1));
}

TEST_CASE("a path is the same on one thread and on two") {
  std::vector<std::vector<int64_t>> documents;
  for (int d = 0; d < 300; ++d) {
    const std::string text = wordy_text(200, static_cast<uint32_t>(d));
    documents.emplace_back(text.begin(), text.end());
  }
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const std::vector<int64_t> one = path_of(documents);
  at::set_num_threads(2);
  CHECK(path_of(documents) == one);
  at::set_num_threads(before);
  CHECK(is_permutation_of_all(one, 300));
}

TEST_CASE("too many documents to compare, or one alone, are refused with the remedy") {
  const Failure many = failure_of([] { DocumentProfiles{kMostSimilar + 1}; });
  CHECK(many.code == ExitCode::kUsage);
  CHECK(many.says("use \"random\""));
  const Failure alone = failure_of([] {
    const std::vector<uint8_t> text(100, 'a');
    make_byte_dataset({.train = text, .validation = text, .document_ends = {100}}, 16, "similarity");
  });
  CHECK(alone.code == ExitCode::kUsage);
  CHECK(alone.says("needs several documents"));
}

TEST_CASE("an epoch predicts each byte of each document once, and reads nothing held out") {
  const std::string composer = GENERATE("random", "similarity");
  const auto data = make_byte_dataset(lettered_split(), kLetteredContext, composer);
  for (const int64_t batch : {1, 7}) {
    std::map<int64_t, int64_t> predicted;
    for (int64_t taken = 0; taken < kLetteredSequences; ++taken) {
      const Batch sequence = data->train_batch(5, taken / batch, taken % batch, 1, batch);
      for (const int64_t target : values(sequence.targets_BL)) ++predicted[target];
    }
    CHECK(predicted.erase(-1) == (kLetteredBytes % kLetteredContext != 0));
    CHECK(predicted.size() == 26);
    for (const auto& [byte, count] : predicted) CHECK(count == 31 + byte - 'a');
  }
}

TEST_CASE("composed batches are a function of seed and step, and slices of them equal the whole") {
  const std::string composer = GENERATE("random", "similarity");
  const auto data = make_byte_dataset(lettered_split(), kLetteredContext, composer);
  const auto other = make_byte_dataset(lettered_split(), kLetteredContext, composer);
  const Batch late = data->train_batch(1, 47, 0, 6, 6);  // sequences 282 … 287: over the end of the fourth epoch of 71
  for (int64_t step = 0; step < 47; ++step) other->train_batch(1, step, 0, 6, 6);
  CHECK(at::equal(other->train_batch(1, 47, 0, 6, 6).tokens_BL, late.tokens_BL));
  for (int64_t b = 0; b < 6; ++b) {
    const Batch slice = data->train_batch(1, 47, b, 1, 6);
    CHECK(at::equal(slice.tokens_BL, late.tokens_BL.narrow(0, b, 1)));
    CHECK(at::equal(slice.targets_BL, late.targets_BL.narrow(0, b, 1)));
    CHECK(at::equal(slice.document_BL, late.document_BL.narrow(0, b, 1)));
  }
  CHECK_FALSE(at::equal(data->train_batch(2, 47, 0, 6, 6).tokens_BL, late.tokens_BL));
  const auto windows = make_byte_dataset(lettered_split(), kLetteredContext);
  CHECK(at::equal(data->eval_batch(0, 1).targets_BL, windows->eval_batch(0, 1).targets_BL));
}

TEST_CASE("another epoch has another order, and boundaries of documents are known") {
  const auto data = make_byte_dataset(lettered_split(), kLetteredContext, "random");
  const Batch first = data->train_batch(1, 0, 0, kLetteredSequences, kLetteredSequences);
  const Batch second = data->train_batch(1, 1, 0, kLetteredSequences, kLetteredSequences);
  CHECK_FALSE(at::equal(first.tokens_BL, second.tokens_BL));
  const std::vector<int64_t> tokens = values(first.tokens_BL), target = values(first.targets_BL);
  const std::vector<int64_t> document = values(first.document_BL);
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (target[i] < 0) CHECK(document[i] == -1);
    else if (tokens[i] == '\n') CHECK(target[i] == 'a' + document[i]);  // the one place with nothing before it
    else CHECK(tokens[i] == 'a' + document[i]);
  }
}

TEST_CASE("similar documents of a text lie side by side, at random they do not") {
  const auto share = [](const std::string& composer) {
    const auto data = make_byte_dataset(two_kinds(60), 700, composer);  // documents of 300 bytes: two or three a sequence
    const Batch batch = data->train_batch(3, 0, 0, 25, 25);
    return neighbours_in(batch.document_BL, batch.document_BL.remainder(2)).share();
  };
  CHECK(share("similarity") > 0.9);
  CHECK(share("random") < 0.75);
}

TEST_CASE("Markov documents of one domain lie side by side where they are composed by similarity") {
  // 4 domains: by chance a quarter of all neighbours are alike. 16 sequences of 8 documents: 112 pairs a step.
  const auto found = [](const std::string& composer) {
    const auto data = make("markov", 256, {{"document_length", int64_t{32}}, {"composer", composer}});
    Neighbours all;
    for (int64_t step = 0; step < 10; ++step) {
      const Batch batch = data->train_batch(1, step, 0, 16, 16);
      const Neighbours some = neighbours_in(batch.document_BL, batch.domain_BL);
      all.alike += some.alike;
      all.all += some.all;
    }
    return all;
  };
  CHECK(found("random").all == 1120);
  CHECK(found("similarity").all == 1120);
  CHECK(std::abs(found("random").share() - 0.25) < 0.06);  // sd 0.013
  CHECK(found("similarity").share() > 0.75);
}

TEST_CASE("packed Markov sequences hold whole documents, each of a step once, whatever the composer") {
  const std::string composer = GENERATE("random", "similarity");
  const auto data = make("markov", 20, {{"document_length", int64_t{8}}, {"composer", composer}});
  const auto plain = make("markov", 20, {{"document_length", int64_t{8}}});
  const Batch whole = data->train_batch(4, 2, 0, 6, 6);
  // 8 + 8 + 4 targets; the token before the first target is of the first document too.
  const Tensor place_BL = at::tensor({0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2}, at::kLong).expand({6, 20});
  const Tensor first_B3 = whole.document_BL.index_select(1, at::tensor({0, 9, 17}, at::kLong));
  CHECK(at::equal(whole.document_BL, first_B3.gather(1, place_BL)));
  CHECK(is_permutation_of_all(values(first_B3), 18));
  CHECK(at::equal(whole.tokens_BL.narrow(1, 1, 19), whole.targets_BL.narrow(1, 0, 19)));
  for (int64_t b = 0; b < 6; ++b) CHECK(at::equal(data->train_batch(4, 2, b, 1, 6).tokens_BL, whole.tokens_BL.narrow(0, b, 1)));
  CHECK(starts_of_documents(whole) == starts_of_documents(plain->train_batch(4, 2, 0, 6, 6)));
  CHECK(at::equal(data->eval_batch(0, 3).tokens_BL, plain->eval_batch(0, 3).tokens_BL));
}

TEST_CASE("documents longer than the context, and similarity without several to a sequence, are refused") {
  const std::vector<std::tuple<int64_t, std::string, std::string>> cases{{33, "random", "above the model's context of 32"},
                                                                         {0, "similarity", "set `document_length` below"},
                                                                         {32, "similarity", "set `document_length` below"}};
  for (const auto& [length, composer, part] : cases) {
    const Failure failure = failure_of([&] { make("markov", 32, {{"document_length", length}, {"composer", composer}}); });
    CHECK(failure.code == ExitCode::kUsage);
    CHECK(failure.says(part));
    CHECK(failure.one_line());
  }
}
