// Evaluation over the validation split. It changes no parameter, no buffer and no training counter.
#pragma once

#include "core/dataset.h"
#include "core/diagnostics.h"
#include "core/model/model.h"

#include <string>
#include <vector>

namespace moelab {

struct Evaluation {
  int64_t tokens = 0;         // predicted
  double loss = 0;            // nats per token
  double bits_per_byte = 0;
  double accuracy = 0;        // share of tokens whose most probable prediction is right
  std::vector<std::string> labels;                 // per site: site_labels()
  std::vector<RoutingRecord> records;              // per site
  std::vector<std::vector<double>> terms;          // per site and loss term: value over the whole evaluation
};

// A data set's sequences as the model reads them: trailing positions without a target are padding.
Batch to_batch(const TokenBatch& tokens);

// Reads the first `sequences` of the split (0 = all), `batch` at a time; ranks share them.
Evaluation evaluate(const Model& model, const Dataset& data, int64_t sequences, int64_t batch, int64_t seed, Comm& comm);

// "layer.3", or "layer.3.<site>" where the block has several sites.
std::vector<std::string> site_labels(const std::vector<Site*>& sites);

}  // namespace moelab
