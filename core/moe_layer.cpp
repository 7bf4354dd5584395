#include "core/moe_layer.h"

#include "core/error.h"
#include "core/layer_tables.h"

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

const std::vector<std::string> kMoeTables{"router", "noise", "expert", "shared", "capacity"};

OptionSpecs moe_options() {
  return {
      option("experts", 8, "routed experts").at_least(1),
      option("max_experts", 0, "room to grow; 0 = experts").at_least(0),
      option("losses", "paper", "the paper's losses with its coefficients, or none; any [[loss]] silences both")
          .one_of({"paper", "none"}),
      option("execution", "auto", "how plans are carried out: auto takes what was measured to be fastest")
          .one_of(execution_words()),
      option("recompute", false, "make the experts' pre-activations again in the backward pass instead of keeping them"),
  };
}

// Keys that one of the tables has beside those of [moe].
OptionSpecs place_options(const std::string& table) {
  OptionSpecs specs = moe_options();
  if (table != "moe")
    specs.push_back(option("layers", "all", "blocks that route here: all, none, odd, even, first, last, or a list like \"1,3\""));
  return specs;
}

const char* default_expert(const std::string& table) {
  if (table == "attention") return "attention_head";
  return table == "adapters" ? "lora" : "ffn";
}

// What decides who reads a key: experts that choose rows have a capacity whatever the mode, a factor unless it says otherwise.
Options as_read(Options options, const RouterFacts& facts) {
  const OptionSpec mode = capacity_options().front();
  if (facts.capacity_is_choice && options.text(mode.name) == "none") options.set(mode, std::string("factor"));
  return options;
}

std::string unread_capacity(const OptionSpec& key, const Options& options, const RouterFacts& facts) {
  if (key.name == "mode" || !options.was_set(key.name)) return "";
  if (options.text("mode") == "paper")
    return fmt::format("'{}' is not read with mode = \"paper\", which is the router's own policy", key.name);
  if (!options.was_set("mode") && !facts.capacity_is_choice)
    return fmt::format("'{}' is not read without a `mode`; write mode = \"factor\" or another", key.name);
  return unread_reason(key, as_read(options, facts));
}

// A factor without a mode that reads it would be a capacity that somebody believes in and nobody applies. What [moe.capacity]
// says may be for evaluation alone.
void refuse_unread_keys(const Table& train_table, const Options& train, const Table& eval_table, const Options& eval,
                        const RouterFacts& facts) {
  for (const OptionSpec& key : capacity_options()) {
    const std::string in_training = unread_capacity(key, train, facts);
    const std::string in_evaluation = eval_table.present() ? unread_capacity(key, eval, facts) : "";
    const bool own = eval_table.has(key.name), handed_down = eval_table.present() && !own;
    if (own && !in_evaluation.empty()) eval_table.refuse_unread(key, in_evaluation);
    if (!in_training.empty() && !(handed_down && in_evaluation.empty())) train_table.refuse_unread(key, in_training);
  }
}

// Whoever wants to drop everything says so: value = 0.
void refuse_no_places(const Table& table, const Options& options) {
  const std::string& mode = options.text("mode");
  if (mode == "absolute" && !options.was_set("value"))
    table.fail("mode", "mode = \"absolute\" needs `value`, the places of each expert");
  if ((mode == "factor" || mode == "token_fraction") && options.real("factor") == 0 && options.integer("min") == 0)
    table.fail("factor", "factor = 0 leaves the experts no place; write a larger one, or give `min`");
}

// A method with a fixed number of choices has no option `k`; who writes that number all the same is right.
bool names_fixed_k(const Table& router, const RouterEntry& entry) {
  const auto is_k = [](const OptionSpec& spec) { return spec.name == "k"; };
  const bool own = std::any_of(entry.options.begin(), entry.options.end(), is_k);
  if (own || entry.facts.fixed_k == 0 || !router.has("k")) return false;
  const int64_t k = router.options({option("k", 0, "experts per row")}, router.keys()).integer("k");
  if (k != entry.facts.fixed_k)
    router.fail(
        "k", fmt::format("k = {}, but router '{}' chooses {} of each row's experts always", k, entry.name, entry.facts.fixed_k));
  return true;
}

void refuse_unread_noise(const Table& noise, const RouterEntry& entry, NoiseSpec::Kind kind) {
  const bool asked = kind == NoiseSpec::Kind::kNormal || kind == NoiseSpec::Kind::kJitter;
  if (!asked || entry.facts.has_scores || entry.facts.plan != PlanForm::kSparse) return;
  noise.fail("kind", fmt::format("router '{}' has no logits that noise could change; use \"none\"", entry.name));
}

void refuse_unread_capacity(const Table& capacity, const RouterEntry& entry, const CapacityPolicy& policy) {
  if (entry.facts.plan == PlanForm::kSparse || policy.mode == CapacityPolicy::Mode::kNone) return;
  capacity.fail("mode", fmt::format("router '{}' drops nothing, a {} plan has no capacity; use \"none\"", entry.name,
                                    to_string(entry.facts.plan)));
}

void read_capacity(const Table& table, const RouterEntry& entry, RouterSpec& spec) {
  const CapacityPolicy& paper = entry.paper_capacity;
  OptionSpecs keys = capacity_options();
  for (OptionSpec& key : keys) key.readers = {};  // evaluation's table may read what training's says
  const Options train = table.options(keys, {"eval"});
  const Table eval = table.child("eval");
  Options merged = train;
  const Options own = eval.options(keys);
  for (const OptionSpec& key : keys)
    if (own.was_set(key.name)) merged.set(key, own.all().at(key.name));
  refuse_unread_keys(table, train, eval, merged, entry.facts);
  refuse_no_places(table, train);
  spec.train_capacity = capacity_policy(train, paper);
  refuse_unread_capacity(table, entry, spec.train_capacity);
  if (!eval.present()) return;  // evaluation without a table of its own drops nothing
  refuse_no_places(eval, merged);
  spec.eval_capacity = capacity_policy(merged, paper);
  refuse_unread_capacity(eval, entry, spec.eval_capacity);
}

LossScope scope_of_loss(const std::string& word) {
  if (word == "micro") return LossScope::kMicro;
  if (word == "step_streaming") return LossScope::kStepStreaming;
  return word == "sequence" ? LossScope::kSequence : LossScope::kStep;
}

const PaperLoss* paper_loss(const RouterEntry& router, const std::string& name) {
  for (const PaperLoss& loss : router.paper_losses)
    if (loss.name == name) return &loss;
  return nullptr;
}

OptionSpecs loss_options(const LossEntry& entry, const RouterEntry& router) {
  const PaperLoss* paper = paper_loss(router, entry.name);
  OptionSpecs specs = with_name(entry.options);
  specs.push_back(option("label", entry.name.c_str(), "name in metrics and results"));
  specs.push_back(option("coefficient", paper ? paper->coefficient : entry.coefficient, "weight in the training loss"));
  specs.push_back(option("scope", "step",
                         "rows over which the value is formed; step_streaming: the step's, guessed from the micro-batches so far")
                      .one_of({"micro", "sequence", "step", "step_streaming"}));
  return specs;
}

LossTerm read_loss(const Table& table, const RouterEntry& router, const RouterFacts& facts) {
  const std::string name = plugin_name(table, "");
  if (name.empty()) table.fail("name", "a [[loss]] needs a name");
  const LossEntry& entry = find_plugin<LossEntry>(table, name);
  const std::string refusal = entry.refuses ? entry.refuses(facts) : "";
  if (!refusal.empty())
    table.fail("name", fmt::format("loss '{}' cannot be used with router '{}': {}", name, router.name, refusal));
  const Options options = table.options(loss_options(entry, router));
  const LossTerm term{entry.make(options, router), options.text("label"), options.real("coefficient"),
                      scope_of_loss(options.text("scope"))};
  if (term.loss->pooled_over_layers() && term.scope != LossScope::kStep)
    table.fail("scope", "layers = \"pooled\" forms one value over the whole step: scope must be \"step\"");
  return term;
}

LossTerm attach_paper_loss(const PaperLoss& paper, const RouterEntry& router) {
  const LossEntry& entry = Registry<LossEntry>::instance().find(paper.name);
  Options options(loss_options(entry, router));
  for (const OptionSpec& key : entry.options) {
    const auto given = paper.options.find(key.name);
    if (given != paper.options.end()) options.set(key, given->second);
  }
  return {entry.make(options, router), paper.name, paper.coefficient, LossScope::kStep};
}

std::vector<LossTerm> read_losses(const Table& root, const Options& moe, const RouterEntry& router, const RouterFacts& facts) {
  std::vector<LossTerm> terms;
  for (const Table& table : root.array("loss")) {
    terms.push_back(read_loss(table, router, facts));
    const auto same = [&](const LossTerm& other) { return other.label == terms.back().label; };
    if (std::count_if(terms.begin(), terms.end(), same) > 1)
      table.fail("name", fmt::format("two losses are labelled '{}'; give one of them another `label`", terms.back().label));
  }
  if (!terms.empty() || moe.text("losses") == "none") return terms;
  for (const PaperLoss& paper : router.paper_losses) terms.push_back(attach_paper_loss(paper, router));
  return terms;
}

void refuse_impossible_k(const Table& router, const Options& options, int64_t experts) {
  if (!options.declared("k") || options.integer("k") <= experts) return;
  router.fail("k", fmt::format("k = {} is more than experts = {}", options.integer("k"), experts));
}

// A router may bring a vocabulary where no model has one, or room for more tokens than the model's.
int64_t read_vocabulary(const Table& router, const Options& options, int64_t model) {
  const int64_t own = options.declared("vocabulary") ? options.integer("vocabulary") : 0;
  if (own > 0 && own < model) router.fail("vocabulary", fmt::format("vocabulary = {} is less than the model's {}", own, model));
  return own > 0 ? own : model;
}

RouterSpec read_router(const Table& moe, const RouterEntry& entry, RouterSpec spec) {
  const Table table = moe.child("router");
  const std::vector<std::string> read = names_fixed_k(table, entry) ? std::vector<std::string>{"k"} : std::vector<std::string>{};
  spec.options = table.options(with_name(entry.options), read);
  refuse_impossible_k(table, spec.options, spec.experts);
  spec.vocabulary = read_vocabulary(table, spec.options, spec.vocabulary);
  if (entry.facts.needs_token_ids && spec.vocabulary == 0)
    table.fail("name", fmt::format("router '{}' needs token ids, which this model does not have{}", entry.name,
                                   spec.options.declared("vocabulary") ? "; `vocabulary` says how many there are" : ""));
  spec.noise = noise_spec(moe.child("noise").options(noise_options()));
  refuse_unread_noise(moe.child("noise"), entry, spec.noise.kind);
  read_capacity(moe.child("capacity"), entry, spec);
  return spec;
}

// What is dropped is drawn per row of the layer, which only the experts' own way through a sparse plan knows. One decision for
// several maps has no other way.
void refuse_unread_dropout(const Table& expert, const LayerSettings& settings, const RouterFacts& facts) {
  const Options& options = settings.expert_spec.options;
  if (settings.place != ExpertPlace::kLinears || !options.declared("dropout") || options.real("dropout") == 0) return;
  const bool one_for_several = options.text("decision") == "layer" && options.text("targets") != "ffn";
  const bool own_way = settings.execution == Execution::kAuto || one_for_several;
  if (own_way && facts.plan_in(Mode::kTrain) == PlanForm::kSparse) return;
  expert.fail("dropout",
              fmt::format("experts '{}': dropout is drawn per row of the layer, which takes a router with a sparse plan "
                          "and execution = \"auto\"; set dropout = 0",
                          settings.expert));
}

}  // namespace

const std::vector<std::string>& layer_tables() {
  static const std::vector<std::string> names{"moe", "attention", "adapters"};
  return names;
}

LayerSettings read_layer(const Table& root, int64_t width, int64_t layer, int64_t vocabulary, at::ScalarType dtype,
                         RandomKey init, const std::string& table) {
  const Table moe = root.child(table);
  const Options options = moe.options(place_options(table), kMoeTables);
  LayerSettings settings;
  settings.table = table;
  RouterSpec& router = settings.router_spec;
  router.width = width;
  router.experts = options.integer("experts");
  router.max_experts = options.integer("max_experts") == 0 ? router.experts : options.integer("max_experts");
  if (router.max_experts < router.experts)
    moe.fail("max_experts", fmt::format("max_experts = {} is less than experts = {}", router.max_experts, router.experts));
  router.layer = layer;
  router.vocabulary = vocabulary;
  router.dtype = dtype;
  router.init = init.with("router");
  settings.router = plugin_name(moe.child("router"), "softmax_topk");
  const auto& entry = find_plugin<RouterEntry>(moe.child("router"), settings.router);
  router = read_router(moe, entry, router);
  // Options may change what a router does, and only an instance knows.
  const RouterFacts facts = with_place(moe, "router", [&] { return make_router(entry.name, router)->facts(); });

  ExpertSpec expert;
  expert.width = width;
  expert.experts = router.max_experts;
  expert.dtype = dtype;
  expert.init = init.with("experts");
  read_experts(moe, std::move(expert), settings, facts, default_expert(table));
  settings.execution = execution_of(options.text("execution"));
  settings.recompute = options.flag("recompute");
  refuse_unread_execution(moe, settings, facts);
  refuse_unread_dropout(moe.child("expert"), settings, facts);
  settings.losses = read_losses(root, options, entry, facts);
  return settings;
}

MoELayer::MoELayer(std::string path, LayerSettings settings, std::shared_ptr<ExpertBank> bank) : settings_(std::move(settings)) {
  site_.path = std::move(path);
  site_.table = settings_.table;
  site_.layer = settings_.router_spec.layer;
  site_.router = make_router(settings_.router, settings_.router_spec);
  site_.bank = bank ? std::move(bank) : routed_bank(settings_);
  site_.losses = settings_.losses;
  shared_ = shared_bank(settings_);
  add_child("router", site_.router);
  add_child("experts", site_.bank);
  // A base that is a layer of the model has its place there.
  if (!settings_.expert_spec.base && site_.bank->base()) add_child("base", site_.bank->base());
  if (!shared_) return;
  add_child("shared", shared_);
  const RouterSpec& spec = settings_.router_spec;
  const auto weight = [&](const char* name, int64_t rows) {
    return normal_tensor(spec.init.with(name), {rows, spec.width}, 0.02, spec.dtype);
  };
  if (settings_.shared_gate) shared_gate_weight_1D_ = add_parameter("shared.gate_weight", weight("shared_gate", 1));
  if (settings_.shared_residual)
    shared_coefficient_weight_2D_ = add_parameter("shared.coefficient_weight", weight("shared_coefficient", 2));
}

RouteOutput MoELayer::decide(const RouteInput& in, RouteState& state) const {
  RouteOutput out = site_.router->route(in, state);
  if (!in.training() || in.step == site_.checked_step) validate(out.plan, in.rows(), settings_.router_spec.max_experts);
  return out;
}

Tensor MoELayer::shared_output(const Tensor& x_TD) const {
  if (!shared_) return {};
  const Tensor y_TD = shared_->forward_with(shared_->parameters_of(0), x_TD);
  if (!settings_.shared_gate) return y_TD;
  return y_TD.mul(x_TD.matmul(shared_gate_weight_1D_.t()).sigmoid());
}

Tensor MoELayer::with_shared(const Tensor& routed_TD, const Tensor& x_TD) const {
  const Tensor shared_TD = shared_output(x_TD);
  if (!shared_TD.defined()) return routed_TD;
  if (!settings_.shared_residual) return routed_TD.add(shared_TD);
  const Tensor coefficient_T2 = x_TD.matmul(shared_coefficient_weight_2D_.t()).softmax(1);
  return routed_TD.mul(coefficient_T2.narrow(1, 0, 1)).add(shared_TD.mul(coefficient_T2.narrow(1, 1, 1)));
}

Tensor MoELayer::run_experts(const RouteInput& in, const Plan& plan, DecodeCache* cache) const {
  ExecuteInput input = execute_input(in, cache);
  input.recompute = settings_.recompute;
  if (settings_.execution == Execution::kAuto)
    if (const Tensor whole_TD = site_.bank->run(plan, input); whole_TD.defined()) return whole_TD;
  const Tensor y_TD = execute(plan, *site_.bank, input, settings_.execution), base_TD = site_.bank->base_output(in.x_TD);
  return base_TD.defined() ? base_TD.add(y_TD) : y_TD;
}

LayerOutput MoELayer::observed(const RouteInput& in, RouteOutput routed) const {
  LayerOutput out;
  out.routed = std::move(routed);
  out.statistics = term_statistics(site_, in, out.routed);
  out.record = record_of(in, out.routed, settings_.router_spec.max_experts, site_.router->active_experts_E());
  return out;
}

LayerOutput MoELayer::forward(const RouteInput& in, RouteState& state, DecodeCache* cache) const {
  RouteOutput routed = decide(in, state);
  const Tensor y_TD = with_shared(run_experts(in, routed.plan, cache), in.x_TD);
  LayerOutput out = observed(in, std::move(routed));
  out.y_TD = y_TD;
  return out;
}

ExecuteInput execute_input(const RouteInput& in, DecodeCache* cache) {
  return {.x_TD = in.x_TD, .sequence_T = in.sequence_T, .cu_seqlens_B1 = in.cu_seqlens_B1, .cache = cache,
          .training = in.training(), .draws = {in.random.with("experts"), in.sequence_key_T, in.position_T}};
}

std::vector<TermStatistics> term_statistics(const Site& site, const RouteInput& in, const RouteOutput& out) {
  const LossInput input{in, out, *site.router, site.router->spec().max_experts};
  std::vector<TermStatistics> all;
  for (size_t i = 0; i < site.losses.size(); ++i)
    all.push_back({i, collect_statistics(*site.losses[i].loss, site.losses[i].scope, input)});
  return all;
}

}  // namespace moelab
