// The data set interface: sequences of tokens with next-token targets, or images or vectors with a class each. What a training
// sample holds is a pure function of (seed, step, index), so resume replays nothing, and micro-batches and ranks take slices of
// one step's batch.
#pragma once

#include "core/batch.h"
#include "core/params.h"
#include "core/registry.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace moelab {

class Dataset {
 public:
  virtual ~Dataset();

  virtual DataShape shape() const = 0;
  int64_t vocabulary() const { return shape().vocabulary(); }
  virtual int64_t domains() const { return 0; }        // number of labels in domain_B and domain_BL
  virtual int64_t train_samples() const { return 0; }  // of a training split of whole samples; 0 = windows, or drawn without end

  // Samples [first, first + count) of the `batch` samples of that step.
  virtual Batch train_batch(int64_t seed, int64_t step, int64_t first, int64_t count, int64_t batch) const = 0;

  // Samples [first, first + count) of the validation split, in order. Together they predict each token, or class, of it once.
  virtual int64_t eval_sequences() const = 0;
  virtual Batch eval_batch(int64_t first, int64_t count) const = 0;

  // Bytes of text that these targets stand for, entries of -1 left out: they turn bits per token into bits per byte. NaN where
  // they stand for no text, or nobody knows how much.
  virtual double bytes_of(const Tensor& targets_BL) const;
  virtual bool is_text() const { return false; }  // bits per byte say something

  // The text that tokens stand for; "" where they stand for none.
  virtual std::string text_of(const std::vector<int64_t>& tokens) const;

  // int64 [V]: how often each token occurs in the training split. A generator gives what it expects of 2^20 tokens. Undefined
  // where the samples are no tokens.
  virtual Tensor token_counts_V() const { return {}; }

  // Bits per target of a predictor that knows the source; NaN where nobody knows.
  virtual double known_entropy_bits() const;

  // The raw splits, for baselines; both empty where the tokens are not of a text at hand.
  virtual const std::vector<uint8_t>& train_bytes() const;
  virtual const std::vector<uint8_t>& validation_bytes() const;

  // The splits as tokens, for files; both empty where they have no end.
  virtual std::vector<uint16_t> train_tokens() const;
  virtual std::vector<uint16_t> validation_tokens() const;

  // What was learned to make the tokens, for DatasetSpec::tokenizer of later runs; "" = nothing.
  virtual std::string tokenizer() const;

  // Equal for equal tokens in both splits; "" where the options alone say what the data are.
  virtual std::string fingerprint() const;
};

// What a factory gets; the options are checked already.
struct DatasetSpec {
  int64_t context = 0;  // L: tokens of a sequence; images and vectors do not ask
  Options options;
  std::string tokenizer = {};  // Dataset::tokenizer() of an earlier run; "" = learn anew
};

struct DatasetEntry {
  std::string name;      // = the file's stem
  std::string title;
  std::string citation;  // where the data come from
  std::string doc;       // how it is split and what a token is
  DataKind holds = DataKind::kTokens;
  OptionSpecs options = {};
  std::function<std::shared_ptr<const Dataset>(const DatasetSpec&)> make;
  // Fetches what `make` needs, and checks that it is there undamaged. Both answer with one line for a person and throw
  // Error(kData) on failure. Empty where nothing has to be fetched.
  std::function<std::string()> prepare = {};
  std::function<std::string()> verify = {};
  std::source_location where = std::source_location::current();
};

extern template class Registry<DatasetEntry>;

// Finds the data set and makes it. A context below 1 is Error(kUsage) where there are tokens.
std::shared_ptr<const Dataset> make_dataset(const std::string& name, const DatasetSpec& spec);

}  // namespace moelab
