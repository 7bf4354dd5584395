// A mixture-of-experts layer: route → dispatch → experts → combine. It returns the layer's delta; the block adds the residual.
#pragma once

#include "core/config.h"
#include "core/diagnostics.h"
#include "core/execute.h"
#include "core/expert.h"
#include "core/loss.h"
#include "core/router.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab {

// A routed place of a model: which router decides, for which bank, under which name. Several sites may share a router, and
// several may consume one plan.
struct Site {
  std::string path;       // "layers.3.moe"
  std::string table;      // "moe": the table of the config that describes it
  int64_t layer = 0;
  int64_t use = 0;        // which use of a shared router
  std::shared_ptr<Router> router;
  std::shared_ptr<ExpertBank> bank;
  std::vector<LossTerm> losses;
  int64_t checked_step = 0;  // the training step whose plans are validated: the first, and one after an event or a resume
};

struct LayerSettings {
  std::string table = "moe";
  std::string router = "softmax_topk";
  RouterSpec router_spec;
  std::string expert = "ffn";         // the kind of [moe.expert]
  ExpertPlace place = ExpertPlace::kFeedForward;
  ExpertSpec expert_spec;
  std::vector<ExpertPart> mixed = {};  // the parts of a bank that mixes kinds; empty: all experts are of the kind above
  int64_t shared_count = 0;
  int64_t shared_width = 0;   // of each shared expert
  bool shared_gate = false;
  bool shared_residual = false;  // y = c₀·routed + c₁·shared with (c₀, c₁) = softmax(W·x), instead of their sum
  Execution execution = Execution::kAuto;
  bool recompute = false;  // of the experts' pre-activations
  std::vector<LossTerm> losses;
};

// The tables that describe a layer, each with the experts it has where it names none: "moe", "attention", "adapters".
const std::vector<std::string>& layer_tables();

// Reads the tables of a layer ([moe], [moe.router], … and [[loss]]) from `root`, the experiment or the overlay of a layer. A
// block may route in several places, described by tables of other names with the same keys below them.
LayerSettings read_layer(const Table& root, int64_t width, int64_t layer, int64_t vocabulary, at::ScalarType dtype,
                         RandomKey init, const std::string& table = "moe");

// A loss term's sums in one micro-batch.
struct TermStatistics {
  size_t term = 0;  // index into Site::losses
  std::vector<LossStatistics> per_scope;
};

struct LayerOutput {
  Tensor y_TD;
  RouteOutput routed;
  std::vector<TermStatistics> statistics;
  RoutingRecord record;
};

class MoELayer : public Module {
 public:
  // `bank` is made as the settings say where it is null.
  MoELayer(std::string path, LayerSettings settings, std::shared_ptr<ExpertBank> bank = nullptr);

  // Shared experts are added where there are any. `in` is complete but for x-independent defaults; see make_route_input.
  LayerOutput forward(const RouteInput& in, RouteState& state, DecodeCache* cache = nullptr) const;

  // The two halves, for blocks where several banks consume one decision.
  RouteOutput decide(const RouteInput& in, RouteState& state) const;
  Tensor shared_output(const Tensor& x_TD) const;  // undefined without shared experts
  Tensor with_shared(const Tensor& routed_TD, const Tensor& x_TD) const;  // the layer's delta

  // The decision with its statistics and counters; y_TD stays undefined.
  LayerOutput observed(const RouteInput& in, RouteOutput routed) const;
  Tensor run_experts(const RouteInput& in, const Plan& plan, DecodeCache* cache) const;  // base included, shared experts not

  const Site& site() const { return site_; }
  Site& site() { return site_; }
  const LayerSettings& settings() const { return settings_; }

 private:
  LayerSettings settings_;
  Site site_;
  std::shared_ptr<ExpertBank> shared_;
  Tensor shared_gate_weight_1D_, shared_coefficient_weight_2D_;
};

ExecuteInput execute_input(const RouteInput& in, DecodeCache* cache = nullptr);

// Statistics of every term for one decision.
std::vector<TermStatistics> term_statistics(const Site& site, const RouteInput& in, const RouteOutput& out);

}  // namespace moelab
