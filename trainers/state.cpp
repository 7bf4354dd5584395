#include "trainers/state.h"

#include "core/error.h"
#include "core/io/files.h"
#include "trainers/surgery.h"
#include "trainers/upcycling.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

#include <filesystem>
#include <map>
#include <set>

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

// What stands still under adapters: everything but buffers and what training may move.
std::set<std::string> base_names(const Model& model) {
  std::set<std::string> names;
  for (const NamedTensor& entry : model.parameters()) names.insert(entry.name);
  for (const NamedTensor& entry : model.optimised()) names.erase(entry.name);
  return names;
}

// Of names and bytes.
std::string base_hash(const Model& model) {
  const std::set<std::string> base = base_names(model);
  std::string hashes;
  for (const NamedTensor& entry : model.parameters())
    if (base.contains(entry.name))
      hashes += entry.name + xxh3_hex({static_cast<const char*>(entry.tensor.const_data_ptr()), entry.tensor.nbytes()});
  return xxh3_hex(hashes);
}

std::vector<NamedTensor> kept_views(const Model& model, bool trained_only) {
  std::vector<NamedTensor> views = model_views(model);
  if (!trained_only) return views;
  const std::set<std::string> base = base_names(model);
  std::erase_if(views, [&](const NamedTensor& view) { return base.contains(view.name); });
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

// The pairs of a checkpoint and the model, where the checkpoint may do without the base.
std::vector<std::pair<Tensor, Tensor>> model_pairs(const Checkpoint& checkpoint, const Model& model) {
  const std::string base = checkpoint.content.state.value("base", "");
  if (!base.empty() && base != base_hash(model))
    data_error(checkpoint.folder +
               " holds adapters of another base than [init] from gives; start from the run that it started from");
  return matched(kept_views(model, !base.empty()), group_of(checkpoint, "model"), checkpoint.folder + "/model.safetensors");
}

// What a source to start from holds.
std::vector<NamedTensor> tensors_in(const std::string& from) {
  namespace fs = std::filesystem;
  if (from.ends_with(".safetensors")) return read_safetensors(from).tensors;
  if (fs::is_directory(from + "/ckpt")) return group_of(load_latest(from + "/ckpt"), "model");
  if (fs::exists(from + "/manifest.json")) return group_of(load_checkpoint(from), "model");
  require_source(from);
  data_error(fmt::format("'{}' went away while it was read", from));
}

bool is_routed(const Model& model, const std::string& name) {
  for (const Site* site : model.sites())
    if (name.starts_with(site->path + ".")) return true;
  return false;
}

void copy_all(const std::vector<std::pair<Tensor, Tensor>>& pairs) {
  const at::NoGradGuard no_grad;
  for (const auto& [live, stored] : pairs) live.copy_(stored);
}

}  // namespace

CheckpointContent checkpoint_content(const Model& model, const Optimizer& optimizer, nlohmann::json state, bool trained_only) {
  CheckpointContent content;
  if (trained_only) state["base"] = base_hash(model);
  content.groups["model"] = kept_views(model, trained_only);
  content.groups["optimizer"] = optimizer_views(model, optimizer);
  content.state = std::move(state);
  return content;
}

void restore(const Checkpoint& checkpoint, const Model& model, const Optimizer& optimizer) {
  const auto parameters = model_pairs(checkpoint, model);
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
  copy_all(model_pairs(checkpoint, model));
}

void require_source(const std::string& from) {
  namespace fs = std::filesystem;
  const bool file = from.ends_with(".safetensors") && fs::exists(from);
  if (!file && !fs::is_directory(from + "/ckpt") && !fs::exists(from + "/manifest.json"))
    data_error(
        fmt::format("[init] from: '{}' is no run folder, checkpoint or safetensors file; train what it should hold first", from));
}

void start_from(const Start& start, const Model& model) {
  std::vector<NamedTensor> stored = tensors_in(start.from);
  const std::vector<DenseSource> dense = take_dense_layers(stored, model, start.from);
  std::set<std::string> names;
  for (const NamedTensor& entry : stored) names.insert(entry.name);
  std::vector<NamedTensor> views = model_views(model);
  std::erase_if(views, [&](const NamedTensor& view) { return !names.contains(view.name) && is_routed(model, view.name); });
  const auto pairs = matched(views, stored, start.from);
  for (const DenseSource& source : dense) require_fit(source);
  if (dense.empty() && start.noise > 0)
    usage_error(fmt::format("[init] noise = {} is for experts that start as copies of a dense layer, and {} has none where this "
                            "model has a mixture; set noise = 0", start.noise, start.from));
  copy_all(pairs);
  for (const DenseSource& source : dense) upcycle(*source.site, *source.bank, start.noise, random_key(start.seed, "upcycle"));
}

}  // namespace moelab
