#include "core/capacity.h"
#include "core/router.h"

#include "tests/support/route_case.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <cmath>
#include <random>

using namespace moelab;

namespace {

using Policy = CapacityPolicy;

// One random layer's worth of choices.
struct CapacityCase {
  RouteCase input;
  Policy policy;
  int64_t experts, k;
  Tensor choice_TK, allowed_TK, priority_TK;
};

int64_t capacity_slow_places(const Policy& p, int64_t n, int64_t experts, int64_t k) {
  if (p.mode == Policy::Mode::kNone) return n;
  if (p.mode == Policy::Mode::kAbsolute) return std::min(p.value, n);
  double load = n * p.factor;
  if (p.mode == Policy::Mode::kFactor) load = (p.times_k ? load * k : load) / experts;
  double whole = std::ceil(load);
  if (p.round == Policy::Round::kFloor) whole = std::floor(load);
  if (p.round == Policy::Round::kRound) {
    whole = std::floor(load + 0.5);
    if (load + 0.5 == whole && std::fmod(whole, 2) == 1) whole -= 1;  // halves to even
  }
  int64_t places = std::max<int64_t>(p.min, static_cast<int64_t>(whole));
  while (places % p.multiple_of != 0) ++places;
  return std::min(places, n);
}

// Larger is served earlier; the row order decides between equals.
double capacity_slow_urgency(const CapacityCase& c, int64_t row, int64_t rank) {
  const Tensor priority_K = c.priority_TK[row];
  switch (c.policy.priority) {
    case Policy::Priority::kPosition: return 0;
    case Policy::Priority::kBatch: return priority_K.max().item<double>();
    case Policy::Priority::kScore: return priority_K[rank].item<double>();
    case Policy::Priority::kRandom: break;
  }
  return c.input.in.capacity_noise_TE[row][c.choice_TK[row][rank]].item<double>();
}

// Pairs of one (scope, expert), one after the other: find who is next, give a place, until none is left.
void capacity_serve_slowly(const CapacityCase& c, const std::vector<int64_t>& rows, int64_t expert, Tensor& served_TK) {
  const bool by_rank = c.policy.order == Policy::Order::kChoiceMajor && c.policy.priority != Policy::Priority::kScore;
  struct Pair {
    double phase, urgency;
    int64_t row, rank;
  };
  std::vector<Pair> line;
  for (const int64_t row : rows)
    for (int64_t rank = 0; rank < c.k; ++rank)
      if (c.allowed_TK[row][rank].item<bool>() && c.choice_TK[row][rank].item<int64_t>() == expert)
        line.push_back({by_rank ? double(rank) : 0.0, -capacity_slow_urgency(c, row, rank), row, rank});
  std::sort(line.begin(), line.end(), [](const Pair& a, const Pair& b) {
    return std::make_tuple(a.phase, a.urgency, a.row) < std::make_tuple(b.phase, b.urgency, b.row);
  });
  const int64_t places = capacity_slow_places(c.policy, static_cast<int64_t>(rows.size()), c.experts, c.k);
  for (int64_t i = 0; i < std::min<int64_t>(places, static_cast<int64_t>(line.size())); ++i)
    served_TK[line[i].row][line[i].rank] = true;
}

Tensor capacity_slow_served(const CapacityCase& c) {
  Tensor served_TK = at::zeros_like(c.allowed_TK);
  const bool per_sequence = c.policy.scope == Policy::Scope::kSequence;
  for (int64_t scope = 0; scope < (per_sequence ? c.input.in.sequences : 1); ++scope) {
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < c.input.in.rows(); ++t)
      if (!per_sequence || c.input.in.sequence_T[t].item<int64_t>() == scope) rows.push_back(t);
    for (int64_t e = 0; e < c.experts; ++e) capacity_serve_slowly(c, rows, e, served_TK);
  }
  return served_TK;
}

Policy random_policy(std::mt19937& random) {
  Policy policy;
  policy.mode = static_cast<Policy::Mode>(random() % 4);
  policy.factor = 0.25 * (random() % 9);
  if (policy.mode == Policy::Mode::kTokenFraction) policy.factor /= 4;
  policy.value = random() % 6;
  policy.times_k = random() % 2;
  policy.round = static_cast<Policy::Round>(random() % 3);
  policy.min = random() % 3;
  policy.multiple_of = 1 + random() % 3;
  policy.scope = static_cast<Policy::Scope>(random() % 3);
  policy.priority = static_cast<Policy::Priority>(random() % 4);
  policy.order = static_cast<Policy::Order>(random() % 2);
  return policy;
}

// Distinct experts per row, some choices missing or refused, priorities with ties, ragged interleaved sequences.
CapacityCase random_capacity_case(int64_t seed) {
  std::mt19937 random(seed);
  const int64_t rows = random() % 8 == 0 ? 0 : 1 + random() % 20, experts = 1 + random() % 6, k = 1 + random() % experts;
  CapacityCase c{RouteCase(random_tensor(seed, {rows, 2})), random_policy(random), experts, k, {}, {}, {}};
  std::vector<int64_t> sequence;
  for (int64_t t = 0; t < rows; ++t) sequence.push_back(random() % 3);
  c.input.sequences(sequence).capacity_noise(at::floor(random_tensor(seed + 1, {rows, experts}) * 3) / 3);
  c.choice_TK = std::get<1>(random_tensor(seed + 2, {rows, experts}).sort(1)).slice(1, 0, k).contiguous();
  c.choice_TK.masked_fill_(random_tensor(seed + 3, {rows, k}).gt(1.3), -1);
  c.allowed_TK = c.choice_TK.ge(0).logical_and(random_tensor(seed + 4, {rows, k}).lt(1));
  c.priority_TK = at::floor(random_tensor(seed + 5, {rows, k}) * 2) / 2;
  return c;
}

Tensor capacity_served(const CapacityCase& c) {
  return served(c.policy, c.input.in, c.choice_TK, c.allowed_TK, c.priority_TK, c.experts, c.k);
}

Tensor longs(std::vector<int64_t> values) { return at::tensor(values, at::kLong); }

}  // namespace

TEST_CASE("who is served equals one queue per scope and expert, over every policy, on 300 random cases") {
  for (int64_t seed = 0; seed < 300; ++seed) {
    const CapacityCase c = random_capacity_case(1000 * seed);
    INFO("seed " << seed << ", rows " << c.input.in.rows() << ", experts " << c.experts << ", k " << c.k);
    const bool everybody = c.policy.mode == Policy::Mode::kNone;
    CHECK(capacity_served(c).equal(everybody ? c.allowed_TK : capacity_slow_served(c)));
  }
}

TEST_CASE("places: the formulas of contract section 2, worked by hand") {
  using M = Policy::Mode;
  using R = Policy::Round;
  CHECK(Policy{}.places(7, 3, 2) == 7);
  CHECK(Policy{.mode = M::kFactor, .factor = 1.25}.places(4, 3, 1) == 2);                                     // ceil(1.67)
  CHECK(Policy{.mode = M::kFactor, .factor = 1.25, .round = R::kFloor}.places(4, 3, 1) == 1);
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .times_k = true}.places(6, 4, 2) == 3);                       // 6·2/4
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .round = R::kRound}.places(10, 4, 1) == 2);                   // 2.5 to even
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .round = R::kRound}.places(14, 4, 1) == 4);                   // 3.5 to even
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .multiple_of = 4}.places(20, 4, 1) == 8);                     // 5 → 8
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .min = 4}.places(8, 8, 1) == 4);                              // 1 → 4
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .min = 4}.places(3, 8, 1) == 3);                              // never more than n
  CHECK(Policy{.mode = M::kAbsolute, .value = 5}.places(9, 2, 1) == 5);
  CHECK(Policy{.mode = M::kTokenFraction, .factor = 0.25}.places(10, 7, 3) == 3);                             // ceil(2.5)
  CHECK(Policy{.mode = M::kFactor, .factor = 0}.places(10, 7, 3) == 0);
  CHECK(Policy{.mode = M::kFactor, .factor = 2}.places(0, 7, 3) == 0);
}

TEST_CASE("conventions of spec/routers.md 1.2 as policies, at S = 100, E = 8, k = 2") {
  using M = Policy::Mode;
  using R = Policy::Round;
  CHECK(Policy{.mode = M::kFactor, .factor = 1.25, .round = R::kFloor, .min = 4}.places(100, 8, 2) == 15);   // mesh-TF: int(15.6)
  CHECK(Policy{.mode = M::kFactor, .factor = 1.25, .round = R::kRound, .min = 4}.places(100, 8, 2) == 16);   // flaxformer
  CHECK(Policy{.mode = M::kFactor, .factor = 1.05, .times_k = true, .multiple_of = 4}.places(100, 8, 2) == 28);  // V-MoE: 27 → 28
  CHECK(Policy{.mode = M::kFactor, .factor = 1, .times_k = true, .min = 4}.places(100, 8, 2) == 25);         // DeepSpeed top-2
  CHECK(Policy{.mode = M::kTokenFraction, .factor = 0.5, .round = R::kFloor}.places(101, 8, 2) == 50);  // StableMoE: int(T·cf)
}

TEST_CASE("capacity 0 serves nobody") {
  CapacityCase c = random_capacity_case(7000);
  c.policy = {.mode = Policy::Mode::kAbsolute, .value = 0};
  CHECK(capacity_served(c).any().item<bool>() == false);
  CHECK(total_places(c.policy, c.input.in, c.experts, c.k) == 0);
}

TEST_CASE("priority batch serves rows by their largest probability: V-MoE's oracle of spec/routers.md 2.5") {
  // Softmax of z = [[2,1,0],[1.5,1.4,-1],[.2,.1,0],[3,-1,2]]; everybody chooses expert 0, and two rows fit.
  const Tensor z_TE = numbers({{2, 1, 0}, {1.5, 1.4, -1}, {.2, .1, 0}, {3, -1, 2}});
  const Tensor choice_TK = at::zeros({4, 1}, at::kLong), allowed_TK = at::ones({4, 1}, at::kBool);
  const Tensor top_TK = z_TE.softmax(1).slice(1, 0, 1);
  const RouteCase input(z_TE);
  const auto fits = [&](Policy policy) {
    return served(policy, input.in, choice_TK, allowed_TK, top_TK, 3, 1).squeeze(1).to(at::kLong);
  };
  const Policy by_row{.mode = Policy::Mode::kAbsolute, .value = 2};
  const Policy by_batch{.mode = Policy::Mode::kAbsolute, .value = 2, .priority = Policy::Priority::kBatch};
  CHECK(fits(by_row).equal(longs({1, 1, 0, 0})));
  CHECK(fits(by_batch).equal(longs({1, 0, 0, 1})));
  // One place more at a time shows the whole order: rows 3, 0, 1, 2.
  Policy more = by_batch;
  more.value = 1;
  CHECK(fits(more).equal(longs({0, 0, 0, 1})));
  more.value = 3;
  CHECK(fits(more).equal(longs({1, 1, 0, 1})));
}

TEST_CASE("k_major lets a later first choice take the place of an earlier second choice, token_major does not") {
  const RouteCase input(random_tensor(1, {2, 2}));
  const Tensor choice_TK = longs({1, 0, 0, 1}).view({2, 2}), allowed_TK = at::ones({2, 2}, at::kBool);
  const Tensor priority_TK = at::ones({2, 2}, at::kDouble);
  Policy policy{.mode = Policy::Mode::kAbsolute, .value = 1};
  CHECK(served(policy, input.in, choice_TK, allowed_TK, priority_TK, 2, 2).to(at::kLong).equal(longs({1, 0, 1, 0}).view({2, 2})));
  CHECK(policy.lets_the_future_in(2));
  policy.order = Policy::Order::kTokenMajor;
  CHECK(served(policy, input.in, choice_TK, allowed_TK, priority_TK, 2, 2).to(at::kLong).equal(longs({1, 1, 0, 0}).view({2, 2})));
  CHECK_FALSE(policy.lets_the_future_in(2));
}

TEST_CASE("a pair that its router's policy refused takes no place") {
  const RouteCase input(random_tensor(1, {3, 2}));
  const Tensor choice_TK = at::zeros({3, 1}, at::kLong), allowed_TK = longs({0, 1, 1}).view({3, 1}).to(at::kBool);
  const Policy policy{.mode = Policy::Mode::kAbsolute, .value = 1};
  CHECK(served(policy, input.in, choice_TK, allowed_TK, at::ones({3, 1}, at::kDouble), 1, 1)
            .to(at::kLong)
            .equal(longs({0, 1, 0}).view({3, 1})));
}

TEST_CASE("the random order is a draw of (sequence, position): the same again, another with another key") {
  CapacityCase c = random_capacity_case(4000);
  c.input = RouteCase(random_tensor(1, {40, 2}));
  c.choice_TK = at::zeros({40, 1}, at::kLong);
  c.allowed_TK = at::ones({40, 1}, at::kBool);
  c.policy = {.mode = Policy::Mode::kAbsolute, .value = 20, .priority = Policy::Priority::kRandom};
  const Tensor first = capacity_served(c);
  CHECK(first.sum().item<int64_t>() == 20);
  CHECK(capacity_served(c).equal(first));
  c.input.seed(1);
  CHECK_FALSE(capacity_served(c).equal(first));
}

// 5 rows on three ranks at 1.25/4: ceil(5·1.25/4) = 2 places each, though ranks of 3, 1 and 1 rows alone would have 1 + 1 + 1.
TEST_CASE("ranks that share one scope have its places once") {
  const Policy policy{.mode = Policy::Mode::kFactor, .factor = 1.25, .scope = Policy::Scope::kGlobal};
  std::vector<int64_t> places(3);
  run_on_threads(3, [&](std::shared_ptr<Comm> comm) {
    RouteCase input(random_tensor(1, {comm->rank() == 0 ? 3 : 1, 2}));
    input.in.comm = comm.get();
    places[static_cast<size_t>(comm->rank())] = total_places(policy, input.in, 4, 1);
  });
  CHECK(places == std::vector<int64_t>{4 * 2, 0, 0});
}

TEST_CASE("total places add up over sequences and experts") {
  const RouteCase input = RouteCase(random_tensor(1, {7, 2})).sequences({0, 0, 1, 0, 1, 0, 0});
  const Policy per_sequence{.mode = Policy::Mode::kFactor, .factor = 1};
  CHECK(total_places(per_sequence, input.in, 2, 1) == 2 * 3 + 2 * 1);  // ceil(5/2), ceil(2/2)
  const Policy together{.mode = Policy::Mode::kFactor, .factor = 1, .scope = Policy::Scope::kMicro};
  CHECK(total_places(together, input.in, 2, 1) == 2 * 4);
  CHECK(total_places(Policy{}, input.in, 2, 1) == 0);
}

TEST_CASE("capacity of scope global over 2 thread ranks equals one process on the rows of both") {
  for (int64_t seed = 0; seed < 20; ++seed) {
    CapacityCase whole = random_capacity_case(1000 * seed + 500);
    whole.policy.scope = Policy::Scope::kGlobal;
    const int64_t rows = whole.input.in.rows(), half = rows / 3;
    std::vector<Tensor> parts(2);
    run_on_threads(2, [&](std::shared_ptr<Comm> comm) {
      const int64_t from = comm->rank() == 0 ? 0 : half, to = comm->rank() == 0 ? half : rows;
      RouteCase input = RouteCase(whole.input.in.x_TD.slice(0, from, to));
      input.in.capacity_noise_TE = whole.input.in.capacity_noise_TE.slice(0, from, to);
      input.in.comm = comm.get();
      parts[comm->rank()] = served(whole.policy, input.in, whole.choice_TK.slice(0, from, to),
                                   whole.allowed_TK.slice(0, from, to), whole.priority_TK.slice(0, from, to), whole.experts,
                                   whole.k);
    });
    INFO("seed " << seed);
    CHECK(at::cat(parts).equal(capacity_served(whole)));
  }
}

TEST_CASE("[moe.capacity] becomes a policy, and paper takes the router's") {
  const OptionSpecs specs = capacity_options();
  const auto spec = [&](const std::string& name) {
    return *std::find_if(specs.begin(), specs.end(), [&](const OptionSpec& o) { return o.name == name; });
  };
  Options options(specs);
  CHECK(capacity_policy(options, {}).mode == Policy::Mode::kNone);
  options.set(spec("mode"), std::string("token_fraction"));
  options.set(spec("round"), std::string("floor"));
  options.set(spec("scope"), std::string("global"));
  options.set(spec("priority"), std::string("score"));
  options.set(spec("order"), std::string("token_major"));
  const Policy policy = capacity_policy(options, {});
  CHECK(policy.mode == Policy::Mode::kTokenFraction);
  CHECK(policy.round == Policy::Round::kFloor);
  CHECK(policy.scope == Policy::Scope::kGlobal);
  CHECK(policy.priority == Policy::Priority::kScore);
  CHECK(policy.order == Policy::Order::kTokenMajor);
  options.set(spec("mode"), std::string("paper"));
  CHECK(capacity_policy(options, {.mode = Policy::Mode::kAbsolute, .value = 9}).value == 9);
}
