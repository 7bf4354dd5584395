#include "trainers/upcycling.h"

#include "core/config.h"
#include "core/error.h"
#include "trainers/surgery.h"

#include <ATen/core/grad_mode.h>

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

namespace moelab {
namespace {

constexpr std::string_view kMixture = ".moe";

const OptionSpec& ffn_option(const std::string& name) {
  for (const OptionSpec& spec : Registry<ExpertEntry>::instance().find("ffn").options)
    if (spec.name == name) return spec;
  throw Error(ExitCode::kBug, "experts 'ffn' have no option '" + name + "'");
}

std::string word_of(const Table& table, const char* key, const char* fallback) {
  return table.options({option(key, fallback, "")}, table.keys()).text(key);
}

// "" where no config tells it. A dense twin has the activation of the experts that it replaced.
std::string stored_activation(const std::string& from) {
  for (const std::string& folder : {from, from + "/../.."}) {
    const std::string path = folder + "/config.resolved.toml";
    if (!std::filesystem::exists(path)) continue;
    const Table root = load_config(path), model = root.child("model");
    if (word_of(model, "twin", "none") == "none") return word_of(model, "dense_activation", "swiglu");
    return root.array("layer").empty() ? word_of(root.child("moe").child("expert"), "activation", "relu") : "";
  }
  return "";
}

// Moves entries whose names start with `prefix` out of `stored`, the prefix cut off.
std::vector<NamedTensor> take_prefixed(std::vector<NamedTensor>& stored, const std::string& prefix) {
  std::vector<NamedTensor> found;
  for (const NamedTensor& entry : stored)
    if (entry.name.starts_with(prefix)) found.push_back({entry.name.substr(prefix.size()), entry.tensor});
  std::erase_if(stored, [&](const NamedTensor& entry) { return entry.name.starts_with(prefix); });
  return found;
}

bool has_tensor(const std::vector<NamedTensor>& tensors, const std::string& name) {
  return std::any_of(tensors.begin(), tensors.end(), [&](const NamedTensor& entry) { return entry.name == name; });
}

// Null where the tensors are not those of a feed-forward layer with this activation.
std::shared_ptr<ExpertBank> bank_of(const std::vector<NamedTensor>& tensors, const std::string& activation) {
  const char* first = activation == "swiglu" ? "w_gate" : "w_in";
  const auto gate = std::find_if(tensors.begin(), tensors.end(), [&](const NamedTensor& entry) { return entry.name == first; });
  if (gate == tensors.end() || gate->tensor.dim() != 3) return nullptr;
  ExpertSpec spec;
  spec.width = gate->tensor.size(2);
  spec.experts = 1;
  spec.dtype = gate->tensor.scalar_type();
  spec.options = Options(Registry<ExpertEntry>::instance().find("ffn").options);
  spec.options.set(ffn_option("width"), gate->tensor.size(1));
  spec.options.set(ffn_option("activation"), activation);
  spec.options.set(ffn_option("bias"), has_tensor(tensors, activation == "swiglu" ? "b_gate" : "b_in"));
  std::shared_ptr<ExpertBank> bank = make_experts("ffn", std::move(spec));
  const at::NoGradGuard no_grad;
  for (const NamedTensor& own : bank->parameters()) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const NamedTensor& one) { return one.name == own.name; });
    if (found == tensors.end() || found->tensor.sizes() != own.tensor.sizes()) return nullptr;
    own.tensor.copy_(found->tensor);
  }
  return bank;
}

bool fits_any(const ExpertBank& bank, const ExpertBank& dense) {
  for (int64_t e = 0; e < bank.experts(); ++e)
    if (fits(bank, e, dense)) return true;
  return false;
}

std::shared_ptr<ExpertBank> dense_bank(const std::vector<NamedTensor>& tensors, const Site& site, const std::string& activation) {
  std::shared_ptr<ExpertBank> bank;
  for (const char* word : {"swiglu", "relu", "gelu", "gelu_tanh"}) {
    if (bank && fits_any(*site.bank, *bank)) break;
    if (!activation.empty() && activation != word) continue;
    if (const auto made = bank_of(tensors, word)) bank = made;
  }
  return bank;
}

std::string described(const ExpertBank& bank, int64_t expert) {
  return fmt::format("{} of width {}", bank.kind_of(expert), bank.parameters_of(expert).front().size(0));
}

bool is_feed_forward(const ExpertBank& bank, int64_t expert) { return bank.kind_of(expert).starts_with("ffn "); }

}  // namespace

std::vector<DenseSource> take_dense_layers(std::vector<NamedTensor>& stored, const Model& model, const std::string& from) {
  std::vector<DenseSource> sources;
  for (const Site* site : model.sites()) {
    if (!site->path.ends_with(kMixture)) continue;
    const std::string block = site->path.substr(0, site->path.size() - kMixture.size()) + ".";
    const std::vector<NamedTensor> dense = take_prefixed(stored, block + "dense.");
    if (dense.empty()) continue;
    for (NamedTensor& entry : stored)
      if (entry.name == block + "norm_dense") entry.name = block + "norm_moe";
    sources.push_back({from + ": " + block + "dense", site, dense_bank(dense, *site, stored_activation(from))});
    if (!sources.back().bank) data_error(sources.back().from + " holds the tensors of no feed-forward layer");
  }
  return sources;
}

void require_fit(const DenseSource& source) {
  const ExpertBank &bank = *source.site->bank, &dense = *source.bank;
  bool any = false;
  for (int64_t e = 0; e < bank.experts(); ++e) {
    if (!is_feed_forward(bank, e)) continue;
    any = true;
    if (!fits(bank, e, dense))
      usage_error(
          fmt::format("{} is {}, but expert {} of {} is {}; experts start as copies where [moe.expert] says the same "
                      "width, activation and bias",
                      source.from, described(dense, 0), e, source.site->path, described(bank, e)));
  }
  if (!any)
    usage_error(fmt::format("{} is {}, and no expert of {} ({}) is of that kind; add some, or start from another run",
                            source.from, described(dense, 0), source.site->path, bank.name()));
}

}  // namespace moelab
