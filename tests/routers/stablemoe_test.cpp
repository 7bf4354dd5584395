// StableMoE: spec/routers.md 3.5.
#include "tests/routers/oracle.h"

#include "core/error.h"

using namespace moelab;

namespace {

const Rows kMainLogits{{1, 0}, {2, 0}, {.5, .4}, {-1, 1}};
const Rows kDistilledScores{{.2, .1}, {0, .3}, {.5, -.5}, {0, 0}};
constexpr int64_t kSwitchStep = 10;

RouteCase stable_case(const Tensor& x_TD, const Tensor& token_ids_T, int64_t step = 0) {
  RouteCase input(x_TD);
  input.in.token_ids_T = token_ids_T;
  input.in.step = step;
  return input;
}

// Row t has token t, whose distilled scores are kDistilledScores[t]; x is the main logits.
std::unique_ptr<Router> oracle_stable(const std::map<std::string, OptionValue>& more = {}) {
  RouterCase wanted{.name = "stablemoe", .width = 2, .experts = 2, .options = more};
  wanted.options.insert({{"vocabulary", int64_t{4}}, {"distill_dim", int64_t{2}}, {"stage1_steps", kSwitchStep}});
  std::unique_ptr<Router> router = build_router(wanted);
  set_tensor(*router, "weight", at::eye(2, at::kDouble));
  set_tensor(*router, "distilled", at::eye(2, at::kDouble));
  set_tensor(*router, "embedding", numbers(kDistilledScores));
  return router;
}

RouteCase stable_oracle_case(int64_t step = 0) { return stable_case(numbers(kMainLogits), longs_of({0, 1, 2, 3}), step); }

Tensor stable_choices(const Router& router, const RouteCase& input) {
  return route(router, input).assignment.choice_TK.squeeze(1);
}

RouterCase wide_stable(const char* distilled, int64_t stage1_steps = kSwitchStep) {
  return {.name = "stablemoe",
          .width = 5,
          .experts = 4,
          .options = {{"vocabulary", int64_t{9}},
                      {"distill_dim", int64_t{3}},
                      {"stage1_steps", stage1_steps},
                      {"distilled", word(distilled)}}};
}

std::string stable_message(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

// ŝ of the convolution by plain loops, rows of each sequence in the order given by `rows`.
std::vector<double> slow_convolution(const Router& router, const std::vector<int64_t>& ids, size_t place) {
  const Tensor taps = find_tensor(router, "taps"), embedding = find_tensor(router, "embedding"),
               bias = find_tensor(router, "taps_bias");
  const Tensor centroids = find_tensor(router, "distilled");
  const int64_t dim = embedding.size(1);
  std::vector<double> hidden(dim), scores(centroids.size(0));
  for (int64_t o = 0; o < dim; ++o) {
    hidden[o] = bias[o].item<double>();
    for (size_t j = 0; j < 5 && j <= place; ++j)
      for (int64_t i = 0; i < dim; ++i)
        hidden[o] += taps[o][static_cast<int64_t>(j)][i].item<double>() * embedding[ids[place - j]][i].item<double>();
  }
  for (int64_t e = 0; e < centroids.size(0); ++e)
    for (int64_t o = 0; o < dim; ++o) scores[e] += centroids[e][o].item<double>() * hidden[o];
  return scores;
}

}  // namespace

TEST_CASE("stablemoe oracle (spec 3.5): stage 1 chooses 0, 0, 0, 1 by the main logits, gates are their sigmoids") {
  const auto router = oracle_stable();
  const RouteOutput out = route(*router, stable_oracle_case().train());
  CHECK(out.assignment.choice_TK.squeeze(1).equal(longs_of({0, 0, 0, 1})));
  for (int64_t t = 0; t < 4; ++t) {
    const double s = kMainLogits[t][t == 3 ? 1 : 0];
    CHECK(std::abs(out.gate_TK[t][0].item<double>() - 1 / (1 + std::exp(-s))) < 1e-15);
  }
  CHECK(relative_error(out.probes.at("distilled"), numbers(kDistilledScores)) < 1e-15);
}

TEST_CASE("stablemoe oracle (spec 3.5): the routers agree on 2 of 4 rows, a tie going to expert 0") {
  const auto router = oracle_stable();
  CHECK(route(*router, stable_oracle_case().train()).probes.at("agreement").equal(at::tensor({1., 0., 1., 0.}, at::kDouble)));
}

TEST_CASE("stablemoe (spec 3.5): the stage changes exactly at stage1_steps, in training and in evaluation by the main router") {
  const auto router = oracle_stable({{"eval_router", word("main")}});
  const Tensor by_main = longs_of({0, 0, 0, 1}), by_distilled = longs_of({0, 1, 0, 0});
  for (const int64_t step : {int64_t{0}, kSwitchStep - 1, kSwitchStep, kSwitchStep + 1}) {
    INFO(step);
    const Tensor& expected = step < kSwitchStep ? by_main : by_distilled;
    CHECK(stable_choices(*router, stable_oracle_case(step).train()).equal(expected));
    CHECK(stable_choices(*router, stable_oracle_case(step)).equal(expected));
  }
}

TEST_CASE("stablemoe (spec 3.5): evaluation uses the distilled router in both stages unless eval_router says main") {
  const auto router = oracle_stable();
  for (const int64_t step : {int64_t{0}, kSwitchStep})
    CHECK(stable_choices(*router, stable_oracle_case(step)).equal(longs_of({0, 1, 0, 0})));
}

TEST_CASE("stablemoe (spec 3.5): in stage 2 the gate is still the sigmoid of the main logit at the distilled choice") {
  const auto router = oracle_stable();
  const RouteOutput out = route(*router, stable_oracle_case(kSwitchStep).train());
  const double expected[] = {1, 0, .5, -1};
  for (int64_t t = 0; t < 4; ++t) CHECK(std::abs(out.gate_TK[t][0].item<double>() - 1 / (1 + std::exp(-expected[t]))) < 1e-15);
  out.gate_TK.sum().backward();
  CHECK(find_tensor(*router, "weight").grad().abs().amax(1).min().item<double>() > 0);
  CHECK_FALSE(find_tensor(*router, "embedding").grad().defined());
  CHECK_FALSE(find_tensor(*router, "distilled").grad().defined());
}

TEST_CASE("stablemoe (spec 3.5): in stage 2 an id is routed alike whatever x, W, the step, the row or the batch") {
  const auto router = build_router(wide_stable("word"));
  const Tensor ids_T = longs_of({3, 8, 0, 3, 1, 8, 2, 4, 5, 6, 7});
  const Tensor first_T = stable_choices(*router, stable_case(random_tensor(1, {11, 5}), ids_T, kSwitchStep).train());
  CHECK(first_T[0].equal(first_T[3]));
  CHECK(first_T[1].equal(first_T[5]));
  set_tensor(*router, "weight", random_tensor(5, {4, 5}));
  CHECK(stable_choices(*router, stable_case(random_tensor(2, {11, 5}), ids_T, 9999).train()).equal(first_T));
  const Tensor some_T = ids_T.flip(0).slice(0, 2, 7), expected_T = first_T.flip(0).slice(0, 2, 7);
  CHECK(stable_choices(*router, stable_case(random_tensor(3, {5, 5}), some_T, 500)).equal(expected_T));
}

TEST_CASE("stablemoe (spec 3.5): the last step of stage 1 ends with one switch, which decoding knows without a step") {
  const auto router = oracle_stable({{"eval_router", word("main")}});
  CHECK(router->end_step({}, kSwitchStep - 2).empty());
  const std::vector<Event> events = router->end_step({}, kSwitchStep - 1);
  REQUIRE(events.size() == 2);
  CHECK(events[0].kind == Event::Kind::kStageChanged);
  CHECK(events[1].kind == Event::Kind::kFreeze);
  for (const char* name : {"embedding", "distilled"})
    CHECK(std::count(events[1].tensors.begin(), events[1].tensors.end(), name) == 1);
  CHECK(std::count(events[1].tensors.begin(), events[1].tensors.end(), "weight") == 0);
  CHECK(router->end_step({}, kSwitchStep).empty());
  RouteCase decoding = stable_oracle_case(/*step=*/0);
  decoding.in.mode = Mode::kDecode;
  CHECK(stable_choices(*router, decoding).equal(longs_of({0, 1, 0, 0})));
}

TEST_CASE("stablemoe without a first stage is frozen from the start") {
  const auto router = build_router(wide_stable("cnn", 0));
  std::vector<std::string> moving;
  for (const NamedTensor& entry : router->trainable()) moving.push_back(entry.name);
  CHECK(moving == std::vector<std::string>{"weight"});
  CHECK(router->end_step({}, 0).empty());
}

TEST_CASE(
    "stablemoe (spec 3.5): the convolution reads 5 tokens of its own sequence, zero before its beginning, rows interleaved") {
  const auto router = build_router(wide_stable("cnn"));
  set_tensor(*router, "taps_bias", random_tensor(7, {3}));
  const std::vector<int64_t> sequence{0, 1, 0, 0, 1, 2, 0, 1, 0, 0, 0, 1}, id{3, 1, 4, 1, 5, 8, 2, 6, 5, 3, 0, 7};
  RouteCase input = stable_case(random_tensor(1, {12, 5}), longs_of(id)).sequences(sequence);
  const Tensor scores_TE = route(*router, input).probes.at("distilled");
  std::vector<std::vector<int64_t>> ids_of(3);
  for (size_t t = 0; t < id.size(); ++t) {
    auto& own = ids_of[sequence[t]];
    own.push_back(id[t]);
    CHECK(relative_error(scores_TE[static_cast<int64_t>(t)],
                         at::tensor(slow_convolution(*router, own, own.size() - 1), at::kDouble)) < 1e-12);
  }
  const Tensor backwards = at::arange(11, -1, -1);  // the rows in another order, with their positions
  RouteCase turned = input;
  for (Tensor* rows :
       {&turned.in.x_TD, &turned.in.token_ids_T, &turned.in.sequence_T, &turned.in.sequence_key_T, &turned.in.position_T})
    *rows = rows->index_select(0, backwards);
  CHECK(relative_error(route(*router, turned).probes.at("distilled"), scores_TE.flip(0)) < 1e-15);
}

TEST_CASE("stablemoe (spec 3.5): decoding token by token keeps the window of each sequence, also of a copied state") {
  const auto router = build_router(wide_stable("cnn"));
  const Tensor ids_BL = numbers({{3, 1, 4, 1, 5, 2, 6}, {8, 7, 6, 5, 4, 3, 2}}).to(at::kLong);
  const Tensor x_TD = random_tensor(1, {14, 5});
  const Tensor whole_TE =
      route(*router, stable_case(x_TD, ids_BL.flatten()).sequences({0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1}))
          .probes.at("distilled");
  RouteState state, copy;
  for (int64_t first = 0; first < 7; first += first == 0 ? 3 : 1) {  // a prompt of three tokens, then one by one
    const int64_t count = first == 0 ? 3 : 1;
    std::vector<int64_t> sequence(static_cast<size_t>(2 * count), 0);
    std::fill(sequence.begin() + count, sequence.end(), 1);
    RouteCase part =
        stable_case(random_tensor(first, {2 * count, 5}), ids_BL.slice(1, first, first + count).flatten()).sequences(sequence);
    part.in.position_T = part.in.position_T + first;
    part.in.mode = Mode::kDecode;
    copy = state;
    const Tensor found_TE = router->route(part.in, state).probes.at("distilled");
    CHECK(relative_error(found_TE.view({2, count, 4}), whole_TE.view({2, 7, 4}).slice(1, first, first + count)) < 1e-14);
    CHECK(router->route(part.in, copy).probes.at("distilled").equal(found_TE));
  }
  RouteState untouched;
  router->route(stable_case(x_TD, ids_BL.flatten()).train().in, untouched);
  CHECK(untouched.kept.empty());
}

TEST_CASE("stablemoe (spec 3.5): capacity floor(rows·2/E) drops the last rows of the fuller expert") {
  const CapacityPolicy paper = Registry<RouterEntry>::instance().find("stablemoe").paper_capacity;
  CHECK(paper.places(7, 4, 1) == 3);
  RouterCase wanted{.name = "stablemoe", .width = 2, .experts = 2, .options = {{"vocabulary", int64_t{1}}}, .capacity = paper};
  wanted.capacity.factor = 1;
  const auto router = build_router(wanted);
  set_tensor(*router, "weight", at::eye(2, at::kDouble));
  const RouteOutput out = route(*router, stable_case(numbers(kMainLogits), at::zeros({4}, at::kLong)).train());
  CHECK(sparse(out).token_N.equal(longs_of({0, 1, 3})));
  CHECK(sparse(out).dropped_token_M.equal(longs_of({2})));
}

TEST_CASE("stablemoe (spec 3.5) starts from orthogonal centroids of norm 0.1 and a standard normal embedding") {
  RouterCase wanted{.name = "stablemoe", .width = 16, .experts = 8, .options = {{"vocabulary", int64_t{400}}}};
  const auto router = build_router(wanted);
  const Tensor weight_ED = find_tensor(*router, "weight"), distilled_Ed = find_tensor(*router, "distilled");
  CHECK(distilled_Ed.sizes() == at::IntArrayRef({8, 50}));
  for (const Tensor& rows : {weight_ED, distilled_Ed})
    CHECK((rows.matmul(rows.t()) - 0.01 * at::eye(8, at::kDouble)).abs().max().item<double>() < 1e-15);
  const Tensor embedding = find_tensor(*router, "embedding");
  CHECK(std::abs(embedding.std().item<double>() - 1) < 0.02);
  wanted.experts = 32;
  const Tensor tall_ED = find_tensor(*build_router(wanted), "weight");
  CHECK((tall_ED.t().matmul(tall_ED) - 0.01 * at::eye(16, at::kDouble)).abs().max().item<double>() < 1e-15);
}

TEST_CASE("gradients of stablemoe equal finite differences with the selection frozen, in both stages") {
  for (const char* distilled : {"word", "cnn"})
    for (const int64_t step : {int64_t{0}, kSwitchStep}) {
      INFO(distilled << " step " << step);
      const auto router = build_router(wide_stable(distilled));
      set_tensor(*router, "weight", random_tensor(1, {4, 5}));
      const Tensor ids_T = longs_of({3, 8, 0, 3, 1, 8, 2, 4});
      CHECK(frozen_gradient_error(*router, stable_case(random_tensor(2, {8, 5}), ids_T, step).train()) < 1e-7);
    }
}

TEST_CASE("stablemoe works for T = 0, one expert, and room to grow, where an absent expert is never chosen in either stage") {
  for (const char* distilled : {"word", "cnn"})
    for (const int64_t experts : {1, 3})
      for (const int64_t step : {int64_t{0}, kSwitchStep}) {
        RouterCase wanted = wide_stable(distilled);
        wanted.experts = experts;
        wanted.max_experts = 9;  // as many as there are token ids
        const auto router = build_router(wanted);
        set_tensor(*router, "weight", random_tensor(1, {9, 5}));
        set_tensor(*router, "distilled", random_tensor(2, {9, 3}));
        CHECK(route(*router, stable_case(at::zeros({0, 5}, at::kDouble), longs_of({}), step).train()).gate_TK.numel() == 0);
        const RouteOutput out =
            route(*router, stable_case(random_tensor(3, {30, 5}), at::arange(30).remainder(9), step).train());
        CHECK(out.assignment.choice_TK.max().item<int64_t>() < experts);
        CHECK(out.assignment.choice_TK.min().item<int64_t>() >= 0);
        CHECK(out.scores.loss_TE.slice(1, experts).abs().max().item<double>() == 0);
        CHECK(router->per_expert_tensors().size() == 3);  // weight, distilled, mask
      }
}

TEST_CASE("stablemoe refuses ids outside its vocabulary, missing ids, and a vocabulary that nobody says, each in one line") {
  const auto router = build_router(wide_stable("word"));
  const Tensor x_TD = random_tensor(1, {3, 5});
  for (const int64_t bad : {-1, 9}) {
    const std::string message = stable_message([&] { route(*router, stable_case(x_TD, longs_of({0, bad, 1}))); });
    CHECK(message == "token " + std::to_string(bad) + " is outside the vocabulary of 9 that the router of layer 0 knows");
  }
  CHECK(stable_message([&] { route(*router, RouteCase(x_TD)); }) ==
        "the router of layer 0 reads token ids, and there are none");
  CHECK(stable_message([] { build_router({.name = "stablemoe"}); }).find("needs `vocabulary`") != std::string::npos);
  RouterSpec small = router_spec(wide_stable("word"));
  small.vocabulary = 10;
  CHECK(stable_message([&] { make_router("stablemoe", small); }) == "[moe.router] vocabulary = 9 is less than the data's 10");
}
