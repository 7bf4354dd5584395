// What the checks of the conformance kit share: a layer and a batch in one line, parts of a batch, and comparisons that throw.
#pragma once

#include "core/moe_layer.h"
#include "experiments/verify_kit.h"

#include <random>

namespace moelab {

// Sizes and settings of one case; everything else follows from them and the seed.
struct KitCase {
  int64_t rows = 24;
  int64_t sequences = 3;
  int64_t width = 5;
  int64_t experts = 4;           // active at the start; a variant may leave room for more
  int64_t k = 0;                 // 0 = the variant's or the router's default, or `experts` where that is less
  CapacityPolicy capacity = {};  // in training and in evaluation
  Mode mode = Mode::kTrain;
  at::ScalarType dtype = at::kDouble;
  std::string activation = "gelu";  // smooth, for finite differences
  bool bias = true;
  bool even = false;             // sequences of equal length
  bool short_stages = false;     // stages of the method lie within the first kKitStages steps
  int64_t seed = 0;

  std::string text() const;  // "T=24 E=4 k=default training seed 0"
};
constexpr int64_t kKitStages = 6;

std::shared_ptr<Router> kit_router(const RouterEntry& entry, const Variant& variant, const KitCase& at);
// Whether the router takes these settings at these sizes. False only for a usage error.
bool builds(const RouterEntry& entry, const Variant& variant, const KitCase& at);
// The defaults have to build at any size; of other settings, sizes that the router refuses are left out.
bool has_size(const Subject& subject, const KitCase& at);

// What a request carries from call to call: through the layer, and through the one before it where there is one.
struct KitState {
  RouteState before, here;
};

// Router and experts with random parameters, and every loss that can be attached to this router, coefficient 1, scope `step`.
// A router that hands something on to the next layer decides twice, as in two layers of a model; the second decision counts.
struct KitLayer {
  Site site;
  KitCase at;
  bool hands_on = false;
  RouteOutput route(const RouteInput& in) const;  // validated; what is thrown names the case
  RouteOutput route(const RouteInput& in, KitState& state) const;
  int64_t max_experts() const { return site.router->spec().max_experts; }
  Tensor run(const RouteOutput& out, const RouteInput& in, Execution execution = Execution::kAuto) const;
  std::vector<NamedTensor> trainable() const;  // "router.weight", "experts.w_in"
  void zero_grad() const;
};
KitLayer kit_layer(const Subject& subject, const KitCase& at);
std::vector<LossTerm> attachable_losses(const RouterEntry& entry, const RouterFacts& facts);

// Any policy that drops something.
CapacityPolicy random_capacity(std::mt19937_64& draw);
int64_t pick(std::mt19937_64& draw, int64_t low, int64_t high);  // both inclusive

// Rows of several sequences, one after the other, with every side channel; x is a leaf that requires a gradient.
RouteInput kit_input(const KitCase& at);
// The weights of y in the scalar that is differentiated; of the rows of a whole batch.
Tensor kit_grad_y(const KitCase& at);

// Contiguous sequences [from, to) of a batch. Its x stays on the graph of the batch's, the random draws are the same.
struct KitPart {
  RouteInput in;
  Tensor row_T;  // its rows in the batch
};
KitPart sequences_of(const RouteInput& in, int64_t from, int64_t to);
std::vector<KitPart> split_in(const RouteInput& in, int64_t parts);

// Row by row what was decided, so that batches of different rows can be compared: gates and kept or dropped pairs [T,·], the
// combine and dispatch weights of a soft plan, the mixture of a merge plan.
Tensor decision_of_rows(const RouteOutput& out);
// Every tensor of a plan, without the graph.
std::vector<NamedTensor> plan_tensors(const Plan& plan);
bool same_bits(const Plan& a, const Plan& b);

// All throw an std::runtime_error that says what differs, where and by how much.
void must(bool holds, const std::string& what, const KitCase& at);
double difference(const Tensor& a, const Tensor& b);  // max|a-b| / max(max|b|, 1e-30); infinite where shapes differ
void must_agree(const Tensor& a, const Tensor& b, double tolerance, const std::string& what, const KitCase& at);
void must_equal(const RoutingRecord& a, const RoutingRecord& b, const std::string& what, const KitCase& at);
void must_keep_bits(const Plan& a, const Plan& b, const std::string& what, const KitCase& at);

// Of each loss of the layer, without coefficient.
std::vector<double> loss_values(const KitLayer& layer, const RouteInput& in, const RouteOutput& out);

// Σ y·grad_y + Σ losses, on the graph.
Tensor kit_scalar(const KitLayer& layer, const RouteInput& in, const RouteOutput& out, const KitCase& at);

// Parameters, then buffers: handles, or copies without the graph.
std::vector<NamedTensor> state_of(const Module& module);
std::vector<NamedTensor> copied_state(const Module& module);

// What end_step() told of in the first 2 · kKitStages steps of a small layer, stages shortened.
struct StageEvent {
  int64_t step = 0;
  Event event;
};
std::vector<StageEvent> stages_of(const Subject& subject);

// The leak probe: the largest change of earlier rows of a sequence when the token of a row becomes another one, relative to all
// rows; and that row.
struct Leak {
  double worst = 0;
  int64_t row = -1;
};
Leak probe_leaks(const Subject& subject, const KitCase& at);

// Gradients of trainable(), zeros where none arrived, copied.
std::map<std::string, Tensor> gradients_of(const KitLayer& layer);

// Reasons that several properties share.
std::string always_applies(const Subject& subject);
std::string needs_choices(const Subject& subject);  // a sparse plan
bool decides_row_by_row(const Subject& subject, Mode mode);
std::string needs_independence(const Subject& subject);  // in training or in evaluation

}  // namespace moelab
