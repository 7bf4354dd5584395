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
  bool feed_forward = false;         // an expert is a whole feed-forward layer
  std::vector<LinearShape> linears;  // and laid on these, "attention.q", "dense.w_in"
  bool one_decision = false;         // for all maps of the block; else each has its own
};

// `linears` are the maps that a block has. Of `targets` ("ffn", "all", "attention", "dense" and names, separated by commas) and
// `decision` complains at `expert`, the table that says them.
AdapterSettings read_adapters(const Table& expert, LayerSettings layer, const std::vector<LinearShape>& linears);

// What a router would have to say of every row for adapters to be part of the weights that they stand on: one expert alone with
// weight 1, or a weight for each.
struct FoldedExperts {
  std::optional<int64_t> expert = {};
  std::vector<double> weight_E = {};  // without `expert`
};

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

  // What folding adds to the weight of each adapted map, [out,in], named as the map is: "attention.q". Error(kUsage) names a
  // place with other experts, or with whole feed-forward layers of which more than one is asked for.
  std::vector<NamedTensor> folded(const FoldedExperts& experts) const;

 private:
  struct Laid {
    std::string map;
    std::shared_ptr<MoELayer> layer;
    const AdapterBank* bank;
    size_t stage;
  };
  void lay_feed_forward(const std::string& path, LayerSettings settings, const std::shared_ptr<const DenseMaps>& dense);
  void lay(const std::string& path, const std::string& name, LayerSettings settings, const std::vector<LinearShape>& linears);

  std::vector<Laid> laid_;
  std::shared_ptr<MoELayer> feed_forward_;
  std::vector<std::string> feed_forward_maps_;
  bool one_decision_;
};

}  // namespace moelab
