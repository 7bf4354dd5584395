#include "tests/routers/oracle.h"

using namespace moelab;

TEST_CASE("uniform goes round the experts by position within the sequence") {
  const auto router = build_router({.name = "uniform", .experts = 3});
  const RouteOutput out = route(*router, RouteCase(random_tensor(1, {7, 4})).sequences({0, 1, 0, 0, 1, 0, 1}));
  CHECK(out.assignment.choice_TK.squeeze(1).equal(longs_of({0, 0, 1, 2, 1, 0, 2})));
  CHECK(dense_gates(sparse(out)).sum().item<double>() == 7);
  CHECK_FALSE(out.scores.loss_TE.defined());
}

TEST_CASE("uniform with k choices takes the next experts too, each with gate 1/k, and loads all evenly") {
  const auto router = build_router({.name = "uniform", .experts = 4, .options = {{"k", int64_t{3}}}});
  const RouteOutput out = route(*router, RouteCase(random_tensor(1, {8, 4})).train());
  CHECK(out.assignment.choice_TK[3].equal(longs_of({3, 0, 1})));
  CHECK(relative_error(dense_gates(sparse(out)).sum(0), at::full({4}, 2.0, at::kDouble)) < 1e-14);
}

TEST_CASE("uniform keeps out of the room to grow and has no parameters") {
  const auto router = build_router({.name = "uniform", .experts = 2, .max_experts = 5});
  const RouteOutput out = route(*router, RouteCase(random_tensor(1, {6, 4})));
  CHECK(sparse(out).offsets_E1.equal(longs_of({0, 3, 6, 6, 6, 6})));
  CHECK(router->parameters().empty());
}
