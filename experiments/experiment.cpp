#include "experiments/experiment.h"

#include "core/io/files.h"
#include "core/memory.h"
#include "experiments/plugins.h"
#include "trainers/objective.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

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

}  // namespace

int64_t model_context(const Table& root) {
  const Table model = root.child("model");
  return model.options({option("context", 256, "tokens of a sequence").at_least(1)}, model.keys()).integer("context");
}

Experiment load_experiment(const Table& root) {
  check_top_level(root);
  load_plugins(root);
  Experiment e;
  e.root = root;
  e.name = root.options({option("name", "run", "")}, root.keys()).text("name");
  e.config_id = xxh3_hex(values_only(root)).substr(0, 8);
  e.train = read_train_settings(root);
  make_objective(e.train.objective);  // refuses an unknown name before data are read
  e.data = read_dataset(root, model_context(root));
  e.model = make_model(root, e.data->vocabulary(), e.train.seed, e.train.allow_noncausal_training);
  CorpusStatistics statistics{e.data->token_counts_V()};
  for (Site* site : e.model->sites()) site->router->prepare(statistics);
  return e;
}

void prepare_process(const TrainSettings& settings) {
  keep_freed_memory();
  if (settings.threads > 0) at::set_num_threads(static_cast<int>(settings.threads));
  at::globalContext().setFlushDenormal(true);
}

}  // namespace moelab
