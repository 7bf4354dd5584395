// The router interface. A router returns a plan; it never moves data, never calls an expert, and never changes its state:
// route() is const, and end_step() is the only place where buffers move.
#pragma once

#include "core/capacity.h"
#include "core/comm.h"
#include "core/module.h"
#include "core/params.h"
#include "core/plan.h"
#include "core/random.h"
#include "core/registry.h"

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <source_location>
#include <string>
#include <vector>

namespace moelab {

enum class Mode { kTrain, kEval, kDecode };
const char* to_string(Mode mode);

// Everything that a router may look at. Padding has been removed; every int64 side channel has T entries on the CPU.
struct RouteInput {
  Tensor x_TD;               // the layer's input
  Tensor router_x;           // what the router reads where that is not x (pooled, sub-token); undefined = x_TD
  Tensor token_ids_T;        // undefined where the model has none
  Tensor segment_T;          // undefined, or rising within a sequence
  Tensor domain_T;           // undefined, or a task, language or domain label
  Tensor sequence_T;         // 0 … sequences-1; rows of several sequences may be interleaved
  Tensor position_T;         // position within the sequence, which says what comes before what
  Tensor sequence_key_T;     // global sequence id of this step: keys the draws
  int64_t sequences = 1;
  Tensor cu_seqlens_B1;      // int64 [B+1], where the rows lie sequence by sequence; undefined where interleaved
  Tensor carry;              // what the router of the previous MoE layer handed on; undefined in the first
  const Assignment* forced = nullptr;  // replay this selection: recomputation, finite differences
  std::map<std::string, Tensor>* held = nullptr;  // what stop_gradient() keeps where it was: finite differences of surrogates
  Tensor noise;              // overrides the raw draw; undefined = draw
  Tensor capacity_noise_TE;  // overrides the random drop order

  Mode mode = Mode::kTrain;
  int64_t layer = 0;
  int64_t use = 0;           // which use of a shared router
  int64_t step = 0;
  int64_t total_steps = 1;
  int64_t pass = 0;          // objectives of several passes
  int64_t prompt = 0;        // evaluation: the first so many tokens of each sequence are given, and only those after them are
                             // judged; 0 = all are judged
  RandomKey random;          // of this (seed, mode, layer, pass, step)
  Comm* comm = nullptr;      // the group that shares the batch; never null inside a layer

  int64_t rows() const { return x_TD.size(0); }
  bool training() const { return mode == Mode::kTrain; }
  const Tensor& routed() const { return router_x.defined() ? router_x : x_TD; }
};

// What one request carries from call to call while decoding. Routers keep what they need under a name of their own.
struct RouteState {
  std::map<std::string, Tensor> kept;
};

// Three score tensors that may differ, and what losses need to know of noise. All [T,E], any may be undefined.
struct Scores {
  Tensor select_TE;  // what the choice was made on
  Tensor gate_TE;    // what the gates were taken from: those of a row are in proportion to it
  Tensor loss_TE;    // probabilities for losses, without noise
  Tensor clean_TE;   // logits without noise
  Tensor noisy_TE;   // logits with noise; equal to clean_TE where none was drawn
  Tensor noise_std_TE;  // of the additive noise; undefined = none
};

// A choice in two levels: of groups of consecutive experts, then of as many experts inside each chosen group. What the load loss
// needs of it; of each level the clean and noisy logits and the noise's std alone are set.
struct TwoLevels {
  Scores group;       // [T,G]
  Scores expert;      // [T,E], comparable inside a group only
  int64_t k_groups = 0;
  int64_t k = 0;      // experts inside each; the choices of a row lie group by group
};

struct RouteOutput {
  Plan plan;
  Assignment assignment;   // sparse plans only
  Tensor gate_TK;          // before any drop or after_drop renormalisation, on the graph; sparse plans only
  Scores scores;
  std::optional<TwoLevels> levels;
  int64_t k = 0;           // choices per row the method makes; 0 = varies
  int64_t places = 0;      // Σ capacity over scopes and experts; 0 = no capacity
  std::map<std::string, Tensor> probes;      // "logits", "probs", … for diagnostics and `moelab route`
  std::map<std::string, Tensor> statistics;  // per-row tensors for losses of the method (distilled scores, …)
  std::map<std::string, Tensor> deltas;      // additive state changes; the trainer sums them over micro-batches and ranks
  Tensor carry;
};

// Something that changes the model or the optimiser, applied and logged by the trainer.
struct Event {
  enum class Kind { kFreeze, kUnfreeze, kExpertAdded, kExpertRemoved, kStageChanged };
  Kind kind = Kind::kStageChanged;
  int64_t expert = -1;               // for added and removed
  int64_t source = -1;               // expert whose parameters the new one starts from; -1 = fresh
  std::vector<std::string> tensors;  // names below the router, for freeze and unfreeze
  std::string note;                  // one line for events.jsonl
  bool with_moments = false;         // added from a source: with its optimiser moments, which otherwise start at zero
};

struct CorpusStatistics {
  Tensor token_counts_V;  // int64
};

// How probabilities for losses come from clean logits: softmax z, σ(z) / Σ σ(z), or by a rule of the router's own.
enum class ProbabilityRule { kSoftmax, kSigmoidShare, kOwn };
const char* to_string(ProbabilityRule rule);

// What evaluation does with the experts: as training does, all of them on every row, or one of averaged parameters.
enum class InEvaluation { kAsInTraining, kAllExperts, kMergedExperts };
const char* to_string(InEvaluation what);

// Facts about the method, as data: generic code and tests branch on these, never on a name.
struct RouterFacts {
  PlanForm plan = PlanForm::kSparse;
  bool learned = true;             // a gradient reaches its parameters
  bool noisy_in_training = false;  // draws random numbers in training with its default options
  bool random_in_eval = false;
  bool stateful = false;           // end_step() moves buffers
  bool changes_experts = false;    // adds and removes experts while it trains: active_experts_E() moves
  bool variable_k = false;
  bool capacity_is_choice = false; // experts choose rows: [moe.capacity] says how many, whatever its mode
  bool needs_token_ids = false;
  bool needs_segments = false;
  bool needs_domain = false;
  bool needs_global_batch = false; // decides over all ranks' rows
  bool mixes_ranks = false;        // ranks decide over rows dealt out among them: their number matters
  bool batch_independent = true;   // without a capacity, a row's decision depends on that row and on earlier ones of its
                                   // sequence alone (in training)
  bool batch_independent_eval = true;
  bool reads_prompt = false;       // its evaluation looks ahead within the prompt of a sequence, and no further; where no prompt
                                   // is set, within all rows
  bool looks_ahead = false;        // reads later tokens by construction (leak controls)
  bool straight_through = false;   // its gradient is a declared surrogate: what stop_gradient() names has none
  bool differentiable_gate = true; // gates depend on the scores
  bool permutation_equivariant = true;  // permuting experts' parameters permutes the plan
  bool decodes = true;             // token by token equals the full forward
  int64_t passes = 1;              // forward passes per step
  int64_t fixed_k = 0;             // choices per row where the method fixes them; 0 = the option `k`, or it varies
  int64_t groups = 1;              // of consecutive experts: a row chooses k_groups of them, then as many experts inside each
  int64_t k_groups = 1;
  bool has_scores = true;          // one logit and one probability per row and expert: losses and metrics may read them
  ProbabilityRule probabilities = ProbabilityRule::kSoftmax;  // of these scores
  bool distils = false;            // a second router learns its choices: RouteOutput::statistics has its scores, "distilled"
  bool time_ordered = false;       // where a row's decision depends on others, places included, none of them is later
  InEvaluation in_evaluation = InEvaluation::kAsInTraining;

  PlanForm plan_in(Mode mode) const;
};

// Noise as `[moe.noise]` asks for; routers resolve kPaper to their own.
struct NoiseSpec {
  enum class Kind { kPaper, kNone, kNormal, kJitter };
  Kind kind = Kind::kPaper;
  double std = 1;
  double epsilon = 0.01;
  bool std_given = false;      // the config says so: overrides the paper's value
  bool epsilon_given = false;
};
OptionSpecs noise_options();
NoiseSpec noise_spec(const Options& options);

enum class Renormalise { kNone, kBeforeDrop, kAfterDrop };

// What a factory gets: sizes, options already checked, and where initial values come from.
struct RouterSpec {
  int64_t width = 0;        // D
  int64_t experts = 0;      // active at the start
  int64_t max_experts = 0;  // rows of every per-expert tensor
  int64_t layer = 0;
  int64_t vocabulary = 0;   // 0 = unknown
  at::ScalarType dtype = at::kFloat;
  RandomKey init;           // of this layer's router
  Options options;          // its own, declared in RouterEntry::options
  NoiseSpec noise;
  CapacityPolicy train_capacity;
  CapacityPolicy eval_capacity;

  int64_t k() const { return options.integer("k"); }
  Renormalise renormalise() const;  // the option `renormalise`, kNone where undeclared
  const CapacityPolicy& capacity(Mode mode) const { return mode == Mode::kTrain ? train_capacity : eval_capacity; }
};

struct RouterEntry;

class Router : public Module {
 public:
  explicit Router(RouterSpec spec);
  ~Router() override;

  // Decides. Must not change parameters or buffers.
  virtual RouteOutput route(const RouteInput& in, RouteState& state) const = 0;

  // Once before training, with what the training split holds.
  virtual void prepare(const CorpusStatistics& statistics);

  // After every optimiser step, with the deltas of route() summed over micro-batches and ranks.
  virtual std::vector<Event> end_step(const std::map<std::string, Tensor>& deltas, int64_t step);

  // The entry's facts, corrected for this instance's options.
  virtual RouterFacts facts() const;

  // What a given `noise` is in this mode, with this instance's options, as in RouterEntry::noise_shape; "" = nothing.
  virtual std::string noise_shape(Mode mode) const;

  // Tensors whose row e belongs to expert e: surgery copies, resets and permutes these beside the experts' own.
  virtual std::vector<Tensor> per_expert_tensors() const;

  // Bool [max_experts], the experts that may be chosen now; undefined = all of them. Metrics and losses count these only. Where
  // none come and go: those the layer began with.
  virtual Tensor active_experts_E() const;
  int64_t active_experts() const;  // their number

  const RouterSpec& spec() const { return spec_; }
  const RouterEntry& entry() const { return *entry_; }
  void set_entry(const RouterEntry* entry) { entry_ = entry; }

 protected:
  RouterSpec spec_;

 private:
  const RouterEntry* entry_ = nullptr;
};

// A loss that the paper attaches, with its coefficient there.
struct PaperLoss {
  std::string name;
  double coefficient = 0;
  std::map<std::string, OptionValue> options = {};
};

struct ProbeDoc {
  std::string name;
  std::string shape;
  std::string doc;
};

struct RouterEntry {
  std::string name;      // = the file's stem
  std::string title = {};
  std::string citation = {};  // authors, year, arXiv id
  std::string equation = {};  // one or two lines for `describe`
  RouterFacts facts = {};
  OptionSpecs options = {};
  std::vector<PaperLoss> paper_losses = {};
  CapacityPolicy paper_capacity = {};
  std::string noise_shape = "";                // of the raw draw in contract terms, "" = none
  std::vector<ProbeDoc> probes = {};
  std::vector<std::string> differences = {};   // from the paper; empty = none known
  std::vector<std::map<std::string, OptionValue>> verified_with = {};  // settings for the conformance kit to try: numbers have no
                                                                        // list of choices that it could go through
  std::function<std::unique_ptr<Router>(RouterSpec)> make;
  std::source_location where = std::source_location::current();
};

std::unique_ptr<Router> make_router(const std::string& name, RouterSpec spec);

// Whether a row's output may depend on later rows of its sequence, and why. In evaluation with a prompt it is asked of the
// rows that are judged: from the last one of the prompt on.
struct Causality {
  bool causal = true;
  std::string reason;
};
Causality causality(const RouterFacts& facts, const CapacityPolicy& policy, Mode mode, int64_t k, int64_t prompt = 0);

// Options that several routers share, with one wording.
OptionSpec k_option(int default_value);
OptionSpec renormalise_option(const char* default_value);

}  // namespace moelab
