// What tests of routers need: a layer input in one line, a router from its name, and gradients by finite differences.
//
//   auto router = build_router({.name = "switch", .width = 3, .experts = 3});
//   set_tensor(*router, "weight", at::eye(3, at::kDouble));           // so that x is the logits
//   RouteOutput out = route(*router, RouteCase(z_TE).train().noise(u_TD));
#pragma once

#include "core/router.h"
#include "tests/support/compare.h"

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moelab {

// One sequence in evaluation, positions in the order of rows, unless told otherwise.
struct RouteCase {
  explicit RouteCase(Tensor x_TD);
  RouteCase& train();
  RouteCase& sequences(const std::vector<int64_t>& sequence_of_row);  // may be interleaved; positions count up within each
  RouteCase& noise(Tensor raw_draw);
  RouteCase& capacity_noise(Tensor draw_TE);
  RouteCase& seed(int64_t seed);
  RouteCase& force(const Assignment& assignment);  // kept alive by the caller

  RouteInput in;
};

struct RouterCase {
  std::string name;
  int64_t width = 4;
  int64_t experts = 4;
  int64_t max_experts = 0;  // 0 = experts
  std::map<std::string, OptionValue> options = {};
  NoiseSpec noise = {};
  CapacityPolicy capacity = {};  // in training and in evaluation
  at::ScalarType dtype = at::kDouble;
  int64_t seed = 0;
};

std::unique_ptr<Router> build_router(const RouterCase& wanted);
RouterSpec router_spec(const RouterCase& wanted);  // of a registered router

RouteOutput route(const Router& router, const RouteCase& input);  // validates the plan too
const SparsePlan& sparse(const RouteOutput& out);

Tensor find_tensor(const Module& module, const std::string& name);
void set_tensor(const Module& module, const std::string& name, const Tensor& value);
Tensor numbers(const std::vector<std::vector<double>>& rows);  // float64 [rows, columns]
Tensor random_tensor(int64_t seed, at::IntArrayRef shape);     // standard normal, float64

// Row t, column e: the gate with which row t keeps expert e, else 0. [T,E]
Tensor dense_gates(const SparsePlan& plan);

// Relative error of the autograd gradient of value() by `leaf` (float64, requires_grad) against central differences.
double gradient_error(const std::function<Tensor()>& value, Tensor leaf);

}  // namespace moelab
