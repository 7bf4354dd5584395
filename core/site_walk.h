// The routed places of one block in a forward pass. Each gets a random key, a replayed selection and a request state of its own,
// and what it decided is kept in the order of the places.
#pragma once

#include "core/moe_layer.h"

#include <vector>

namespace moelab {

// One site's part of what a pass brings along.
struct SiteShare {
  const Assignment* forced = nullptr;  // replay this selection
  RouteState* state = nullptr;         // null: nothing goes on from an earlier call
  DecodeCache* cache = nullptr;
  Tensor carry = {};                   // from the site of the same name in an earlier block
};

class SiteWalk {
 public:
  // `in` is complete but for x_TD, and its random key is the block's. One share per site in their order; none = defaults.
  explicit SiteWalk(RouteInput in, std::vector<SiteShare> shares = {}) : in_(std::move(in)), shares_(std::move(shares)) {}

  // The next site decides over x_TD.
  RouteOutput decide(const MoELayer& site, const Tensor& x_TD);

  // The next site is a whole layer: it decides, and its experts answer.
  Tensor run(const MoELayer& site, const Tensor& x_TD);

  // What experts may know of rows x_TD; after decide(), of the site that decided last.
  ExecuteInput input(const Tensor& x_TD) const;

  const RouteInput& in() const { return in_; }
  std::vector<LayerOutput> take() { return std::move(outputs_); }

 private:
  RouteInput input_of(const MoELayer& site, const Tensor& x_TD);
  SiteShare share_of_next() const;

  RouteInput in_;
  RouteInput latest_;
  std::vector<SiteShare> shares_;
  std::vector<LayerOutput> outputs_;
};

// "moe" of "layers.3.moe".
std::string site_name(const Site& site);

}  // namespace moelab
