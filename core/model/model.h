// What the trainer and the commands know of a model: batches in, logits and routing decisions out; and the registry of models.
#pragma once

#include "core/batch.h"
#include "core/comm.h"
#include "core/moe_layer.h"
#include "core/router.h"

#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace moelab {

// Where and how a forward pass happens. Two passes with equal contexts and batches are bitwise equal.
struct StepContext {
  Mode mode = Mode::kTrain;
  int64_t seed = 0;
  int64_t step = 0;
  int64_t total_steps = 1;
  int64_t pass = 0;
  int64_t prompt = 0;  // RouteInput::prompt
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
  Tensor logits_BLV;              // one row per target: a classifier's L is 1, its V the classes
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

  // Logits of the next token, [B, V], for tokens_BL appended to what `state` has seen. Error(kUsage) where a model reads no
  // tokens.
  virtual Tensor decode(const Tensor& tokens_BL, DecodeState& state) const;

  // Every routed place, in the order of the forward pass.
  virtual std::vector<Site*> sites() const = 0;
  virtual int64_t context() const = 0;  // rows of the longest sequence: its tokens, or the patches of an image
  virtual int64_t rows(const Batch& batch) const { return batch.rows(); }  // that each layer routes

  // The parameters that training may ever move. A base under adapters is not among them: it needs no moments, and a checkpoint
  // may leave it out.
  virtual std::vector<NamedTensor> optimised() const { return parameters(); }

  // "layers.3.moe: reason" for each site whose training decisions look at later tokens; its training loss is labelled so.
  virtual std::vector<std::string> training_sees_future() const { return {}; }

  // Parameters that one row uses, and forward FLOPs per row (multiply-add = 2) at full context.
  virtual int64_t active_parameters() const = 0;
  virtual double flops_per_token() const = 0;
};

// What a factory gets: the tables of the whole experiment, and what the data are.
struct ModelSpec {
  Table root;
  DataShape data;
  int64_t seed = 0;
  bool allow_noncausal_training = false;
  int64_t eval_prompt = 0;  // of every evaluation: RouteInput::prompt
};

struct ModelEntry {
  std::string name;  // = the file's stem
  std::string title;
  std::string doc;
  DataKind reads = DataKind::kTokens;
  bool causal = false;       // no row may see a later one: routers that look ahead are refused
  OptionSpecs options = {};  // of `[model]`, beside its name
  std::function<std::shared_ptr<Model>(const ModelSpec&, const Options&)> make;
  std::source_location where = std::source_location::current();
};

extern template class Registry<ModelEntry>;

// The model that `[model] name` asks for, "decoder" where it does not say. An unknown one is Error(kUsage) with its place.
const ModelEntry& model_entry(const Table& root);

// What `[model]` says, every key checked.
Options model_options(const Table& root);

// Reads `[model]` and the tables of every layer. `spec.data` is of the kind that the model reads. Throws Error(kUsage) with the
// place of what does not fit, before anything large is allocated.
std::shared_ptr<Model> make_model(const ModelSpec& spec);

// Σ over target positions of −ln p(target), in float32 or better, on the graph.
Tensor cross_entropy_sum(const Tensor& logits_BLV, const Tensor& targets_BL);

}  // namespace moelab
