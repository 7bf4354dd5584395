#include "experiments/skeleton.h"

#include <cctype>

namespace moelab {
namespace {

constexpr const char* kRouterSource = R"cpp(// Title of the paper
// Authors, year, arXiv id
//
//   z = W x;  A = …;  gate_a = …      (write the equations here)
//
// Differences from the paper: none known.
#include "core/error.h"
#include "core/linear_router.h"

namespace moelab {
namespace {

// LinearRouter owns `weight` [E,D], the noise of [moe.noise] and the mask of experts that are not there yet.
class @CLASS@Router : public LinearRouter {
 public:
  explicit @CLASS@Router(const RouterSpec& spec)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype),
                     resolved_noise(spec.noise, NoiseSpec::Kind::kNone)) {}

  // The rule: which experts each row takes, and with which gates. core/linear_router.h and core/select.h have the steps;
  // routers/softmax_topk.cpp is the plainest example.
  RouteOutput route(const RouteInput&, RouteState&) const override {
    usage_error("router '@NAME@' has no rule yet: write the rule of @NAME@ in routers/@NAME@.cpp");
  }
};

const Registration<RouterEntry> registration_@NAME@{{
    .name = "@NAME@",
    .title = "@NAME@: one line that says what it does",
    .citation = "authors, year, arXiv id",
    .equation = "z = W x;  A = …;  gate_a = …",
    .options = {k_option(1)},
    .probes = {{"logits", "[T,E]", "W x"}, {"probs", "[T,E]", "softmax of them"}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<@CLASS@Router>(spec); },
}};

}  // namespace
}  // namespace moelab
)cpp";

constexpr const char* kRouterTest =
    R"cpp(// One case of router '@NAME@' worked by hand. Fill in what the paper's equations give for it.
#include "core/router.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>

namespace moelab {
namespace {

// What the first row of the case below takes: its first expert and that expert's gate.
constexpr int64_t k@CLASS@Expert = -1;  // fill in
constexpr double k@CLASS@Gate = -1;     // fill in

// One row x = (1, 0), two experts, W = [[2, 0], [0, 2]]: the logits are (2, 0), their softmax is (0.8808, 0.1192).
RouteOutput decide_@NAME@() {
  RouterSpec spec;
  spec.width = spec.experts = spec.max_experts = 2;
  spec.dtype = at::kDouble;
  spec.options = Options(Registry<RouterEntry>::instance().find("@NAME@").options);
  const std::unique_ptr<Router> router = make_router("@NAME@", spec);
  const at::NoGradGuard no_grad;
  router->parameters()[0].tensor.copy_(at::tensor({2.0, 0.0, 0.0, 2.0}, at::kDouble).view({2, 2}));
  RouteInput in;
  in.x_TD = at::tensor({1.0, 0.0}, at::kDouble).view({1, 2});
  in.sequence_T = in.sequence_key_T = at::zeros({1}, at::kLong);
  in.position_T = at::arange(1, at::kLong);
  in.cu_seqlens_B1 = at::tensor({0, 1}, at::kLong);
  in.mode = Mode::kEval;
  const std::shared_ptr<Comm> comm = single_comm();
  in.comm = comm.get();
  RouteState state;
  return router->route(in, state);
}

TEST_CASE("@NAME@ decides the worked case") {
  const RouteOutput out = decide_@NAME@();
  CHECK(out.assignment.choice_TK[0][0].item<int64_t>() == k@CLASS@Expert);
  CHECK(out.gate_TK[0][0].item<double>() == Catch::Approx(k@CLASS@Gate).epsilon(1e-4));
}

}  // namespace
}  // namespace moelab
)cpp";

constexpr const char* kRouterExperiment =
    R"toml(# Router @NAME@ in a model that trains in seconds: moelab run experiments/routers/@NAME@.toml
extends = "../base/lm_tiny.toml"
name = "@NAME@"

[moe.router]
name = "@NAME@"
)toml";

std::string camel_case(const std::string& name) {
  std::string camel;
  bool start = true;
  for (const char c : name) {
    if (c != '_') camel += start ? static_cast<char>(std::toupper(static_cast<unsigned char>(c))) : c;
    start = c == '_';
  }
  return camel;
}

void replace_all(std::string& text, const std::string& what, const std::string& with) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += with.size()) text.replace(at, what.size(), with);
}

}  // namespace

std::string filled_in(std::string text, const std::string& name) {
  replace_all(text, "@NAME@", name);
  replace_all(text, "@CLASS@", camel_case(name));
  return text;
}

std::vector<SkeletonFile> router_skeleton(const std::string& name) {
  return {{"routers/" + name + ".cpp", filled_in(kRouterSource, name)},
          {"tests/routers/" + name + "_test.cpp", filled_in(kRouterTest, name)},
          {"experiments/routers/" + name + ".toml", filled_in(kRouterExperiment, name)}};
}

}  // namespace moelab
