// What a finished run says of itself: summary.json (flat keys, missing is null) and the same as text for a person.
#pragma once

#include "experiments/experiment.h"
#include "trainers/trainer.h"

#include <nlohmann/json.hpp>

#include <optional>
#include <string>
#include <vector>

namespace moelab {

struct RunVerdict {
  std::string word;    // "healthy", "collapsed", "dead experts", "untrained base", or "not applicable"
  std::string reason;  // which layer, which number, against which bound
};

// Judged on the final evaluation and its E active experts. Collapsed: fewer than half of them are effective, or (at E ≥ 4) one
// of them takes more than half of all pairs. Both are far beyond what sampling noise does on an evaluation of this size.
RunVerdict verdict_of(const Evaluation& evaluation);

// Bits per byte of interpolated n-gram models with 0 … 5 bytes of context, where they were asked for and the data are bytes.
std::vector<double> ngram_baselines(const Experiment& experiment);

// `seconds` cover all sessions of the run. `error` says why a run failed; "" = it did not.
nlohmann::json summarise(const Experiment& experiment, const Trainer& trainer, const std::string& outcome, double seconds,
                         const std::vector<double>& baselines, const std::string& error = "");

// Bits per byte beside the baselines, or loss and accuracy; a table of the experts' loads, what the model writes, and where
// everything lies.
std::string final_text(const Experiment& experiment, const nlohmann::json& summary, const std::string& sample,
                       const std::string& folder);

// The first `bytes` bytes that the model continues the validation split's first tokens with after `step` steps; "" where tokens
// stand for no text.
std::string sample_text(const Experiment& experiment, int64_t bytes, int64_t step);

}  // namespace moelab
