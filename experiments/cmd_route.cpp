// `moelab route`: one MoE layer on given tensors, so that any other program can check any router against its own.
#include "experiments/cli.h"

#include "core/error.h"
#include "core/lenient_config.h"
#include "experiments/plugins.h"
#include "experiments/route_result.h"
#include "experiments/route_signature.h"
#include "trainers/settings.h"

#include <ATen/core/grad_mode.h>
#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <memory>

namespace moelab {
namespace {

struct RouteArguments {
  std::string config;
  std::vector<std::string> overrides;
  std::string in;
  std::string out;
  bool grad = false;
  bool train = false;
  bool eval = false;  // the default; said to be refused beside --train
  bool end_step = false;
  bool signature = false;
};

void require_route_arguments(const RouteArguments& arguments) {
  if (arguments.in.empty()) usage_error("route needs --in IN.safetensors (--signature prints what it may hold)");
  if (arguments.out.empty()) usage_error("route needs --out OUT.safetensors");
}

// sum(y*grad_y) over the routed rows.
Tensor route_objective(const RouteFile& file, const RoutedRows& rows, const Tensor& y_TD) {
  if (!file.has("grad_y")) usage_error(fmt::format("'{}' lacks the tensor 'grad_y' [T, D], which --grad needs", file.path()));
  return y_TD.mul(file.find("grad_y").to(y_TD.scalar_type()).index_select(0, rows.index_T)).sum();
}

void add_end_step(RouteResults& results, Router& router, const std::string& prefix, const RouteOutput& routed, int64_t step) {
  const at::NoGradGuard no_grad;
  router.end_step(routed.deltas, step);
  add_state(results, "after." + prefix + "router.", tensors_of(router), {});
}

void append(RouteResults& results, const std::string& prefix, const RouteResults& more) {
  for (const NamedTensor& entry : more) results.push_back({prefix + entry.name, entry.tensor});
}

// What one decision shows; its losses are added to the objective, with their coefficients.
RouteResults site_results(const Site& site, const LayerOutput& out, const RoutedRows& rows, Tensor& objective) {
  validate(out.routed.plan, rows.in.rows(), site.router->spec().max_experts);
  RouteResults results;
  add_plan(results, out, rows);
  const std::vector<Tensor> values = loss_values(out, site);
  for (size_t i = 0; i < values.size(); ++i) {
    results.push_back({"loss." + site.losses[i].label, values[i]});
    if (objective.defined()) objective = objective.add(values[i].sum().mul(site.losses[i].coefficient));
  }
  add_probes(results, out.routed, *site.router, rows);
  return results;
}

RouteResults route_tensors(const Table& config, RouteFile& file, const RouteArguments& arguments) {
  const Table root = with_sizes_of(config, file);
  const RouteLayer layer = make_route_layer(root, file.width(), file.x().scalar_type());
  check_inputs(file, layer);
  const std::set<std::string> without_axis = replace_tensors(file, layer);
  const at::AutoGradMode with_graph(arguments.grad);
  const Tensor x_TD = file.x().clone().requires_grad_(arguments.grad);
  const RoutedRows rows = routed_rows(root, file, x_TD, layer, arguments.train ? Mode::kTrain : Mode::kEval);
  SiteWalk walk(rows.in);
  const Tensor y_TD = layer.run(walk, rows.in.x_TD);
  const std::vector<LayerOutput> outs = walk.take();
  const std::vector<MoELayer*> sites = layer.sites();

  RouteResults results;
  Tensor objective = arguments.grad ? route_objective(file, rows, y_TD) : Tensor();
  for (size_t s = 0; s < sites.size(); ++s)
    append(results, layer.prefix_of(*sites[s]), site_results(sites[s]->site(), outs[s], rows, objective));
  results.push_back({"y", rows.in_file_rows(y_TD)});
  add_state(results, "", outside_names(layer, tensors_of(layer.module())), without_axis);
  if (arguments.grad) add_gradients(results, layer, x_TD, objective, without_axis);
  for (size_t s = 0; s < sites.size() && arguments.end_step; ++s)
    add_end_step(results, *sites[s]->site().router, layer.prefix_of(*sites[s]), outs[s].routed, rows.in.step);
  return results;
}

void route(const RouteArguments& arguments) {
  const Table root = load_lenient_config(arguments.config, arguments.overrides);
  check_top_level(root);
  load_plugins(root);
  if (arguments.signature) {
    fmt::print("{}\n", route_signature(root).dump(2));
    return;
  }
  require_route_arguments(arguments);
  RouteFile file(arguments.in);
  write_route_file(arguments.out, route_tensors(root, file, arguments));
}

}  // namespace

void add_route_command(CLI::App& app) {
  const auto arguments = std::make_shared<RouteArguments>();
  CLI::App* verb = app.add_subcommand("route", "run one MoE layer on given tensors");
  verb->add_option("EXP.toml", arguments->config, "experiment file; only the tables of a layer are read")->required();
  verb->add_option("--set", arguments->overrides, "override a value: a.b=v")->take_all();
  verb->add_option("--in", arguments->in, "safetensors file with x, ids, parameters, noise");
  verb->add_option("--out", arguments->out, "safetensors file to write");
  verb->add_flag("--grad", arguments->grad, "gradients of sum(y*grad_y) + sum of coefficient*loss too");
  CLI::Option* train = verb->add_flag("--train", arguments->train, "as in training");
  verb->add_flag("--eval", arguments->eval, "as in evaluation (the default)")->excludes(train);
  verb->add_flag("--end-step", arguments->end_step, "then move the router's state once, and write it as after.router.<name>");
  verb->add_flag("--signature", arguments->signature, "print the tensors that IN may hold, as JSON, and compute nothing");
  verb->footer("Example: moelab route experiments/quickstart.toml --in in.safetensors --out out.safetensors --grad --train");
  verb->callback([arguments] { route(*arguments); });
}

}  // namespace moelab
