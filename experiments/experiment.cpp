#include "experiments/experiment.h"

#include "core/error.h"
#include "core/io/files.h"
#include "core/memory.h"
#include "experiments/plugins.h"
#include "trainers/state.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <fmt/format.h>

#include <csignal>
#include <filesystem>
#include <sstream>

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

// LibTorch tells by words alone that memory ran out.
std::shared_ptr<Model> model_that_fits(const Experiment& e) {
  try {
    return make_model({e.root, e.data->shape(), e.train.seed, e.train.allow_noncausal_training});
  } catch (const c10::Error& error) {
    if (std::string(error.what()).find("allocate") == std::string::npos) throw;
    e.root.fail("model", kTooLarge);
  } catch (const std::bad_alloc&) {
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

// A router may bring a vocabulary of its own, but no model without tokens can give it ids.
void refuse_missing_tokens(const Table& root, const Model& model, const Dataset& data) {
  for (const Site* site : model.sites())
    if (site->router->facts().needs_token_ids && data.vocabulary() == 0)
      root.child("moe").child("router").fail("name", fmt::format("router '{}' needs token ids, which {} do not have",
                                                                 site->router->entry().name, to_string(data.shape().kind)));
}

// A router that reads labels needs data that have them, and a line for each.
void refuse_missing_labels(const Table& root, const Model& model, const Dataset& data) {
  const Table table = root.child("moe").child("router");
  for (const Site* site : model.sites()) {
    const Router& router = *site->router;
    if (!router.facts().needs_domain) continue;
    if (data.domains() == 0)
      table.fail("name", fmt::format("router '{}' needs domain labels, which these data do not have", router.entry().name));
    const Options& options = router.spec().options;
    if (options.declared("domains") && options.integer("domains") < data.domains())
      table.fail("domains", fmt::format("domains = {}, but the data have {}", options.integer("domains"), data.domains()));
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
  refuse_data_of_another_kind(root);
  e.data = read_dataset(root, model_context(root), tokenizer.empty() ? tokenizer_of_source(e.train.init_from) : tokenizer);
  e.model = model_that_fits(e);
  refuse_missing_tokens(root, *e.model, *e.data);
  refuse_missing_labels(root, *e.model, *e.data);
  if (const CorpusStatistics statistics{e.data->token_counts_V()}; statistics.token_counts_V.defined())
    for (Site* site : e.model->sites()) site->router->prepare(statistics);
  e.config_id = xxh3_hex(values_only(root)).substr(0, 8);  // when all is read: options of replaced plugins are gone
  return e;
}

Experiment start_experiment(const Table& root, const std::string& tokenizer) {
  Experiment e = load_experiment(root, tokenizer);
  if (e.train.init_from.empty()) return e;
  try {
    start_from({e.train.init_from, e.train.init_noise, e.train.seed}, *e.model);
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: {}", root.child("init").place_of("from"), error.what()));
  }
  return e;
}

void prepare_process(const TrainSettings& settings) {
  keep_freed_memory();
  if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
  at::globalContext().setFlushDenormal(true);
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error of the write, with its name, like a full disk
}

}  // namespace moelab
