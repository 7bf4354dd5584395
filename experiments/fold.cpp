#include "experiments/fold.h"

#include "core/error.h"
#include "core/io/checkpoint.h"
#include "core/model/backbone.h"
#include "experiments/experiment.h"
#include "experiments/run_folder.h"
#include "trainers/state.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <sstream>
#include <vector>

namespace moelab {
namespace {

// One header of a resolved config with the lines below it.
struct Section {
  std::string header;  // "[adapters.router]"; "" at the top of the file
  std::string text;

  std::string table() const {
    const size_t first = header.find_first_not_of('['), last = header.find(']');
    return header.empty() ? "" : header.substr(first, last - first);
  }
  bool is_below(const std::string& name) const { return table() == name || table().starts_with(name + "."); }
};

std::vector<Section> sections_of(const std::string& resolved) {
  std::vector<Section> sections(1);
  std::istringstream lines(resolved);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with('[')) sections.push_back({line, ""});
    sections.back().text += line + "\n";
  }
  return sections;
}

// A [[layer]] that changes adapters alone goes with them.
void drop_empty_layers(std::vector<Section>& sections) {
  for (size_t s = 0; s < sections.size(); ++s)
    if (const size_t next = s + 1;
        sections[s].header == "[[layer]]" &&
        (next == sections.size() || !sections[next].is_below("layer") || sections[next].header == "[[layer]]"))
      sections[s].text.clear();
}

// The resolved config without what describes adapters and where their base came from.
std::string dense_config(const Table& root, const std::string& name) {
  std::vector<Section> sections = sections_of(resolved_text(root));
  std::erase_if(sections, [](const Section& section) {
    return section.is_below("adapters") || section.is_below("layer.adapters") || section.is_below("init");
  });
  drop_empty_layers(sections);
  std::string text;
  for (const Section& section : sections) text += section.text;
  std::vector<std::string> changes{fmt::format("name=\"{}\"", name), "checkpoint.holds=all"};
  if (!root.child("moe").present()) changes.emplace_back("model.moe_layers=none");
  return resolved_text(parse_config(text, "folded config", changes));
}

const Backbone& adapted_model(const Experiment& e, const std::string& run) {
  const auto* model = dynamic_cast<const Backbone*>(e.model.get());
  if (!model || !model->has_adapters()) usage_error(fmt::format("{} has no adapters that could be folded", run));
  return *model;
}

// The model without its adapters, as a run keeps it.
CheckpointContent dense_content(const Experiment& e, const Checkpoint& source) {
  nlohmann::json state{{"step", source.step}, {"data", e.data->fingerprint()}, {"folded", true}};
  CheckpointContent content = checkpoint_content(*e.model, Optimizer(e.train.optimizer, e.model->optimised()), std::move(state));
  std::erase_if(content.groups.at("model"),
                [](const NamedTensor& entry) { return entry.name.find(".adapters.") != std::string::npos; });
  content.groups.erase("optimizer");
  return content;
}

}  // namespace

void fold_run(const std::string& run, const std::string& out, const FoldedExperts& experts) {
  const auto source = RunFolder::open(run);
  const Experiment e = start_experiment(load_config(source->resolved_config()), source->tokenizer());
  const Backbone& model = adapted_model(e, run);
  const Checkpoint checkpoint = load_latest(source->checkpoints());
  require_same_data(checkpoint, *e.data);
  restore_model(checkpoint, model);
  model.fold_adapters(experts);
  const std::string name = e.name + "-folded", config = dense_config(e.root, name);
  const auto folder = RunFolder::create(out, name, e.config_id, e.train.seed, source->resolved_config(), config);
  write_file_atomically(folder->file("config.toml"), config);
  folder->keep_tokenizer(source->tokenizer());
  write_checkpoint(folder->checkpoints(), checkpoint.step, dense_content(e, checkpoint), /*keep_last=*/1);
  folder->set_status(fmt::format("folded from {}", run));
}

}  // namespace moelab
