// Sizes at the edge, bad input, room to grow and replay, for each router of this folder that chooses by rows alone.
#include "tests/routers/oracle.h"

#include "core/error.h"

#include <limits>

using namespace moelab;

namespace {

struct EdgeRouter {
  const char* name;
  bool has_k;
  bool linear;
};

const std::vector<EdgeRouter> kEdgeRouters{{"noisy_topk", true, true}, {"softmax_topk", true, true}, {"switch", false, true},
                                           {"gshard", false, true},    {"uniform", true, false},     {"random", true, false},
                                           {"frozen", true, true}};

RouterCase edge_case(const EdgeRouter& router, int64_t experts, int64_t k) {
  RouterCase wanted{.name = router.name, .width = 4, .experts = experts};
  if (router.has_k) wanted.options["k"] = k;
  return wanted;
}

std::string edge_message(const std::function<void()>& action, ExitCode code) {
  try {
    action();
  } catch (const Error& error) {
    CHECK(error.code() == code);
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("every router works for T = 0, 1, below E, and a prime T; E = 1; k = E; with and without a capacity") {
  for (const EdgeRouter& router : kEdgeRouters)
    for (const int64_t experts : {1, 2, 5})
      for (const int64_t rows : {0, 1, 3, 13})
        for (const double factor : {0.0, 1.0}) {
          RouterCase wanted = edge_case(router, experts, experts);
          if (factor > 0) wanted.capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = factor};
          const auto built = build_router(wanted);
          INFO(router.name << " T=" << rows << " E=" << experts << " factor " << factor);
          const Tensor x_TD = random_tensor(1, {rows, 4});
          for (const RouteCase& input : {RouteCase(x_TD), RouteCase(x_TD).train()}) {
            const RouteOutput out = route(*built, input);
            const int64_t chosen = out.assignment.kept_TK.sum().item<int64_t>() + sparse(out).dropped_token_M.numel();
            CHECK(chosen <= rows * out.k);
            if (router.has_k) CHECK(chosen == rows * experts);
          }
        }
}

TEST_CASE("without rows the parameters still get a gradient, of zero") {
  for (const EdgeRouter& router : kEdgeRouters) {
    const auto built = build_router(edge_case(router, 3, 2));
    if (built->trainable().empty()) continue;
    INFO(router.name);
    sparse(route(*built, RouteCase(at::zeros({0, 4}, at::kDouble)).train())).gate_N.sum().backward();
    CHECK(find_tensor(*built, "weight").grad().equal(at::zeros({3, 4}, at::kDouble)));
  }
}

TEST_CASE("k above the number of experts is refused, with both numbers") {
  for (const EdgeRouter& router : kEdgeRouters) {
    if (!router.has_k) continue;
    INFO(router.name);
    const std::string message = edge_message([&] { build_router(edge_case(router, 8, 9)); }, ExitCode::kUsage);
    CHECK(message == "[moe.router] k = 9 is more than experts = 8");
  }
}

TEST_CASE("a NaN or an infinity in x is an error that names it, the layer and the step") {
  for (const EdgeRouter& router : kEdgeRouters)
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      INFO(router.name);
      RouteCase input(random_tensor(1, {3, 4}));
      input.in.x_TD[1][2] = bad;
      input.in.layer = 2;
      input.in.step = 40;
      const auto built = build_router(edge_case(router, 3, 1));
      CHECK(edge_message([&] { route(*built, input); }, ExitCode::kDiverged) ==
            "non-finite x in the router of layer 2 at step 40");
    }
}

TEST_CASE("logits that overflow are an error that names the logits") {
  const auto router = oracle_router({.name = "switch"});
  set_tensor(*router, "weight", at::full({3, 3}, 1e300, at::kDouble));
  const std::string message = edge_message(
      [&] {
        route(*router, RouteCase(at::full({1, 3}, 1e300, at::kDouble)));
      },
      ExitCode::kDiverged);
  CHECK(message.starts_with("non-finite logits"));
}

TEST_CASE("experts that are not there yet are never chosen, have probability 0, and the rest is as without them") {
  for (const EdgeRouter& router : kEdgeRouters) {
    INFO(router.name);
    const Tensor x_TD = random_tensor(1, {30, 4});
    RouterCase wanted = edge_case(router, 3, 2);
    const auto small = build_router(wanted);
    wanted.max_experts = 6;
    const auto roomy = build_router(wanted);
    if (router.linear) {
      set_tensor(*roomy, "weight", random_tensor(2, {6, 4}) * 3);
      set_tensor(*small, "weight", find_tensor(*roomy, "weight").slice(0, 0, 3));
      CHECK(find_tensor(*roomy, "mask").equal(at::tensor({1., 1., 1., 0., 0., 0.}, at::kDouble)));
    }
    const RouteOutput with = route(*roomy, RouteCase(x_TD)), without = route(*small, RouteCase(x_TD));
    CHECK(relative_error(dense_gates(sparse(with)).slice(1, 0, 3), dense_gates(sparse(without))) < 1e-14);
    CHECK(sparse(with).offsets_E1[3].item<int64_t>() == sparse(with).token_N.numel());
    if (router.linear) CHECK(with.scores.loss_TE.slice(1, 3).abs().max().item<double>() == 0);
    route(*roomy, RouteCase(x_TD).train());
  }
}

TEST_CASE("inactive experts get a gradient of zero and spoil no other, noise scale included") {
  const auto router = build_router(
      {.name = "noisy_topk", .width = 4, .experts = 3, .max_experts = 5, .options = {{"k", int64_t{2}}}});
  set_tensor(*router, "weight", random_tensor(1, {5, 4}));
  set_tensor(*router, "noise_weight", random_tensor(2, {5, 4}) * 10);
  CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(3, {8, 4})).train()) < 1e-7);
  CHECK(find_tensor(*router, "weight").grad().slice(0, 3).abs().max().item<double>() == 0);
  CHECK(find_tensor(*router, "noise_weight").grad().slice(0, 3).abs().max().item<double>() == 0);
}

TEST_CASE("with fewer active experts than k the missing choice is -1") {
  const auto router = build_router(
      {.name = "softmax_topk", .experts = 2, .max_experts = 3, .options = {{"softmax", word("after")}}});
  set_tensor(*router, "mask", at::tensor({0., 1., 0.}, at::kDouble));  // as after an expert was removed
  const RouteOutput out = route(*router, RouteCase(random_tensor(1, {4, 4})));
  CHECK(out.assignment.choice_TK.equal(longs_of({1, -1}).expand({4, 2})));
  CHECK(out.gate_TK.equal(numbers({{1, 0}}).expand({4, 2})));
}

TEST_CASE("a forced selection is replayed: the same plan again, and gates of other weights at the forced choices") {
  for (const EdgeRouter& router : kEdgeRouters) {
    INFO(router.name);
    RouterCase wanted = edge_case(router, 5, 2);
    wanted.capacity = {.mode = CapacityPolicy::Mode::kFactor, .factor = 1};
    const auto built = build_router(wanted);
    if (router.linear) set_tensor(*built, "weight", random_tensor(1, {5, 4}));
    const RouteCase input = RouteCase(random_tensor(2, {12, 4})).train();
    const RouteOutput first = route(*built, input), again = route(*built, RouteCase(input).force(first.assignment));
    CHECK(sparse(again).token_N.equal(sparse(first).token_N));
    CHECK(sparse(again).gate_N.equal(sparse(first).gate_N));
    CHECK(sparse(again).dropped_token_M.equal(sparse(first).dropped_token_M));
    if (!router.linear) continue;
    set_tensor(*built, "weight", random_tensor(3, {5, 4}));
    const RouteOutput moved = route(*built, RouteCase(input).force(first.assignment));
    CHECK(moved.assignment.choice_TK.equal(first.assignment.choice_TK));
    CHECK_FALSE(sparse(moved).gate_N.equal(sparse(first).gate_N));
  }
}

TEST_CASE("routing changes no parameter and no buffer") {
  for (const EdgeRouter& router : kEdgeRouters) {
    RouterCase wanted = edge_case(router, 3, 2);
    wanted.max_experts = 4;
    const auto built = build_router(wanted);
    std::vector<Tensor> before;
    for (const auto& list : {built->parameters(), built->buffers()})
      for (const NamedTensor& entry : list) before.push_back(entry.tensor.detach().clone());
    route(*built, RouteCase(random_tensor(2, {12, 4})).train());
    size_t i = 0;
    for (const auto& list : {built->parameters(), built->buffers()})
      for (const NamedTensor& entry : list) CHECK(entry.tensor.equal(before[i++]));
  }
}
