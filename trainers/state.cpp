#include "trainers/state.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

#include <map>

namespace moelab {
namespace {

// One stacked tensor of a site's experts in the file: "<path>.<expert>.<name>".
struct StackedName {
  std::string path;  // "layers.3.moe.experts"
  std::string name;  // "w_in"
  int64_t first = 0;  // global id of slot 0
  std::string of(int64_t slot) const { return fmt::format("{}.{}.{}", path, first + slot, name); }
};

// By the full name of the live tensor.
std::map<std::string, StackedName> stacked_names(const Model& model) {
  std::map<std::string, StackedName> names;
  for (const Site* site : model.sites()) {
    const std::string path = site->path + ".experts";
    for (const ExpertGroup& group : site->bank->groups())
      for (const NamedTensor& stacked : group.stacked)
        names[path + "." + group.prefix + stacked.name] = {path, stacked.name, group.first};
  }
  return names;
}

// Views into the live tensors under the names of the file. `prefix` is "m." or "v." for moments.
void append_views(std::vector<NamedTensor>& out, const NamedTensor& entry, const std::string& prefix,
                  const std::map<std::string, StackedName>& stacked) {
  const auto found = stacked.find(entry.name.substr(prefix.size()));
  if (found == stacked.end()) {
    out.push_back(entry);
    return;
  }
  for (int64_t slot = 0; slot < entry.tensor.size(0); ++slot)
    out.push_back({prefix + found->second.of(slot), entry.tensor.select(0, slot)});
}

std::vector<NamedTensor> model_views(const Model& model) {
  const auto stacked = stacked_names(model);
  std::vector<NamedTensor> views;
  for (const NamedTensor& entry : model.parameters()) append_views(views, {entry.name, entry.tensor.detach()}, "", stacked);
  for (const NamedTensor& entry : model.buffers()) append_views(views, entry, "", stacked);
  return views;
}

std::vector<NamedTensor> optimizer_views(const Model& model, const Optimizer& optimizer) {
  const auto stacked = stacked_names(model);
  std::vector<NamedTensor> views;
  for (const NamedTensor& entry : optimizer.state()) {
    const bool moment = entry.name.starts_with("m.") || entry.name.starts_with("v.");
    append_views(views, entry, moment ? entry.name.substr(0, 2) : "", stacked);
  }
  return views;
}

// Pairs every live view with the stored tensor of its name, and refuses anything left over on either side.
std::vector<std::pair<Tensor, Tensor>> matched(const std::vector<NamedTensor>& views, const std::vector<NamedTensor>& stored,
                                               const std::string& file) {
  std::map<std::string, Tensor> by_name;
  for (const NamedTensor& entry : stored) by_name[entry.name] = entry.tensor;
  std::vector<std::pair<Tensor, Tensor>> pairs;
  for (const NamedTensor& view : views) {
    const auto found = by_name.find(view.name);
    if (found == by_name.end()) data_error(fmt::format("{} has no tensor '{}': it belongs to another config", file, view.name));
    if (found->second.sizes() != view.tensor.sizes() || found->second.scalar_type() != view.tensor.scalar_type())
      data_error(fmt::format("{}: tensor '{}' has another shape or dtype than the config asks for", file, view.name));
    pairs.emplace_back(view.tensor, found->second);
    by_name.erase(found);
  }
  if (!by_name.empty())
    data_error(fmt::format("{} holds a tensor '{}' that the config's model does not have", file, by_name.begin()->first));
  return pairs;
}

const std::vector<NamedTensor>& group_of(const Checkpoint& checkpoint, const std::string& name) {
  const auto found = checkpoint.content.groups.find(name);
  if (found == checkpoint.content.groups.end()) data_error(checkpoint.folder + " holds no " + name + ".safetensors");
  return found->second;
}

void copy_all(const std::vector<std::pair<Tensor, Tensor>>& pairs) {
  const at::NoGradGuard no_grad;
  for (const auto& [live, stored] : pairs) live.copy_(stored);
}

}  // namespace

CheckpointContent checkpoint_content(const Model& model, const Optimizer& optimizer, nlohmann::json state) {
  CheckpointContent content;
  content.groups["model"] = model_views(model);
  content.groups["optimizer"] = optimizer_views(model, optimizer);
  content.state = std::move(state);
  return content;
}

void restore(const Checkpoint& checkpoint, const Model& model, const Optimizer& optimizer) {
  const auto parameters = matched(model_views(model), group_of(checkpoint, "model"), checkpoint.folder + "/model.safetensors");
  const auto moments = matched(optimizer_views(model, optimizer), group_of(checkpoint, "optimizer"),
                               checkpoint.folder + "/optimizer.safetensors");
  copy_all(parameters);
  copy_all(moments);
}

void require_same_data(const Checkpoint& checkpoint, const Dataset& data) {
  const std::string found = data.fingerprint(), trained = checkpoint.content.state.value("data", found);
  if (trained == found) return;
  data_error(fmt::format("{} was trained on other data than its config finds now (tokens of the splits and their hash: {} then, "
                         "{} now); put the files back as they were", checkpoint.folder, trained, found));
}

void restore_model(const Checkpoint& checkpoint, const Model& model) {
  copy_all(matched(model_views(model), group_of(checkpoint, "model"), checkpoint.folder + "/model.safetensors"));
}

}  // namespace moelab
