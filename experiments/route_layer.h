// One MoE layer on given tensors: built from the tables of a layer alone, its state replaced by what IN holds, its input
// assembled from IN's rows.
#pragma once

#include "core/config.h"
#include "core/model/routed_attention.h"
#include "experiments/route_io.h"

#include <memory>
#include <set>
#include <string>
#include <vector>

namespace moelab {

// `[route]`.
struct RouteSettings {
  int64_t step = 0;
  int64_t total_steps = 1;
  int64_t pass = 0;
  int64_t seed = 0;
};
RouteSettings read_route_settings(const Table& root);

// The config with the sizes that IN's tensors have where it names none: labels of a matrix [domains,E], lines of a table.
Table with_sizes_of(const Table& root, const RouteFile& file);

// A layer of experts that map rows, or attention whose heads are experts: one decision, or several.
class RouteLayer {
 public:
  explicit RouteLayer(std::shared_ptr<MoELayer> layer) : layer_(std::move(layer)) {}
  explicit RouteLayer(std::shared_ptr<RoutedAttention> attention) : attention_(std::move(attention)) {}

  const Module& module() const;
  std::vector<MoELayer*> sites() const;  // in the order of their decisions
  Tensor run(SiteWalk& walk, const Tensor& x_TD) const;
  int64_t output_width() const;

  // What precedes the names of a site's results: "" where there is one site, else "value0.".
  std::string prefix_of(const MoELayer& site) const;

 private:
  std::shared_ptr<MoELayer> layer_;
  std::shared_ptr<RoutedAttention> attention_;
};

// From [moe], or from [attention] or [adapters] where it alone is written. With initial values, drawn as for the block 0 of a
// model of this seed.
RouteLayer make_route_layer(const Table& root, int64_t width, at::ScalarType dtype);

// Parameters, then buffers.
std::vector<NamedTensor> tensors_of(const Module& module);

// The layer's parameters and buffers, or others under the same names, as outside programs name them: where experts are unequal, a
// view "experts.<e>.<name>" for each instead of the stacked tensors of their groups.
std::vector<NamedTensor> outside_names(const RouteLayer& layer, const std::vector<NamedTensor>& tensors);

// What IN may hold beside the layer's own tensors. Sizes that the layer knows are numbers.
std::vector<AcceptedTensor> accepted_inputs(const RouteLayer& layer);

// Refuses unknown names, wrong shapes and wrong types. Noise is checked where it is used.
void check_inputs(const RouteFile& file, const RouteLayer& layer);

// Copies IN's parameters and buffers into the layer. Tensors of the shared expert and of the base may come without their expert
// axis of length 1; the names of those that did are returned, so that results can be given back in the same shape.
std::set<std::string> replace_tensors(const RouteFile& file, const RouteLayer& layer);

// IN's rows without padding.
struct RoutedRows {
  Tensor index_T;        // row of IN, ascending
  int64_t file_rows = 0;
  RouteInput in;         // complete

  // Values of the routed rows laid out in IN's rows, `fill` at padding.
  Tensor in_file_rows(const Tensor& values_T, double fill = 0) const;
};

// `x_TD` has IN's rows; it may be a leaf that wants a gradient. Warns on stderr of noise that this mode does not use.
RoutedRows routed_rows(const Table& root, RouteFile& file, const Tensor& x_TD, const RouteLayer& layer, Mode mode);

}  // namespace moelab
