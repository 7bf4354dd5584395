// Banks of experts. A bank is a list of homogeneous groups (stacked parameters, expert first) with a map from the global
// expert to (group, slot): unequal widths and mixed kinds are several groups.
#pragma once

#include "core/module.h"
#include "core/params.h"
#include "core/plan.h"
#include "core/registry.h"

#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

namespace moelab {

class DenseMaps;
struct AttentionPlace;
struct ExecuteInput;
class RoutedAttention;

// What a request keeps from call to call while decoding (keys and values of attention experts, …).
struct DecodeCache {
  std::map<std::string, Tensor> kept;
};

// What an expert may know of the rows it gets.
struct ExpertContext {
  Tensor rows_ND;            // grouped by expert
  Tensor offsets_E1 = {};  // int64 on the CPU
  const SparsePlan* plan = nullptr;  // row n belongs to the plan's pair n; null where rows are slots of a soft plan
  Tensor input_TD = {};  // the layer's input, all rows
  Tensor sequence_T = {};  // of the layer's input
  Tensor cu_seqlens_B1 = {};  // undefined where sequences are interleaved
  DecodeCache* cache = nullptr;
  bool training = true;
  bool recompute = false;  // save less for the backward pass and compute it again there
};

struct ExpertGroup {
  int64_t first = 0;    // global id of slot 0; slots are consecutive global ids
  int64_t experts = 0;
  std::vector<NamedTensor> stacked;  // each [experts, …]; short names: "w_in"
  std::string prefix = {};           // of their names among the bank's parameters: "" or, of one group among several, "4-5."
  std::string kind = {};             // registered name and options: groups of one kind and shape may exchange experts
};

class ExpertBank : public Module {
 public:
  ~ExpertBank() override;

  int64_t experts() const;
  const std::vector<ExpertGroup>& groups() const { return groups_; }

  // The registered name, for messages; "" for a bank made by hand.
  const std::string& name() const { return name_; }
  void set_name(std::string name) { name_ = std::move(name); }
  void set_kind(const std::string& kind);  // of groups that have none

  // Output of every row through its own expert, gates not applied: [N, output_width(stage)]. An expert without rows costs
  // nothing, and its parameters still get a zero gradient. A bank of two stages (attention heads) maps rows to rows twice, and
  // the module's own code runs in between on one row per pair; see map_pairs in execute.h.
  virtual Tensor forward(const ExpertContext& context, int stage) const = 0;
  virtual int stages() const { return 1; }
  virtual int64_t output_width(int stage) const = 0;

  // The layer of a sparse plan at once: Σ gate · expert(row) [rows of input_TD, output_width(0)], with the rows of all pairs
  // never side by side. `context.rows_ND` is undefined. Undefined where the bank has no such path: then the rows are dispatched,
  // mapped by forward() and combined.
  virtual Tensor forward_layer(const ExpertContext& context) const;

  // All rows through one expert with the given parameters (in the order of groups()[0].stacked, without the expert axis).
  // Serves merging and the reference executor; refused by banks of several groups or stages.
  virtual Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows_ND) const;
  virtual bool has_forward_with() const { return false; }

  // The same for one expert of any bank of one stage: a bank of several groups asks the part that the expert belongs to.
  virtual Tensor forward_expert(int64_t expert, const std::vector<Tensor>& parameters, const Tensor& rows_ND) const;
  virtual bool has_forward_expert() const { return has_forward_with(); }

  // Why plans of this form cannot be carried out with this bank, in one line; "" = they can.
  virtual std::string refuses(PlanForm form) const;

  // Σ_e alpha[e]·θ_e for every parameter, on the graph. Refused across groups. A bank may have a way of its own to mix them.
  virtual std::vector<Tensor> merge(const Tensor& alpha_E) const;

  // What all experts stand on and nobody trains; null = nothing. Its output is part of the layer's, once per row: experts then
  // give what they add to it. The layer names it "base".
  virtual std::shared_ptr<Module> base() const { return nullptr; }
  virtual Tensor base_output(const Tensor& x_TD) const;  // undefined without a base

  // The layer's whole output, base included, where the bank has a shorter way than row by row; undefined = it has none.
  virtual Tensor run(const Plan& plan, const ExecuteInput& input) const;

  // One expert's parameters, on the graph.
  std::vector<Tensor> parameters_of(int64_t expert) const;

  int64_t parameters_per_expert(int64_t expert) const;
  virtual double flops_per_row(int64_t expert) const = 0;  // forward; a multiply-add counts as two

  // (stacked tensor, slot) for every parameter of an expert: what surgery and the optimiser touch.
  struct Slice {
    Tensor stacked;
    int64_t slot;
    Tensor view() const;  // the expert's part; writes reach the parameter
  };
  std::vector<Slice> slices(int64_t expert) const;

  // Whether two experts are of one kind and shape, so that one may take the other's place.
  bool alike(int64_t expert, int64_t other) const;
  const std::string& kind_of(int64_t expert) const { return group_of(expert).kind; }

  // In place, without gradient. trainers/surgery.h does the same with the optimiser's moments beside it.
  void clone_expert(int64_t from, int64_t to);  // refused unless the two are alike
  virtual void reset_expert(int64_t expert, RandomKey key) = 0;
  void permute(const std::vector<int64_t>& old_of_new);  // expert e becomes what old_of_new[e] was; each alike its source

 protected:
  std::vector<ExpertGroup> groups_;  // handles of tensors registered with add_parameter

 private:
  const ExpertGroup& group_of(int64_t expert) const;
  const ExpertGroup& only_group(const char* purpose) const;
  void require_alike(const char* purpose, int64_t from, int64_t to) const;
  std::string name_;
};

// One linear map that an adapter is laid on.
struct LinearShape {
  std::string name;
  int64_t in = 0, out = 0;
};

struct ExpertSpec {
  int64_t width = 0;        // D
  int64_t experts = 0;      // including room to grow
  at::ScalarType dtype = at::kFloat;
  RandomKey init;
  double output_scale = 1;  // scales the initial output weights: 1/√(2·layers) in deep models
  Options options;
  int64_t first = 0;        // global id of expert 0, in a bank that is one part of several: keys its initial draw
  std::shared_ptr<const DenseMaps> base = nullptr;  // a dense layer of the model that the experts stand on
  std::vector<LinearShape> linears = {};            // or linear maps of the model, each a stage of the bank
};

// What of a block the experts stand in for: its feed-forward layer, additions to some of its linear maps, or its attention.
enum class ExpertPlace { kFeedForward, kLinears, kAttention };

struct ExpertEntry {
  std::string name;
  std::string title;
  std::string citation;
  std::string equation;
  std::vector<std::string> differences = {};  // from the paper; empty = none known
  OptionSpecs options = {};
  // Settings that the conformance kit runs beside the defaults and each other choice.
  std::vector<std::map<std::string, OptionValue>> verified_with = {};
  // Why these settings cannot be built, in one line; "" = they can. Not given: always.
  std::function<std::string(const ExpertSpec&)> refuses = {};
  // The options of each expert, where they may differ (a width each); not given: all have the bank's.
  std::function<std::vector<Options>(const ExpertSpec&)> per_expert = {};
  std::function<std::unique_ptr<ExpertBank>(ExpertSpec)> make;
  ExpertPlace place = ExpertPlace::kFeedForward;
  bool recomputes = false;  // its forward() reads ExpertContext::recompute, where `execution` is "auto"
  std::function<std::shared_ptr<RoutedAttention>(const AttentionPlace&)> make_attention = {};  // of kAttention
  // Why these settings do not go with this attention, in one line that begins with the option, "[moe.expert] name = value …"; ""
  // = they do. Not given: always.
  std::function<std::string(const AttentionPlace&)> refuses_attention = {};
  std::source_location where = std::source_location::current();
};

// The hidden width that an option `width` asks for: 0 = 4·D.
int64_t hidden_width(int64_t asked, int64_t model_width);

// Experts of one registered kind; several groups where per_expert() says that they differ. Throws Error(kUsage) with the entry's
// refusal.
std::unique_ptr<ExpertBank> make_experts(const std::string& name, ExpertSpec spec);

// Consecutive experts of one kind with the same options.
struct ExpertPart {
  std::string name;
  int64_t experts = 0;
  Options options = {};
};

// `parts` with every one split where its experts differ, and neighbours of the same kind and options joined.
std::vector<ExpertPart> uniform_parts(const std::vector<ExpertPart>& parts, const ExpertSpec& spec);

// A bank of all the parts in their order, spec.experts in all; spec.options are not read. One uniform part gives the plain bank
// of that kind, several one group each, with parameters named "<first>-<last>.w_in".
std::unique_ptr<ExpertBank> make_mixed_experts(const std::vector<ExpertPart>& parts, const ExpertSpec& spec);

}  // namespace moelab
