#include "experiments/experiment.h"

#include "core/error.h"
#include "core/io/files.h"
#include "core/memory.h"
#include "core/model/overrides.h"
#include "experiments/plugins.h"
#include "experiments/route_layer.h"
#include "trainers/objective.h"
#include "trainers/state.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <csignal>
#include <filesystem>
#include <new>
#include <sstream>
#include <stdexcept>

namespace moelab {
namespace {

// The resolved values without the comments that say where each was written.
std::string values_only(const Table& root) {
  std::istringstream lines(resolved_text(root));
  std::string text, line;
  while (std::getline(lines, line)) text += line.substr(0, line.rfind("  # ")) + "\n";
  return text;
}

constexpr const char* kTooLarge =
    "this model does not fit into memory; make [model] or [moe] smaller (`moelab check` tells the bytes)";

constexpr const char* kBatchTooLarge =
    "memory ran out: take a smaller batch, more micro_batches, or recompute = true (`moelab check` estimates the bytes)";

// LibTorch tells by words alone that memory ran out.
bool is_out_of_memory(const std::exception& error) {
  if (dynamic_cast<const std::bad_alloc*>(&error) || dynamic_cast<const std::length_error*>(&error)) return true;
  const std::string words = dynamic_cast<const c10::Error*>(&error) ? error.what() : "";
  return words.find("allocate") != std::string::npos || words.find("out of memory") != std::string::npos;
}

std::shared_ptr<Model> model_that_fits(const Experiment& e) {
  try {
    return make_model({e.root, e.data->shape(), e.train.seed, e.train.allow_noncausal_training, e.train.eval_prompt});
  } catch (const std::exception& error) {
    if (!is_out_of_memory(error)) throw;
    e.root.fail("model", kTooLarge);
  }
}

// "a", "a or b", … of everything registered that handles this kind of data.
template <class Entry>
std::string names_for(DataKind kind, DataKind Entry::*handles) {
  std::string names;
  for (const Entry& entry : Registry<Entry>::instance().all())
    if (entry.*handles == kind) names += fmt::format("{}\"{}\"", names.empty() ? "" : " or ", entry.name);
  return names;
}

// The one that the file names is at fault: the model, unless it is the default.
void refuse_data_of_another_kind(const Table& root) {
  const ModelEntry& model = model_entry(root);
  const DatasetEntry& data = dataset_entry(root);
  if (model.reads == data.holds) return;
  const Table table = root.child("model").has("name") ? root.child("model") : root.child("data");
  table.fail("name",
             fmt::format("model '{}' reads {}, but data set '{}' holds {}; in [model] set name = {}, or in [data] name = {}",
                         model.name, to_string(model.reads), data.name, to_string(data.holds),
                         names_for(data.holds, &ModelEntry::reads), names_for(model.reads, &DatasetEntry::holds)));
}

// A prompt is the beginning of a text, and something has to follow it.
void refuse_impossible_prompt(const Table& root, int64_t prompt) {
  if (prompt == 0) return;
  const Table table = root.child("eval");
  const ModelEntry& model = model_entry(root);
  if (model.reads != DataKind::kTokens)
    table.fail("prompt", fmt::format("{} have no prompt; leave it out", to_string(model.reads)));
  if (const int64_t context = model_context(root); prompt > context)
    table.fail("prompt", fmt::format("prompt = {} is more than a sequence, which has context = {} tokens: nothing follows it",
                                     prompt, context));
}

// With what [[layer]] says of the site's block.
Table router_table(const Table& root, const Site& site) {
  const std::vector<bool> every(static_cast<size_t>(model_options(root).integer("layers")), true);
  return tables_of_blocks(root, every).at(static_cast<size_t>(site.layer)).child(site.table).child("router");
}

// A router that reads labels needs data that have them, and a line for each.
void refuse_missing_labels(const Table& table, const Router& router, const Dataset& data) {
  if (data.domains() == 0)
    table.fail("name", fmt::format("router '{}' needs domain labels, which these data do not have", router.entry().name));
  const Options& options = router.spec().options;
  if (options.declared("domains") && options.integer("domains") < data.domains())
    table.fail("domains", fmt::format("domains = {}, but the data have {}", options.integer("domains"), data.domains()));
}

// What routers need beside x. A router may bring a vocabulary of its own, but no model without tokens can give it ids.
void refuse_routers_in_need(const Table& root, const Model& model, const Dataset& data) {
  for (const Site* site : model.sites()) {
    const Router& router = *site->router;
    const RouterFacts facts = router.facts();
    if (facts.needs_token_ids && data.vocabulary() == 0)
      router_table(root, *site)
          .fail("name", fmt::format("router '{}' needs token ids, which {} do not have", router.entry().name,
                                    to_string(data.shape().kind)));
    if (facts.needs_segments)
      router_table(root, *site)
          .fail("name", fmt::format("router '{}' needs segments of each sequence, which no model gives it; "
                                    "`moelab route` does, as segment_ids",
                                    router.entry().name));
    if (facts.needs_domain) refuse_missing_labels(router_table(root, *site), router, data);
  }
}

// Experts drawn at random learn alike only through an objective that compares passes: one pass is another method.
void tell_missing_passes(const Experiment& e) {
  const int64_t passes = make_objective(e.train.objective, e.train.objective_options)->passes();
  for (const Site* site : e.model->sites()) {
    const int64_t wanted = site->router->facts().passes;
    if (wanted <= passes) continue;
    return spdlog::warn(
        "router '{}' is trained by {} passes per step that have to agree, but objective '{}' makes {}; see "
        "`moelab list objectives`",
        site->router->entry().name, wanted, e.train.objective, passes);
  }
}

// Settings whose readers the rest of the experiment leaves out.
void refuse_settings_at_odds(const Experiment& e) {
  if (e.train.bf16 && model_options(e.root).text("dtype") == "float64")
    e.root.child("train").fail("precision", "bf16 autocast leaves float64 alone; set [model] dtype = \"float32\"");
  if (e.train.ngram_baselines && e.data->train_bytes().empty())
    e.root.child("eval").fail("baseline", fmt::format("n-grams of bytes need text, and data set '{}' has none; set baseline = "
                                                      "\"none\"",
                                                      dataset_entry(e.root).name));
}

// A complaint of what [init] names gets the place that names it.
void at_init(const Table& root, const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: {}", root.child("init").place_of("from"), error.what()));
  }
}

// What a run that ours starts from had learned: its tokens are then ours.
std::string tokenizer_of_source(const std::string& from) {
  const std::string path = from + "/tokenizer.model";
  return !from.empty() && std::filesystem::exists(path) ? read_file(path) : "";
}

// It names a folder below runs/.
std::string run_name(const Table& root) {
  const std::string name = root.options({option("name", "run", "")}, root.keys()).text("name");
  if (name.empty() || name.front() == '.' || name.find('/') != std::string::npos)
    root.fail("name", fmt::format("'{}' cannot name a folder; use letters, digits, - and _", name));
  return name;
}

}  // namespace

int64_t model_context(const Table& root) {
  const Options model = model_options(root);
  return model.declared("context") ? model.integer("context") : 0;
}

Experiment load_experiment(const Table& root, const std::string& tokenizer) {
  check_top_level(root);
  load_plugins(root);
  Experiment e;
  e.root = root;
  e.name = run_name(root);
  e.train = read_train_settings(root);
  read_objective(root, e.train);  // before data are read
  read_route_settings(root);      // for `route` alone, but a slip is one everywhere
  if (!e.train.init_from.empty()) at_init(root, [&] { require_source(e.train.init_from); });
  refuse_data_of_another_kind(root);
  refuse_impossible_prompt(root, e.train.eval_prompt);
  e.data = read_dataset(root, model_context(root), tokenizer.empty() ? tokenizer_of_source(e.train.init_from) : tokenizer);
  e.model = model_that_fits(e);
  refuse_routers_in_need(root, *e.model, *e.data);
  refuse_settings_at_odds(e);
  tell_missing_passes(e);
  if (const CorpusStatistics statistics{e.data->token_counts_V()}; statistics.token_counts_V.defined())
    for (Site* site : e.model->sites()) site->router->prepare(statistics);
  e.config_id = xxh3_hex(values_only(root)).substr(0, 8);  // when all is read: options of replaced plugins are gone
  return e;
}

Experiment start_experiment(const Table& root, const std::string& tokenizer) {
  Experiment e = load_experiment(root, tokenizer);
  if (!e.train.init_from.empty())
    at_init(root, [&] { start_from({e.train.init_from, e.train.init_noise, e.train.seed}, *e.model); });
  return e;
}

std::string untrained_base(const Experiment& experiment) {
  const Model& model = *experiment.model;
  if (!experiment.train.init_from.empty() || model.optimised().size() == model.parameters().size()) return "";
  return "the adapters stand on a base of random weights that nothing trains; name the run that it comes from in [init] from";
}

void within_memory(const Table& root, const std::function<void()>& work) {
  try {
    work();
  } catch (const std::exception& error) {
    if (!is_out_of_memory(error)) throw;
    root.child("train").fail("batch", kBatchTooLarge);
  }
}

void prepare_process(const TrainSettings& settings) {
  keep_freed_memory();
  if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
  at::globalContext().setFlushDenormal(true);
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error of the write, with its name, like a full disk
}

}  // namespace moelab
