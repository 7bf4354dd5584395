#include "tests/routers/oracle.h"

using namespace moelab;

TEST_CASE("frozen routes as softmax_topk with the same weights") {
  for (const char* softmax : {"before", "after"}) {
    const std::map<std::string, OptionValue> options{
        {"k", int64_t{3}}, {"softmax", word(softmax)}, {"renormalise", word("after_drop")}};
    const CapacityPolicy tight{.mode = CapacityPolicy::Mode::kFactor, .factor = 1};
    const auto frozen = build_router({.name = "frozen", .width = 5, .experts = 6, .options = options, .capacity = tight});
    const auto trained = build_router({.name = "softmax_topk", .width = 5, .experts = 6, .options = options, .capacity = tight});
    set_tensor(*trained, "weight", find_tensor(*frozen, "weight"));
    const RouteCase input(random_tensor(1, {20, 5}));
    CHECK(dense_gates(sparse(route(*frozen, input))).equal(dense_gates(sparse(route(*trained, input)))));
  }
}

TEST_CASE("frozen's weight is registered, seeded, of variance 1/D, and not trainable") {
  const RouterCase wanted{.name = "frozen", .width = 400, .experts = 50};
  const auto router = build_router(wanted);
  CHECK(router->parameters().size() == 1);
  CHECK(router->trainable().empty());
  CHECK(std::abs(find_tensor(*router, "weight").std().item<double>() * 20 - 1) < 0.02);
  CHECK(find_tensor(*build_router(wanted), "weight").equal(find_tensor(*router, "weight")));
  RouterCase other = wanted;
  other.seed = 1;
  CHECK_FALSE(find_tensor(*build_router(other), "weight").equal(find_tensor(*router, "weight")));
}

TEST_CASE("frozen's gates still hand a gradient to the input") {
  const auto router = build_router({.name = "frozen", .width = 5, .experts = 4});
  CHECK(frozen_gradient_error(*router, RouteCase(random_tensor(2, {7, 5})).train()) < 1e-7);
}
