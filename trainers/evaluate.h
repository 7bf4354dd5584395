// Evaluation over the validation split. It changes no parameter, no buffer and no training counter.
#pragma once

#include "core/dataset.h"
#include "core/diagnostics.h"
#include "core/model/model.h"
#include "trainers/terms.h"

#include <string>
#include <vector>

namespace moelab {

struct Evaluation {
  int64_t prompt = 0;         // the first so many tokens of each sequence were given and not scored: EvalSettings::prompt
  int64_t tokens = 0;         // scored: predicted, or images or vectors classified
  double bytes = 0;           // of the text that they stand for: Dataset::bytes_of()
  double loss = 0;            // nats per scored token
  double bits_per_byte = 0;   // all bits over all bytes; NaN where nobody knows the bytes, and where the data are no text
  double accuracy = 0;        // share of scored tokens whose most probable prediction is right
  std::vector<std::string> labels;                 // per site: site_labels()
  std::vector<RoutingRecord> records;              // per site, of all rows: the prompts' too
  std::vector<std::vector<std::string>> term_labels;   // per site
  std::vector<std::vector<TermReading>> terms;         // per site and loss term, formed as training forms it; a batch of the
                                                       // evaluation is a micro-batch
};

struct EvalSettings {
  int64_t sequences = 0;    // samples: the first of the split; 0 = all
  int64_t batch = 16;       // samples read at a time
  int64_t seed = 0;
  int64_t step = 0;         // steps trained: routers may work in stages
  int64_t total_steps = 1;
  int64_t prompt = 0;       // tokens that begin each sequence, unscored: routers may read them as one (RouteInput::prompt)
};

// Ranks share the sequences, and all report the whole. Error(kUsage) where no sequence is longer than the prompt.
Evaluation evaluate(const Model& model, const Dataset& data, const EvalSettings& settings, Comm& comm);

// "layer.3", or "layer.3.<site>" where the block has several sites.
std::vector<std::string> site_labels(const std::vector<Site*>& sites);

}  // namespace moelab
