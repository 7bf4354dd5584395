#include "tests/routers/oracle.h"
#include "tests/support/merging_bank.h"
#include "tests/support/sparse_cases.h"

#include "core/config.h"
#include "core/error.h"
#include "core/execute.h"
#include "core/model/model.h"

#include <ATen/core/grad_mode.h>

using namespace moelab;

namespace {

using LoryOptions = std::map<std::string, OptionValue>;

const MergePlan& lory_plan(const RouteOutput& out) { return std::get<MergePlan>(out.plan); }

// Mixture of each row. [T,E]
Tensor lory_mixtures(const RouteOutput& out) {
  return lory_plan(out).alpha_GE.index_select(0, lory_plan(out).group_of_token_T);
}

std::unique_ptr<Router> lory_router(LoryOptions options, int64_t length = 2, int64_t experts = 3, int64_t max_experts = 0) {
  options["segment_length"] = length;
  auto router = build_router({.name = "lory", .width = 4, .experts = experts, .max_experts = max_experts,
                              .options = std::move(options)});
  set_tensor(*router, "weight", random_tensor(1, find_tensor(*router, "weight").sizes()));
  return router;
}

// Row by row: the mean logits of the rows of the segment before, or of the first segment's rule.
Rows slow_lory(const Router& router, const Tensor& x_TD, const std::vector<int64_t>& sequence,
               const std::vector<int64_t>& segment, bool own_first) {
  const Rows z = slow_linear(x_TD, find_tensor(router, "weight").detach());
  const auto rows = static_cast<int64_t>(sequence.size());
  const auto experts = static_cast<int64_t>(z[0].size());
  const auto mean_logits = [&](int64_t b, int64_t n) {
    std::vector<double> mean(experts, 0);
    double count = 0;
    for (int64_t t = 0; t < rows; ++t) {
      if (sequence[t] != b || segment[t] != n) continue;
      count += 1;
      for (int64_t e = 0; e < experts; ++e) mean[e] += z[t][e];
    }
    for (double& value : mean) value /= count;
    return mean;
  };
  Rows mixtures;
  for (int64_t t = 0; t < rows; ++t) {
    int64_t before = -1;  // the latest segment of the sequence that is earlier
    for (int64_t s = 0; s < rows; ++s)
      if (sequence[s] == sequence[t] && segment[s] < segment[t]) before = std::max(before, segment[s]);
    const std::vector<double> equal(experts, 0);
    const std::vector<double> first = own_first ? mean_logits(sequence[t], segment[t]) : equal;
    mixtures.push_back(slow_softmax(before >= 0 ? mean_logits(sequence[t], before) : first));
  }
  return mixtures;
}

RouteCase lory_decoding(const Tensor& x_TD, int64_t first) {
  RouteCase input(x_TD);
  input.in.mode = Mode::kDecode;
  input.in.position_T = input.in.position_T + first;
  return input;
}

const LoryOptions kLoryPaper{{"first_segment", OptionValue(std::string("own_stopgrad"))}};

// The rows of kLoryInterleaved, and the segments of length 2 of each.
const std::vector<int64_t> kLoryInterleaved{0, 1, 0, 0, 1, 1, 0, 0}, kLorySegments{0, 0, 0, 1, 0, 1, 1, 2};

}  // namespace

TEST_CASE("lory oracle (spec 3.8): one width, segments of 2, the first one by its own stopped mean") {
  LoryOptions options = kLoryPaper;
  options["segment_length"] = int64_t{2};
  auto router = build_router({.name = "lory", .width = 1, .experts = 2, .options = options});
  set_tensor(*router, "weight", numbers({{.5}, {-.5}}));
  const Tensor h_TD = numbers({{1}, {3}, {5}, {1}, {0}, {2}});
  for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
    RouteCase input(h_TD);
    input.in.mode = mode;
    const RouteOutput out = route(*router, input);
    CHECK(lory_plan(out).group_of_token_T.equal(longs_of({0, 0, 1, 1, 2, 2})));
    CHECK(printed_digits_agree(lory_plan(out).alpha_GE, numbers({{.8808, .1192}, {.8808, .1192}, {.9526, .0474}})));
    const testing::FactorBank bank(1, at::tensor({1.0, 3.0}, at::kDouble));
    CHECK(printed_digits_agree(bank.merge(lory_plan(out).alpha_GE[2])[0].view({1, 1}), numbers({{1.0949}})));
    const Tensor expected_TD = numbers({{1.2384}, {3.7152}, {6.1920}, {1.2384}, {0}, {2.1897}});
    CHECK(printed_digits_agree(execute(out.plan, bank, {.x_TD = h_TD}), expected_TD));
  }
}

TEST_CASE("lory equals plain loops on interleaved sequences whose last segments are short, for both first segments") {
  const Tensor x_TD = random_tensor(2, {8, 4});
  for (const bool own : {false, true})
    for (const Mode mode : {Mode::kTrain, Mode::kEval}) {
      const auto router = lory_router(own ? kLoryPaper : LoryOptions{});
      RouteCase input = RouteCase(x_TD).sequences(kLoryInterleaved);
      input.in.mode = mode;
      const Tensor expected = numbers(slow_lory(*router, x_TD, kLoryInterleaved, kLorySegments, own));
      CHECK(relative_error(lory_mixtures(route(*router, input)), expected) < 1e-10);
      CHECK(relative_error(route(*router, input).scores.loss_TE, expected) < 1e-10);
    }
}

TEST_CASE("lory takes given segments, which need not be consecutive, and refuses falling ones") {
  const Tensor x_TD = random_tensor(2, {8, 4});
  const std::vector<int64_t> segment{7, 2, 7, 7, 2, 900, 1000000000000, 1000000000000};
  const auto router = lory_router({});
  RouteCase input = RouteCase(x_TD).sequences(kLoryInterleaved);
  input.in.segment_T = longs_of(segment);
  const Tensor expected_TE = numbers(slow_lory(*router, x_TD, kLoryInterleaved, segment, false));
  CHECK(relative_error(lory_mixtures(route(*router, input)), expected_TE) < 1e-10);
  input.in.segment_T[7] = 3;
  CHECK_THROWS_AS(route(*router, input), Error);
}

TEST_CASE("lory invariants (spec 3.8): identical experts equal the dense one; one-hot mixtures equal that expert") {
  const Tensor x_TD = random_tensor(2, {7, 4}).abs();
  const auto bank = testing::ffn_bank(4, 3, 5, "swiglu", true, at::kDouble);
  const auto router = lory_router(kLoryPaper);
  set_tensor(*router, "weight", at::zeros({3, 4}, at::kDouble));
  find_tensor(*router, "weight").detach()[1] = 1e4;
  CHECK(relative_error(execute(route(*router, RouteCase(x_TD)).plan, *bank, {.x_TD = x_TD}),
                       bank->forward_with(bank->parameters_of(1), x_TD)) < 1e-10);
  bank->clone_expert(0, 1), bank->clone_expert(0, 2);
  for (const LoryOptions& options : {LoryOptions{}, kLoryPaper})
    CHECK(relative_error(execute(route(*lory_router(options), RouteCase(x_TD)).plan, *bank, {.x_TD = x_TD}),
                         bank->forward_with(bank->parameters_of(0), x_TD)) < 1e-10);
}

TEST_CASE("lory invariants (spec 3.8): another segment n moves only the segments after it, and no other sequence") {
  const Tensor x_TD = random_tensor(2, {9, 4});
  const auto router = lory_router({});
  const auto mixtures = [&](const Tensor& rows) {
    return lory_mixtures(route(*router, RouteCase(rows).sequences({0, 0, 0, 0, 0, 1, 1, 1, 1})));
  };
  const Tensor before = mixtures(x_TD);
  for (int64_t t = 0; t < 9; ++t) {
    Tensor changed_TD = x_TD.clone();
    changed_TD[t] += 1;
    const Tensor moved_T = mixtures(changed_TD).ne(before).any(1);
    const int64_t end = t < 5 ? 5 : 9, first = t < 5 ? 0 : 5, next = first + ((t - first) / 2 + 1) * 2;
    for (int64_t s = 0; s < 9; ++s) CHECK(moved_T[s].item<bool>() == (s >= next && s < std::min(next + 2, end)));
  }
  // The mixture of a row never depends on its own segment; with own_stopgrad that of the first segment does.
  Tensor changed_TD = x_TD.clone();
  changed_TD[1] += 1;
  const auto paper = lory_router(kLoryPaper);
  CHECK_FALSE(lory_mixtures(route(*paper, RouteCase(changed_TD)))[0].equal(lory_mixtures(route(*paper, RouteCase(x_TD)))[0]));
}

TEST_CASE("lory's facts: causal by segments, not where the first segment reads itself or a prompt is read whole") {
  const auto causal_in = [](LoryOptions options, Mode mode) {
    return causality(lory_router(std::move(options))->facts(), {}, mode, 0).causal;
  };
  LoryOptions prompt{{"eval", word("prompt")}}, honest = kLoryPaper;
  honest["first_segment_eval"] = word("uniform");
  CHECK(causal_in({}, Mode::kTrain));
  CHECK(causal_in({}, Mode::kEval));
  CHECK_FALSE(causal_in(kLoryPaper, Mode::kTrain));
  CHECK_FALSE(causal_in(kLoryPaper, Mode::kEval));
  CHECK_FALSE(causal_in(honest, Mode::kTrain));
  CHECK(causal_in(honest, Mode::kEval));
  CHECK(causal_in(prompt, Mode::kTrain));
  CHECK_FALSE(causal_in(prompt, Mode::kEval));
  const auto after_prompt = [](LoryOptions options, Mode mode) {
    return causality(lory_router(std::move(options))->facts(), {}, mode, 0, /*prompt=*/3).causal;
  };
  CHECK(after_prompt(prompt, Mode::kEval));
  CHECK_FALSE(after_prompt(kLoryPaper, Mode::kEval));  // its first segment is no prompt
  CHECK_FALSE(after_prompt(prompt, Mode::kDecode));
  LoryOptions paper_prompt = kLoryPaper;
  paper_prompt["eval"] = word("prompt");
  CHECK(after_prompt(paper_prompt, Mode::kEval));
  CHECK_FALSE(after_prompt(paper_prompt, Mode::kTrain));
  CHECK(lory_router({})->facts().decodes);
  CHECK(lory_router(honest)->facts().decodes);
  CHECK_FALSE(lory_router(kLoryPaper)->facts().decodes);
  CHECK_FALSE(lory_router(prompt)->facts().decodes);
}

TEST_CASE("lory (spec 3.8): the output of the first segment gives R exactly no gradient; a later one does") {
  const Tensor x_TD = random_tensor(2, {6, 4});
  const auto bank = testing::ffn_bank(4, 3, 5, "gelu", true, at::kDouble);
  const auto gradient_of = [&](const Router& router, int64_t row) {
    find_tensor(router, "weight").mutable_grad() = Tensor();
    const Tensor y_TD = execute(route(router, RouteCase(x_TD).train()).plan, *bank, {.x_TD = x_TD});
    y_TD[row].square().sum().backward();
    const Tensor grad = find_tensor(router, "weight").grad();
    return grad.defined() ? grad.abs().max().item<double>() : 0.0;
  };
  for (const LoryOptions& options : {LoryOptions{}, kLoryPaper}) {
    const auto router = lory_router(options), single = lory_router(options, 256);
    CHECK((gradient_of(*router, 0) == 0 && gradient_of(*router, 1) == 0));
    CHECK(gradient_of(*router, 2) > 0);
    for (int64_t t = 0; t < 6; ++t) CHECK(gradient_of(*single, t) == 0);  // L < T_s: a single segment, so R learns nothing
  }
}

TEST_CASE("lory's gradients equal finite differences where nothing is stopped") {
  const auto router = lory_router({});
  const auto bank = testing::ffn_bank(4, 3, 5, "gelu", true, at::kDouble);
  RouteCase input = RouteCase(random_tensor(2, {8, 4}).requires_grad_(true)).sequences(kLoryInterleaved).train();
  const Tensor weight_TD = random_tensor(3, {8, 4});
  const auto value = [&] { return execute(route(*router, input).plan, *bank, {.x_TD = input.in.x_TD}).mul(weight_TD).sum(); };
  CHECK(gradient_error(value, input.in.x_TD) < 1e-7);
  CHECK(gradient_error(value, find_tensor(*router, "weight")) < 1e-7);
}

TEST_CASE("lory with eval = prompt mixes once per sequence, from the mean of all its rows; training goes by segments") {
  const Tensor x_TD = random_tensor(2, {8, 4});
  const auto router = lory_router({{"eval", word("prompt")}});
  const std::vector<int64_t> one_segment(8, 0);
  const RouteOutput out = route(*router, RouteCase(x_TD).sequences(kLoryInterleaved));
  CHECK(lory_plan(out).group_of_token_T.equal(longs_of(kLoryInterleaved)));
  CHECK(relative_error(lory_mixtures(out), numbers(slow_lory(*router, x_TD, kLoryInterleaved, one_segment, true))) < 1e-10);
  CHECK(relative_error(lory_mixtures(route(*router, RouteCase(x_TD).sequences(kLoryInterleaved).train())),
                       numbers(slow_lory(*router, x_TD, kLoryInterleaved, kLorySegments, false))) < 1e-10);
}

TEST_CASE("lory after a prompt of n tokens mixes once per sequence, from the mean of its first n rows, and reads no others") {
  const Tensor x_TD = random_tensor(2, {8, 4});
  const auto router = lory_router({{"eval", word("prompt")}});
  for (int64_t prompt = 1; prompt <= 6; ++prompt) {
    std::vector<int64_t> after, rows_before(2, 0);
    for (const int64_t sequence : kLoryInterleaved) after.push_back(rows_before[sequence]++ >= prompt);
    RouteCase input = RouteCase(x_TD).sequences(kLoryInterleaved);
    input.in.prompt = prompt;
    const RouteOutput out = route(*router, input);
    CHECK(lory_plan(out).group_of_token_T.equal(longs_of(kLoryInterleaved)));
    CHECK(relative_error(lory_mixtures(out), numbers(slow_lory(*router, x_TD, kLoryInterleaved, after, true))) < 1e-10);
    const Tensor unread_T1 = longs_of(after).unsqueeze(1);
    RouteCase changed = RouteCase(x_TD.add(unread_T1)).sequences(kLoryInterleaved);
    changed.in.prompt = prompt;
    CHECK(lory_mixtures(route(*router, changed)).equal(lory_mixtures(out)));
  }
  RouteCase training = RouteCase(x_TD).sequences(kLoryInterleaved).train();
  training.in.prompt = 2;
  CHECK(relative_error(lory_mixtures(route(*router, training)),
                       numbers(slow_lory(*router, x_TD, kLoryInterleaved, kLorySegments, false))) < 1e-10);
}

TEST_CASE("lory's decoding in any calls equals the full forward; eval = prompt keeps the mixture of the first call") {
  const Tensor x_TD = random_tensor(2, {9, 4});
  const auto router = lory_router({}, 3), prompt = lory_router({{"eval", word("prompt")}}, 3);
  const Tensor full_TE = lory_mixtures(route(*router, RouteCase(x_TD)));
  for (const std::vector<int64_t>& calls : {std::vector<int64_t>(9, 1), {5, 1, 1, 2}, {1, 8}, {3, 3, 3}, {9}}) {
    RouteState state, prompt_state;
    Tensor prompt_E;
    int64_t first = 0;
    for (const int64_t rows : calls) {
      const RouteCase input = lory_decoding(x_TD.narrow(0, first, rows), first);
      CHECK(relative_error(lory_mixtures(router->route(input.in, state)), full_TE.narrow(0, first, rows)) < 1e-10);
      const Tensor found_TE = lory_mixtures(prompt->route(input.in, prompt_state));
      if (first == 0) prompt_E = lory_mixtures(route(*prompt, RouteCase(x_TD.narrow(0, 0, rows))))[0];
      CHECK(relative_error(found_TE, prompt_E.expand_as(found_TE)) < 1e-10);
      first += rows;
    }
  }
}

TEST_CASE("a decoder with lory layers decodes token by token what its full forward gives") {
  const auto model = make_model({parse_config(R"(
[model]
layers = 2
width = 8
heads = 2
context = 11
dtype = "float64"
[moe]
experts = 3
[moe.router]
name = "lory"
segment_length = 3
)", "lory.toml"), {DataKind::kTokens, /*classes=*/7}, /*seed=*/1});
  {
    const at::NoGradGuard no_grad;
    for (const NamedTensor& entry : model->parameters()) entry.tensor.add_(random_tensor(4, entry.tensor.sizes()), 0.5);
  }
  Batch batch;
  batch.tokens_BL = at::arange(22, at::kLong).mul(5).remainder(7).view({2, 11});
  StepContext context;
  context.mode = Mode::kEval;
  context.seed = 1;
  const Tensor full_BLV = model->forward(batch, context).logits_BLV.detach();
  for (const std::vector<int64_t>& calls : {std::vector<int64_t>(11, 1), {4, 1, 1, 5}}) {
    DecodeState state;
    for (const int64_t length : calls) {
      const Tensor logits_BV = model->decode(batch.tokens_BL.narrow(1, state.position, length), state);
      CHECK(relative_error(logits_BV, full_BLV.select(1, state.position - 1)) < 1e-10);
    }
  }
}

TEST_CASE("lory's warm-up puts all weight on expert 0 in every mode, until the step that copies it") {
  auto router = lory_router({{"warmup_steps", int64_t{3}}}, 2, 3, 5);
  const Tensor x_TD = random_tensor(2, {6, 4});
  const auto is_dense = [&](RouteCase input) {
    const Tensor one_hot_E = at::tensor({1.0, 0.0, 0.0, 0.0, 0.0}, at::kDouble);
    return at::equal(lory_mixtures(route(*router, input)), one_hot_E.expand({6, 5}));
  };
  CHECK(router->facts().stateful);
  for (int64_t step = 0; step < 3; ++step) {
    CHECK((is_dense(RouteCase(x_TD)) && is_dense(RouteCase(x_TD).train()) && is_dense(lory_decoding(x_TD, 0))));
    const std::vector<Event> events = router->end_step({}, step);
    if (step < 2) CHECK(events.empty());
    if (step < 2) continue;
    REQUIRE(events.size() == 3);  // experts 3 and 4 are not there yet
    CHECK(events[0].kind == Event::Kind::kStageChanged);
    for (int64_t e : {1, 2}) {
      CHECK(events[e].kind == Event::Kind::kExpertAdded);
      CHECK((events[e].expert == e && events[e].source == 0 && events[e].with_moments));
    }
  }
  CHECK_FALSE(is_dense(RouteCase(x_TD)));
  CHECK(find_tensor(*router, "dense").item<double>() == 0);
  CHECK(router->end_step({}, 3).empty());
  CHECK(lory_mixtures(route(*router, RouteCase(x_TD))).slice(1, 3).eq(0).all().item<bool>());
}

TEST_CASE("lory mixes the first segment over the experts that are there; it takes no rows and refuses what is not finite") {
  const Tensor x_TD = random_tensor(2, {3, 4});
  const Tensor first_TE = lory_mixtures(route(*lory_router({}, 2, 3, 4), RouteCase(x_TD)));
  CHECK(relative_error(first_TE.slice(0, 0, 2), numbers({{1. / 3, 1. / 3, 1. / 3, 0}}).expand({2, 4})) < 1e-12);
  CHECK(first_TE[2][3].item<double>() == 0);
  const RouteOutput none = route(*lory_router({}), RouteCase(at::zeros({0, 4}, at::kDouble)));
  CHECK(lory_plan(none).alpha_GE.sizes() == at::IntArrayRef({0, 3}));
  CHECK(lory_mixtures(route(*lory_router({}, 2, 1), RouteCase(x_TD))).eq(1).all().item<bool>());
  Tensor bad_TD = x_TD.clone();
  bad_TD[2][1] = NAN;  // no mixture reads the last row
  CHECK_THROWS_AS(route(*lory_router({}), RouteCase(bad_TD)), Error);
  CHECK_THROWS_AS(build_router({.name = "lory", .noise = {.kind = NoiseSpec::Kind::kJitter}}), Error);
}
