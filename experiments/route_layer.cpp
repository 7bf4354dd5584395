#include "experiments/route_layer.h"

#include "core/error.h"
#include "core/model/rows.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>

namespace moelab {
namespace {

Comm* route_comm() {
  static const std::shared_ptr<Comm> alone = single_comm();
  return alone.get();
}

// "E", "k" and "G" of a declared noise shape are known once the layer is.
std::string route_size_word(std::string word, const RouterSpec& spec) {
  word.erase(std::remove(word.begin(), word.end(), ' '), word.end());
  const auto slots = [&] { return spec.options.declared("slots_per_expert") ? spec.options.integer("slots_per_expert") : 1; };
  if (word == "E") return std::to_string(spec.max_experts);
  if (word == "k") return std::to_string(spec.k());
  if (word == "G+E") return std::to_string(spec.options.integer("groups") + spec.max_experts);
  if (word == "E·P") return std::to_string(spec.max_experts * slots());
  return word;
}

// Every "[…]" of a text like "uniform [T]; Gumbel values [T,E]".
std::vector<ShapeWords> route_shapes_in(const std::string& text, const RouterSpec& spec) {
  std::vector<ShapeWords> shapes;
  for (size_t open = text.find('['); open != std::string::npos; open = text.find('[', open + 1)) {
    ShapeWords shape{""};
    for (size_t i = open + 1; i < text.size() && text[i] != ']'; ++i) {
      if (text[i] == ',') shape.emplace_back();
      else shape.back() += text[i];
    }
    for (std::string& word : shape) word = route_size_word(word, spec);
    shapes.push_back(std::move(shape));
  }
  return shapes;
}

void add_shape(std::vector<ShapeWords>& shapes, ShapeWords shape) {
  if (std::find(shapes.begin(), shapes.end(), shape) == shapes.end()) shapes.push_back(std::move(shape));
}

// The router's own draw, and that of the noise which `[moe.noise]` puts on its scores.
AcceptedTensor accepted_noise(const Router& router, Mode mode) {
  const RouterSpec& spec = router.spec();
  const std::string own = router.noise_shape(mode);
  AcceptedTensor noise{"noise", route_shapes_in(own, spec)};
  noise.meaning = "the raw draw, before the router scales it: " + own;
  if (own.find("int64") != std::string::npos) noise.kind = TensorKind::kIndex;
  if (own.find("permutation") != std::string::npos) noise.kind = TensorKind::kPermutation;
  if (spec.noise.kind == NoiseSpec::Kind::kNormal && !own.starts_with("normal"))
    add_shape(noise.shapes, {"T", std::to_string(spec.max_experts)});
  if (spec.noise.kind == NoiseSpec::Kind::kJitter) add_shape(noise.shapes, {"T", "D"});
  if (own.empty()) noise.meaning = "the raw draw of [moe.noise], before it is scaled";
  return noise;
}

// Whatever mode is asked for.
AcceptedTensor accepted_noise(const Router& router) {
  AcceptedTensor noise = accepted_noise(router, Mode::kTrain);
  const AcceptedTensor eval = accepted_noise(router, Mode::kEval);
  for (const ShapeWords& shape : eval.shapes) add_shape(noise.shapes, shape);
  return noise;
}

AcceptedTensor accepted_capacity_noise(const Router& router) {
  return {"noise.capacity", {{"T", std::to_string(router.spec().max_experts)}}, TensorKind::kFloat,
          "uniform draw that orders the pairs where priority = \"random\", largest first"};
}

bool uses_noise(const Router& router, Mode mode) {
  const RouterFacts facts = router.facts();
  return mode == Mode::kTrain ? facts.noisy_in_training : facts.random_in_eval;
}

bool uses_capacity_noise(const Router& router, Mode mode) {
  const CapacityPolicy& policy = router.spec().capacity(mode);
  return policy.mode != CapacityPolicy::Mode::kNone && policy.priority == CapacityPolicy::Priority::kRandom;
}

void warn_of_unused_noise(const RouteFile& file, const Router& router, Mode mode) {
  std::vector<std::string> unused;
  if (file.has("noise") && !uses_noise(router, mode)) unused.emplace_back("noise");
  if (file.has("noise.capacity") && !uses_capacity_noise(router, mode)) unused.emplace_back("noise.capacity");
  if (unused.empty()) return;
  spdlog::warn("'{}': {} ignored, router '{}' draws nothing of the kind in {} mode", file.path(), fmt::join(unused, " and "),
               router.entry().name, to_string(mode));
}

Tensor kept_index(const Tensor& padding_T, int64_t rows) {
  if (!padding_T.defined()) return at::arange(rows, at::kLong);
  return padding_T.eq(0).nonzero().squeeze(1);
}

// Any ids become 0, 1, … in the order of their first row; returns how many there are.
int64_t number_sequences(RouteInput& in) {
  const int64_t rows = in.rows();
  in.sequence_T = at::empty({rows}, at::kLong);
  const auto* id = in.sequence_key_T.const_data_ptr<int64_t>();
  auto* sequence = in.sequence_T.mutable_data_ptr<int64_t>();
  std::map<int64_t, int64_t> number;
  for (int64_t t = 0; t < rows; ++t)
    sequence[t] = number.try_emplace(id[t], static_cast<int64_t>(number.size())).first->second;
  return static_cast<int64_t>(number.size());
}

Tensor order_within_sequence(const RouteInput& in) {
  Tensor position_T = at::empty({in.rows()}, at::kLong);
  std::vector<int64_t> next(static_cast<size_t>(in.sequences), 0);
  for (int64_t t = 0; t < in.rows(); ++t)
    position_T.mutable_data_ptr<int64_t>()[t] = next[in.sequence_T.const_data_ptr<int64_t>()[t]]++;
  return position_T;
}

// [B+1] where rows lie sequence by sequence, else undefined.
Tensor offsets_of_sequences(const RouteInput& in) {
  if (in.rows() > 0 && in.sequence_T.diff().lt(0).any().item<bool>()) return {};
  Tensor offsets_B1 = at::zeros({in.sequences + 1}, at::kLong);
  offsets_B1.narrow(0, 1, in.sequences).copy_(at::bincount(in.sequence_T, {}, in.sequences).cumsum(0));
  return offsets_B1;
}

void check_positions(const RouteFile& file, const Tensor& position_T) {
  if (position_T.numel() == 0) return;
  if (position_T.min().item<int64_t>() < 0 || position_T.max().item<int64_t>() > std::numeric_limits<int32_t>::max())
    usage_error(fmt::format("'{}': tensor 'positions' holds a value outside 0 … 2147483647", file.path()));
}

void require_channel(const RouteFile& file, const Router& router, bool needed, const char* name) {
  if (needed && !file.has(name))
    usage_error(
        fmt::format("'{}' lacks the tensor '{}' [T], which the router '{}' reads", file.path(), name, router.entry().name));
}

// Side channels of the kept rows; the sequences are numbered and positions filled in.
void fill_channels(RouteInput& in, const RouteFile& file, const Tensor& index_T) {
  const auto rows_of = [&](const char* name) { return file.has(name) ? file.find(name).index_select(0, index_T) : Tensor(); };
  in.token_ids_T = rows_of("token_ids");
  in.segment_T = rows_of("segment_ids");
  in.domain_T = rows_of("domain");
  in.sequence_key_T = file.has("sequence_ids") ? rows_of("sequence_ids") : at::zeros({in.rows()}, at::kLong);
  in.sequences = number_sequences(in);
  in.position_T = file.has("positions") ? rows_of("positions") : order_within_sequence(in);
  check_positions(file, in.position_T);
  in.cu_seqlens_B1 = offsets_of_sequences(in);
}

// Of a permutation of IN's rows: the kept rows in its order, by their new numbers.
Tensor order_of_kept(const RouteFile& file, const Tensor& order_T, const Tensor& index_T) {
  const Tensor row_T = at::arange(order_T.numel(), at::kLong);
  if (!std::get<0>(order_T.sort()).equal(row_T))
    usage_error(fmt::format("'{}': tensor 'noise' is not a permutation of 0 … T-1", file.path()));
  Tensor number_T = at::full_like(row_T, -1);
  number_T.index_copy_(0, index_T, at::arange(index_T.numel(), at::kLong));
  const Tensor ordered_T = number_T.index_select(0, order_T);
  return ordered_T.index_select(0, ordered_T.ge(0).nonzero().squeeze(1));
}

// Different ids, in the order of their first row.
std::vector<int64_t> ids_in_order(const Tensor& id_T) {
  std::vector<int64_t> ids;
  std::set<int64_t> seen;
  for (int64_t t = 0; t < id_T.numel(); ++t)
    if (const int64_t id = id_T.const_data_ptr<int64_t>()[t]; seen.insert(id).second) ids.push_back(id);
  return ids;
}

// One draw per sequence: IN may give them for the sequences that have rows left, or for all of its own. Returns which to take.
Tensor draws_of_kept_sequences(const RouteInput& in, RouteFile& file) {
  const std::vector<int64_t> kept = ids_in_order(in.sequence_key_T);
  const std::vector<int64_t> all = file.has("sequence_ids") ? ids_in_order(file.find("sequence_ids")) : kept;
  const bool for_all = file.has("noise") && file.find("noise").numel() == std::ssize(all);
  file.set_size("sequences", for_all ? std::ssize(all) : std::ssize(kept));
  std::vector<int64_t> index;
  for (const int64_t id : kept) index.push_back(std::find(all.begin(), all.end(), id) - all.begin());
  return for_all ? at::tensor(index, at::kLong) : at::arange(in.sequences, at::kLong);
}

void fill_noise(RouteInput& in, RouteFile& file, const Router& router, const Tensor& index_T) {
  const Tensor sequence_B = draws_of_kept_sequences(in, file);
  file.set_size("positions", in.rows() == 0 ? 0 : in.position_T.max().item<int64_t>() + 1);
  if (file.has("noise") && uses_noise(router, in.mode)) {
    const AcceptedTensor accepted = accepted_noise(router, in.mode);
    const ShapeWords shape = file.check(accepted);
    in.noise = file.find("noise");
    if (accepted.kind == TensorKind::kPermutation) in.noise = order_of_kept(file, in.noise, index_T);
    else if (shape.front() == "T") in.noise = in.noise.index_select(0, index_T);
    else if (shape.front() == "sequences") in.noise = in.noise.index_select(0, sequence_B);
  }
  if (!file.has("noise.capacity") || !uses_capacity_noise(router, in.mode)) return;
  file.check(accepted_capacity_noise(router));
  in.capacity_noise_TE = file.find("noise.capacity").index_select(0, index_T);
}

// The table that describes the layer.
std::string route_table(const Table& root) {
  for (const std::string& name : layer_tables())
    if (root.child(name).present()) return name;
  return "moe";
}

bool lacks_expert_axis(const std::string& name, const Tensor& given, const Tensor& own) {
  return (name.starts_with("shared.") || name.starts_with("base.")) && own.dim() > 1 && own.size(0) == 1 &&
         given.sizes() == own.sizes().slice(1);
}

}  // namespace

RouteSettings read_route_settings(const Table& root) {
  const Options options = root.child("route").options({
      option("step", 0, "the optimiser step that the router believes it is in").at_least(0),
      option("total_steps", 1, "how many there will be").at_least(1),
      option("pass", 0, "which pass, for objectives of several").at_least(0),
      option("seed", 0, "of initial values and draws that IN does not give"),
  });
  return {options.integer("step"), options.integer("total_steps"), options.integer("pass"), options.integer("seed")};
}

Table with_sizes_of(const Table& root, const RouteFile& file) {
  const Table router = root.child("moe").child("router");
  if (!router.has("name")) return root;
  const std::string name = router.options({option("name", "", "which plugin")}, router.keys()).text("name");
  if (!Registry<RouterEntry>::instance().contains(name)) return root;
  Table sized = root;
  for (const OptionSpec& spec : Registry<RouterEntry>::instance().find(name).options) {
    const std::string tensor = "router." + spec.rows_of;
    if (spec.rows_of.empty() || router.has(spec.name) || !file.has(tensor) || file.find(tensor).dim() == 0) continue;
    const std::string text = fmt::format("[moe.router]\n{} = {}\n", spec.name, file.find(tensor).size(0));
    sized = sized.overlaid(parse_config(text, file.path()));
  }
  return sized;
}

const Module& RouteLayer::module() const { return layer_ ? static_cast<const Module&>(*layer_) : *attention_; }

std::vector<MoELayer*> RouteLayer::sites() const { return layer_ ? std::vector<MoELayer*>{layer_.get()} : attention_->sites(); }

Tensor RouteLayer::run(SiteWalk& walk, const Tensor& x_TD) const {
  return layer_ ? walk.run(*layer_, x_TD) : attention_->forward(x_TD, walk, /*cache=*/nullptr);
}

int64_t RouteLayer::output_width() const {
  const Site& site = sites().front()->site();
  return layer_ ? site.bank->output_width(0) : site.router->spec().width;
}

std::string RouteLayer::prefix_of(const MoELayer& site) const { return sites().size() == 1 ? "" : site_name(site.site()) + "."; }

RouteLayer make_route_layer(const Table& root, int64_t width, at::ScalarType dtype) {
  const RandomKey init = random_key(read_route_settings(root).seed, "init").with("layer", 0);
  LayerSettings layer = read_layer(root, width, /*layer=*/0, /*vocabulary=*/0, dtype, init, route_table(root));
  if (layer.place != ExpertPlace::kAttention) return RouteLayer(std::make_shared<MoELayer>("moe", std::move(layer)));
  AttentionPlace place{"attention", {}, std::move(layer)};
  place.attention.width = width;
  place.attention.rotary = false;
  return RouteLayer(Registry<ExpertEntry>::instance().find(place.layer.expert).make_attention(place));
}

std::vector<NamedTensor> tensors_of(const Module& module) {
  std::vector<NamedTensor> all = module.parameters();
  for (NamedTensor& buffer : module.buffers()) all.push_back(std::move(buffer));
  return all;
}

std::vector<NamedTensor> outside_names(const RouteLayer& layer, const std::vector<NamedTensor>& tensors) {
  std::map<std::string, std::pair<int64_t, std::string>>
      grouped;  // live name -> global id of slot 0, and the parameter's own name
  for (const ExpertGroup& group : layer.sites().front()->site().bank->groups())
    for (const NamedTensor& stacked : group.stacked)
      if (!group.prefix.empty()) grouped["experts." + group.prefix + stacked.name] = {group.first, stacked.name};
  std::vector<NamedTensor> outside;
  for (const NamedTensor& entry : tensors) {
    const auto found = grouped.find(entry.name);
    if (found == grouped.end()) outside.push_back(entry);
    else for (int64_t slot = 0; slot < entry.tensor.size(0); ++slot)
        outside.push_back(
            {fmt::format("experts.{}.{}", found->second.first + slot, found->second.second), entry.tensor.select(0, slot)});
  }
  return outside;
}

std::vector<AcceptedTensor> accepted_inputs(const RouteLayer& layer) {
  const Router& router = *layer.sites().front()->site().router;
  const auto channel = [](const char* name, const char* meaning) {
    return AcceptedTensor{name, {{"T"}}, TensorKind::kIndex, meaning};
  };
  const std::string output = layer.output_width() == router.spec().width ? "D" : std::to_string(layer.output_width());
  std::vector<AcceptedTensor> accepted{
      {"x", {{"T", "D"}}, TensorKind::kFloat, "the layer's input; its type is that of the computation and of every parameter"},
      channel("token_ids", "token of each row"),
      channel("positions", "position within the sequence; default: the order of the sequence's rows"),
      channel("sequence_ids", "sequence of each row, any numbers, may be interleaved; default: one sequence"),
      channel("segment_ids", "segment of each row, rising within a sequence"),
      channel("domain", "domain, task or language label of each row"),
      {"padding", {{"T"}}, TensorKind::kFlag, "1 = no token: removed before routing, y = 0"},
      {"grad_y", {{"T", output}}, TensorKind::kFloat, "gradient with respect to y, for --grad"},
      accepted_capacity_noise(router),
  };
  AcceptedTensor noise = accepted_noise(router);
  if (!noise.shapes.empty()) accepted.push_back(std::move(noise));
  return accepted;
}

void check_inputs(const RouteFile& file, const RouteLayer& layer) {
  std::set<std::string> known{"noise"};
  const std::vector<AcceptedTensor> inputs = accepted_inputs(layer);
  for (const AcceptedTensor& input : inputs) known.insert(input.name);
  for (const NamedTensor& own : outside_names(layer, tensors_of(layer.module()))) known.insert(own.name);
  file.refuse_unknown(known);
  for (const AcceptedTensor& input : inputs)
    if (!input.name.starts_with("noise")) file.check(input);
}

std::set<std::string> replace_tensors(const RouteFile& file, const RouteLayer& layer) {
  const at::NoGradGuard no_grad;
  std::set<std::string> without_axis;
  for (const NamedTensor& own : outside_names(layer, tensors_of(layer.module()))) {
    if (!file.has(own.name)) continue;
    Tensor given = file.find(own.name);
    if (given.scalar_type() != own.tensor.scalar_type())
      file.fail_dtype(own.name, dtype_word(own.tensor.scalar_type()) + (own.tensor.is_floating_point() ? " as x" : ""));
    if (lacks_expert_axis(own.name, given, own.tensor)) {
      without_axis.insert(own.name);
      given = given.unsqueeze(0);
    }
    if (given.sizes() != own.tensor.sizes()) file.fail_shape(own.name, shape_text(own.tensor.sizes().vec()));
    own.tensor.copy_(given);
  }
  return without_axis;
}

Tensor RoutedRows::in_file_rows(const Tensor& values_T, double fill) const {
  std::vector<int64_t> shape = values_T.sizes().vec();
  shape[0] = file_rows;
  return at::full(shape, fill, values_T.options().requires_grad(false)).index_copy(0, index_T, values_T.detach());
}

RoutedRows routed_rows(const Table& root, RouteFile& file, const Tensor& x_TD, const RouteLayer& layer, Mode mode) {
  const RouteSettings settings = read_route_settings(root);
  const Router& router = *layer.sites().front()->site().router;
  RoutedRows rows{kept_index(file.find("padding"), file.rows()), file.rows(), {}};
  RouteInput& in = rows.in;
  in.x_TD = x_TD.index_select(0, rows.index_T);
  in.mode = mode;
  in.step = settings.step;
  in.total_steps = settings.total_steps;
  in.pass = settings.pass;
  in.random = layer_key({.mode = mode, .seed = settings.seed, .step = settings.step, .pass = settings.pass}, 0);
  in.comm = route_comm();
  require_channel(file, router, router.facts().needs_token_ids, "token_ids");
  require_channel(file, router, router.facts().needs_domain, "domain");
  fill_channels(in, file, rows.index_T);
  warn_of_unused_noise(file, router, mode);
  fill_noise(in, file, router, rows.index_T);
  return rows;
}

}  // namespace moelab
