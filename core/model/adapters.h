// Adapters on the linear maps of one block. The maps themselves stay where they are, frozen.
#pragma once

#include "core/adapters.h"
#include "core/feed_forward.h"
#include "core/site_walk.h"

#include <optional>
#include <string>
#include <vector>

namespace moelab {

struct AdapterSettings {
  LayerSettings layer;
  std::vector<LinearShape> linears;  // laid on these, "attention.q", "dense.w_in"; none: an expert is a whole feed-forward layer
  bool one_decision = false;         // for all maps of the block; else each has its own
};

// `linears` are the maps that a block has. Of `targets` ("ffn", "all", "attention", "dense" or names separated by commas) and
// `decision` complains at `expert`, the table that says them.
AdapterSettings read_adapters(const Table& expert, LayerSettings layer, const std::vector<LinearShape>& linears);

class BlockAdapters : public Module {
 public:
  // `path` is the block's. `dense` is its feed-forward layer.
  BlockAdapters(const std::string& path, const AdapterSettings& settings, const std::shared_ptr<const DenseMaps>& dense);

  std::vector<MoELayer*> sites() const;
  bool adapts(const std::string& map) const;
  bool replaces_feed_forward() const { return feed_forward_ != nullptr; }

  // One forward pass through a block.
  struct Pass {
    SiteWalk& walk;
    std::optional<Plan> plan = {};  // of the one decision
  };
  Tensor delta(Pass& pass, const std::string& map, const Tensor& x_TD) const;  // undefined where nothing is laid on the map
  Tensor feed_forward(Pass& pass, const Tensor& x_TD) const;                   // base and adapters

 private:
  struct Laid {
    std::string map;
    std::shared_ptr<MoELayer> layer;
    const AdapterBank* bank;
    size_t stage;
  };
  void lay(const std::string& path, const std::string& name, LayerSettings settings, const std::vector<LinearShape>& linears);

  std::vector<Laid> laid_;
  std::shared_ptr<MoELayer> feed_forward_;
  bool one_decision_;
};

}  // namespace moelab
