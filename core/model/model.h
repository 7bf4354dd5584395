// What the trainer and the commands know of a model: batches in, logits and routing decisions out.
#pragma once

#include "core/comm.h"
#include "core/moe_layer.h"
#include "core/router.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace moelab {

// A rectangle of sequences. Where `length_B` is defined, positions at or past a sequence's length are padding: they are
// routed nowhere, counted nowhere, and change no other position's result.
struct Batch {
  Tensor tokens_BL;    // int64
  Tensor targets_BL;   // int64; -1 = nothing to predict here
  Tensor length_B;     // int64, undefined = all full
  Tensor sequence_B;   // int64 global id of each sequence in this step: keys the random draws
  Tensor domain_B;     // int64, undefined where the data have no labels
  Tensor domain_BL;    // int64, instead of domain_B where a sequence holds several documents

  int64_t target_tokens() const;
  int64_t rows() const;  // without padding
};

// Where and how a forward pass happens. Two passes with equal contexts and batches are bitwise equal.
struct StepContext {
  Mode mode = Mode::kTrain;
  int64_t seed = 0;
  int64_t step = 0;
  int64_t total_steps = 1;
  int64_t pass = 0;
  Comm* comm = nullptr;
  bool recompute = false;                                // recompute each block's activations in the backward pass
  const std::vector<Assignment>* forced = nullptr;       // one per site: replay these selections
};

// One site's part of a forward pass.
struct SiteResult {
  std::vector<TermStatistics> statistics;
  RoutingRecord record;
  Assignment assignment;
  std::map<std::string, Tensor> deltas;
  Tensor carry;
};

struct ModelOutput {
  Tensor logits_BLV;
  std::vector<SiteResult> sites;  // in the order of Model::sites()
};

// What a request carries while decoding token by token.
struct DecodeState {
  int64_t position = 0;
  int64_t step = 0;                  // steps trained, of how many: routers may work in stages
  int64_t total_steps = 1;
  std::vector<RouteState> routers;   // per site
  std::vector<DecodeCache> caches;   // per block: keys and values of the attention
  std::vector<DecodeCache> experts;  // per site
};

class Model : public Module {
 public:
  ~Model() override;
  virtual ModelOutput forward(const Batch& batch, const StepContext& context) const = 0;

  // Logits of the next token, [B, V], for tokens_BL appended to what `state` has seen.
  virtual Tensor decode(const Tensor& tokens_BL, DecodeState& state) const = 0;

  // Every routed place, in the order of the forward pass.
  virtual std::vector<Site*> sites() const = 0;
  virtual int64_t context() const = 0;  // longest sequence

  // "layers.3.moe: reason" for each site whose training decisions look at later tokens; its training loss is labelled so.
  virtual std::vector<std::string> training_sees_future() const { return {}; }

  // Parameters that one token uses, and forward FLOPs per token (multiply-add = 2) at full context.
  virtual int64_t active_parameters() const = 0;
  virtual double flops_per_token() const = 0;
};

// Reads `[model]` and the tables of every layer. `vocabulary` comes from the data. Throws Error(kUsage) with the place of
// what does not fit, before anything large is allocated.
std::shared_ptr<Model> make_model(const Table& root, int64_t vocabulary, int64_t seed, bool allow_noncausal_training);

// Σ over target positions of −ln p(target), in float32 or better, on the graph.
Tensor cross_entropy_sum(const Tensor& logits_BLV, const Tensor& targets_BL);

}  // namespace moelab
