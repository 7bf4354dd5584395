// The data set of windows over two rows of tokens, whatever the tokens stand for.
#pragma once

#include "core/dataset.h"
#include "datasets/token_stream.h"

#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace moelab {

struct TokenData {
  TokenStream train;
  TokenStream validation;
  std::vector<int64_t> document_ends = {};  // of the training split, rising; needed by composers alone
  int64_t vocabulary = 0;
  const char* token_name = "tokens";        // what complaints call them
  int64_t start = 0;                        // the token that stands before the first of validation
  std::vector<std::string> bytes_V = {};    // what each token stands for; empty = nobody knows
  double bytes_per_token = std::numeric_limits<double>::quiet_NaN();  // then; NaN = nor this
  std::shared_ptr<const std::vector<uint8_t>> train_bytes = nullptr, validation_bytes = nullptr;  // for baselines
  std::string tokenizer = {};
};

// How training sequences are taken.
//   windows     they start anywhere in the training split, uniformly
//   random      documents lie end to end, in an order drawn for each epoch, and are cut into sequences, which come in an order
//               drawn for each epoch too: each token is predicted once an epoch, the last sequence may be short
//   similarity  the same, with documents along a path of similar ones (datasets/composer.h)
OptionSpec composer_option();

// Windows of `context` tokens. Validation windows lie end to end; each begins with the token before its first target.
// Error(kUsage) where a split is shorter than one window.
std::shared_ptr<const Dataset> make_token_dataset(TokenData data, int64_t context, const std::string& composer = "windows");

}  // namespace moelab
