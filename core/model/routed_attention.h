// Attention whose heads are experts: the module's own code runs between the places of its decisions.
#pragma once

#include "core/model/layers.h"
#include "core/site_walk.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab {

// Where it stands, and what the model asks of any attention there.
struct AttentionPlace {
  std::string path;         // "layers.3.attention"
  AttentionSpec attention;
  LayerSettings layer;
};

class RoutedAttention : public Module {
 public:
  virtual std::vector<MoELayer*> sites() const = 0;  // in the order of their decisions

  // Rows of any number of sequences, in the order of `walk.in()`: [T,D] to [T,D]. `cache` holds what earlier calls of a request
  // left, and position 0 is then that of its first row.
  virtual Tensor forward(const Tensor& x_TD, SiteWalk& walk, DecodeCache* cache) const = 0;

  virtual double flops_per_row(int64_t context) const = 0;  // the mean over the positions of a full sequence
};

}  // namespace moelab
