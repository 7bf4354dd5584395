// Mixtures of Markov sources whose entropy rate is known exactly, and with it a model's distance from the best predictor.
//
//   S sources, each a chain of order m over V tokens; P(· | source, last m tokens) ~ Dirichlet(alpha, …, alpha)
//   a sequence is a document of context + 1 tokens; its source is drawn with probability ∝ (s + 1)^-prior_zipf and is its
//   domain label; the document starts in the source's long-run distribution
//   with `document_length` below the context a sequence is packed with whole documents, each with a source and labels of its own;
//   the documents of a step's batch come in the order drawn, or along a path of similar ones (datasets/composer.h)
//   with `switching` > 0 the source is drawn anew before a token with that probability; the label is then the first source
//
// Known entropy (bits per token): Σ_s prior_s Σ_h π_s(h) H(P(· | s, h)), π_s the stationary distribution of the m-token
// contexts. A model that must infer the source needs a little more at the start of each document. With switching it is the
// value for a predictor that is told the source, a lower bound.
//
// The chains depend on `source_seed` alone; training documents on (seed, step, index); validation documents on `source_seed`
// and their number, under another key.
#include "core/dataset.h"
#include "core/error.h"
#include "datasets/composer.h"
#include "datasets/dirichlet.h"
#include "datasets/discrete.h"
#include "datasets/markov_chain.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace moelab {
namespace {

constexpr double kMaxTableEntries = 1 << 22;  // S · V^(m+1) doubles: 32 MiB
constexpr double kExpectedTokens = 1 << 20;   // of token_counts_V

MarkovMixture draw_mixture(const Options& options) {
  MarkovMixture mixture{.sources = options.integer("sources"),
                        .states = options.integer("states"),
                        .order = options.integer("order"),
                        .switching = options.real("switching"),
                        .prior = zipf_prior(options.integer("sources"), options.real("prior_zipf")),
                        .rows = {}};
  const double entries = static_cast<double>(mixture.sources) * std::pow(mixture.states, mixture.order + 1);
  if (entries > kMaxTableEntries) {
    usage_error("data set 'markov': sources · states^(order + 1) is above 2^22; lower one of them");
  }
  mixture.rows.resize(static_cast<size_t>(entries));
  DrawSequence draws(random_key(options.integer("source_seed"), "markov.rows"));
  for (size_t at = 0; at < mixture.rows.size(); at += mixture.states) {
    draw_dirichlet(draws, options.real("alpha"), mixture.rows.data() + at, mixture.states);
  }
  return mixture;
}

class MarkovDataset : public Dataset {
 public:
  MarkovDataset(MarkovMixture mixture, const DatasetSpec& spec)
      : mixture_(std::move(mixture)),
        context_(spec.context),
        document_length_(document_length(spec)),
        similar_(spec.options.text("composer") == "similarity"),
        eval_documents_(spec.options.integer("validation_documents")),
        eval_key_(random_key(spec.options.integer("source_seed"), "markov.validation")),
        stationary_(stationary_distribution(mixture_)),
        prior_sums_(running_sums(mixture_.prior, mixture_.sources)),
        start_sums_(running_sums(stationary_, mixture_.contexts())),
        row_sums_(running_sums(mixture_.rows, mixture_.states)) {}

  DataShape shape() const override { return {.kind = DataKind::kTokens, .classes = mixture_.states}; }
  int64_t domains() const override { return mixture_.sources; }
  double known_entropy_bits() const override { return entropy_rate_bits(mixture_, stationary_); }

  Batch train_batch(int64_t seed, int64_t step, int64_t first, int64_t count, int64_t batch) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= batch, "a slice of a training batch lies outside it");
    const RandomKey key = random_key(seed, "data").with("step", step);
    return packed_batch(key, first, count, similar_ ? similar_documents(key, batch * per_sequence()) : std::vector<int64_t>{});
  }

  int64_t eval_sequences() const override { return eval_documents_; }
  Batch eval_batch(int64_t first, int64_t count) const override {
    check_invariant(first >= 0 && count >= 0 && first + count <= eval_documents_, "a validation slice lies outside the split");
    return packed_batch(eval_key_, first, count, {});
  }

  Tensor token_counts_V() const override {
    std::vector<double> share(mixture_.states, 0.0);
    for (size_t i = 0; i < stationary_.size(); ++i) share[i % mixture_.states] += stationary_[i];  // H is a multiple of V
    Tensor counts_V = at::empty({mixture_.states}, at::kLong);
    int64_t* counts = counts_V.mutable_data_ptr<int64_t>();
    for (int64_t v = 0; v < mixture_.states; ++v) counts[v] = std::llround(share[v] * kExpectedTokens);
    return counts_V;
  }

 private:
  static int64_t document_length(const DatasetSpec& spec) {
    const int64_t length = spec.options.integer("document_length");
    if (length > spec.context)
      usage_error("data set 'markov': `document_length` is above the model's context of " + std::to_string(spec.context));
    const bool whole = length == 0 || length == spec.context;
    if (whole && spec.options.text("composer") == "similarity")
      usage_error("data set 'markov': `composer` = \"similarity\" orders the documents of a sequence; set `document_length` "
                  "below the context of " + std::to_string(spec.context));
    return length == 0 ? spec.context : length;
  }

  int64_t per_sequence() const { return (context_ + document_length_ - 1) / document_length_; }  // documents

  std::vector<int64_t> similar_documents(RandomKey key, int64_t count) const {
    DocumentProfiles profiles(count);
    std::vector<int64_t> tokens(document_length_ + 1);
    for (int64_t n = 0; n < count; ++n) {
      write_document(key.with("document", n), tokens);
      profiles.set(n, tokens);
    }
    return profiles.similar_path();
  }

  // `order` says which documents follow each other through all sequences; empty = as they are drawn.
  Batch packed_batch(RandomKey key, int64_t first, int64_t count, const std::vector<int64_t>& order) const {
    Batch out;
    out.tokens_BL = at::empty({count, context_}, at::kLong);
    out.targets_BL = at::empty({count, context_}, at::kLong);
    out.sequence_B = at::arange(first, first + count, at::kLong);
    out.domain_BL = at::empty({count, context_}, at::kLong);
    out.document_BL = at::empty({count, context_}, at::kLong);
    for (int64_t b = 0; b < count; ++b) {
      std::vector<int64_t> packed(per_sequence());
      std::iota(packed.begin(), packed.end(), (first + b) * per_sequence());
      for (int64_t& document : packed) document = order.empty() ? document : order[document];
      write_sequence(key, packed, {.tokens = row(out.tokens_BL, b), .targets = row(out.targets_BL, b),
                                   .documents = row(out.document_BL, b), .labels = row(out.domain_BL, b)});
    }
    if (per_sequence() > 1) return out;
    out.domain_B = out.domain_BL.select(1, 0).contiguous();
    out.domain_BL = out.document_BL = Tensor();
    return out;
  }

  struct Rows {
    int64_t *tokens, *targets, *documents, *labels;
  };

  int64_t* row(const Tensor& rows_BL, int64_t b) const { return rows_BL.mutable_data_ptr<int64_t>() + b * context_; }

  // Each document brings document_length_ targets; its tokens stand before them, so that the first one begins with one more.
  void write_sequence(RandomKey key, const std::vector<int64_t>& packed, Rows to) const {
    std::vector<int64_t> tokens(document_length_ + 1);
    for (int64_t j = 0; j < per_sequence(); ++j) {
      const int64_t label = write_document(key.with("document", packed[j]), tokens);
      const int64_t first = j * document_length_, count = std::min(document_length_, context_ - first);
      std::copy_n(tokens.begin() + 1, count, to.targets + first);
      const int64_t shown = first == 0 ? 0 : first + 1, end = std::min(first + count + 1, context_);
      std::copy_n(tokens.begin() + (shown - first), end - shown, to.tokens + shown);
      std::fill(to.documents + shown, to.documents + end, packed[j]);
      std::fill(to.labels + shown, to.labels + end, label);
    }
  }

  // Fills `tokens` and returns the first source. The context before the first token comes from the long-run distribution,
  // so the document has the distribution of a piece of an endless one.
  int64_t write_document(RandomKey key, std::vector<int64_t>& tokens) const {
    DrawSequence draws(key);
    const int64_t label = draw_from(prior_sums_.data(), mixture_.sources, draws.uniform());
    const int64_t contexts = mixture_.contexts();
    int64_t source = label;
    int64_t context = draw_from(start_sums_.data() + source * contexts, contexts, draws.uniform());
    for (int64_t& token : tokens) {
      if (mixture_.switching > 0 && draws.uniform() < mixture_.switching) {
        source = draw_from(prior_sums_.data(), mixture_.sources, draws.uniform());
      }
      const double* sums = row_sums_.data() + (source * contexts + context) * mixture_.states;
      token = draw_from(sums, mixture_.states, draws.uniform());
      context = mixture_.shift(context, token);
    }
    return label;
  }

  MarkovMixture mixture_;
  int64_t context_;
  int64_t document_length_;
  bool similar_;
  int64_t eval_documents_;
  RandomKey eval_key_;
  std::vector<double> stationary_;  // [S, H]
  std::vector<double> prior_sums_;  // [S]
  std::vector<double> start_sums_;  // [S, H]
  std::vector<double> row_sums_;    // [S, H, V]
};

std::shared_ptr<const Dataset> make_markov(const DatasetSpec& spec) {
  return std::make_shared<MarkovDataset>(draw_mixture(spec.options), spec);
}

const Registration<DatasetEntry> markov_registration{{
    .name = "markov",
    .title = "A mixture of Markov sources with known entropy rate",
    .citation = "generated",
    .doc = "Each sequence is a document of one source, its domain label, or holds several. "
           "Training documents never end and never repeat; "
           "validation documents come from another stream.",
    .options = {{.name = "sources",
                 .default_value = int64_t{4},
                 .doc = "number of chains",
                 .min = 1,
                 .max = 4096},
                {.name = "states",
                 .default_value = int64_t{16},
                 .doc = "vocabulary",
                 .min = 2,
                 .max = 4096},
                {.name = "order",
                 .default_value = int64_t{1},
                 .doc = "tokens of context that a chain looks at",
                 .min = 1,
                 .max = 8},
                {.name = "alpha",
                 .default_value = 0.3,
                 .doc = "of the Dirichlet rows; small = sharp, and sources easily told apart",
                 .min = 0.01,
                 .max = 1000},
                {.name = "prior_zipf",
                 .default_value = 0.0,
                 .doc = "source s has probability in proportion to (s + 1)^-prior_zipf",
                 .min = 0,
                 .max = 10},
                {.name = "switching",
                 .default_value = 0.0,
                 .doc = "probability, before each token, to draw the source anew",
                 .min = 0,
                 .max = 1},
                {.name = "source_seed",
                 .default_value = int64_t{0},
                 .doc = "draws the chains and the validation documents"},
                {.name = "validation_documents",
                 .default_value = int64_t{256},
                 .doc = "number of validation sequences",
                 .min = 1,
                 .max = 1e6},
                option("document_length", 0, "tokens of a document, several of which fill a sequence; 0 = the context")
                    .at_least(0),
                option("composer", "random", "training documents follow each other as drawn, or similar ones of a batch do")
                    .one_of({"random", "similarity"})},
    .make = make_markov,
}};

}  // namespace
}  // namespace moelab
