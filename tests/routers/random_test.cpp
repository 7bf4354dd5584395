#include "tests/routers/oracle.h"

#include "core/error.h"

using namespace moelab;

TEST_CASE("random takes the experts that noise names") {
  const auto router = build_router({.name = "random", .experts = 3});
  const Tensor experts_T = longs_of({2, 0, 0, 1, 2});
  for (RouteCase input : {RouteCase(random_tensor(1, {5, 4})), RouteCase(random_tensor(1, {5, 4})).train()}) {
    const RouteOutput out = route(*router, input.noise(experts_T));
    CHECK(out.assignment.choice_TK.squeeze(1).equal(experts_T));
    CHECK(dense_gates(sparse(out)).equal(at::one_hot(experts_T, 3).to(at::kDouble)));
  }
}

TEST_CASE("random refuses noise of another shape or type, an expert that is not there, and one taken twice") {
  const RouteCase input(random_tensor(1, {2, 4}));
  const auto one = build_router({.name = "random", .experts = 3});
  CHECK_THROWS_AS(route(*one, RouteCase(input).noise(longs_of({0, 1, 2}))), Error);
  CHECK_THROWS_AS(route(*one, RouteCase(input).noise(at::zeros({2}, at::kDouble))), Error);
  CHECK_THROWS_AS(route(*one, RouteCase(input).noise(longs_of({0, 3}))), Error);
  const auto two = build_router({.name = "random", .experts = 3, .options = {{"k", int64_t{2}}}});
  CHECK_THROWS_AS(route(*two, RouteCase(input).noise(longs_of({0, 1, 2, 2}).view({2, 2}))), Error);
  CHECK_NOTHROW(route(*two, RouteCase(input).noise(longs_of({0, 1, 2, 1}).view({2, 2}))));
}

TEST_CASE("random draws every expert about equally often, k different ones per row, and the same under the same key") {
  const auto router = build_router({.name = "random", .experts = 4, .options = {{"k", int64_t{2}}}});
  const RouteCase input(random_tensor(1, {4000, 4}));
  const RouteOutput out = route(*router, input);
  const Tensor counts_E = sparse(out).offsets_E1.diff();
  CHECK(counts_E.sum().item<int64_t>() == 8000);
  CHECK((counts_E - 2000).abs().max().item<int64_t>() < 160);  // 5 standard deviations: sqrt(4000/4) = 31.6
  CHECK(route(*router, input).assignment.choice_TK.equal(out.assignment.choice_TK));
  CHECK_FALSE(route(*router, RouteCase(input).seed(1)).assignment.choice_TK.equal(out.assignment.choice_TK));
}

TEST_CASE("a row's random experts do not depend on the other rows") {
  const auto router = build_router({.name = "random", .experts = 8});
  const Tensor both =
      route(*router, RouteCase(random_tensor(1, {10, 4})).sequences({0, 1, 0, 1, 0, 1, 0, 1, 0, 1})).assignment.choice_TK;
  const Tensor alone = route(*router, RouteCase(random_tensor(1, {5, 4}))).assignment.choice_TK;
  CHECK(both.index({at::tensor({0, 2, 4, 6, 8}, at::kLong)}).equal(alone));
}
