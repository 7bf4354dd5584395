// What `moelab route` writes: the plan, the output, losses, probes and gradients, in IN's row numbers.
#pragma once

#include "experiments/route_layer.h"

#include <set>
#include <string>
#include <vector>

namespace moelab {

// Results under their public names.
using RouteResults = std::vector<NamedTensor>;

void add_plan(RouteResults& results, const LayerOutput& out, const RoutedRows& rows);
void add_probes(RouteResults& results, const RouteOutput& routed, const Router& router, const RoutedRows& rows);

// Unscaled value of each loss, in the order of the site's terms; one element each, on the graph.
std::vector<Tensor> loss_values(const LayerOutput& out, const Site& site);

// Gradients of sum(y*grad_y) + Σ coefficient*loss: `grad.x` and one per parameter, zeros where it has no part in it.
void add_gradients(RouteResults& results, const RouteLayer& layer, const Tensor& x_TD, const Tensor& objective,
                   const std::set<std::string>& without_axis);

// Parameters and buffers as they stand, copied. `without_axis` names those that leave without their first axis.
void add_state(RouteResults& results, const std::string& prefix, const std::vector<NamedTensor>& tensors,
               const std::set<std::string>& without_axis);

}  // namespace moelab
