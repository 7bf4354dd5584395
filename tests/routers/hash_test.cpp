#include "tests/routers/oracle.h"

#include "core/config.h"
#include "core/error.h"
#include "core/execute.h"
#include "core/moe_layer.h"
#include "experiments/experiment.h"

using namespace moelab;

namespace {

std::unique_ptr<Router> hash_router(const char* kind, int64_t experts, int64_t vocabulary, int64_t k = 1, int64_t seed = 0) {
  return build_router({.name = "hash", .experts = experts,
                       .options = {{"kind", word(kind)}, {"vocabulary", vocabulary}, {"k", k}}, .seed = seed});
}

RouteCase token_case(const std::vector<int64_t>& tokens) {
  RouteCase input(random_tensor(1, {static_cast<int64_t>(tokens.size()), 4}));
  input.in.token_ids_T = longs_of(tokens);
  return input;
}

std::vector<int64_t> listed(const Tensor& longs) {
  const Tensor flat = longs.reshape({-1}).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

std::vector<int64_t> table_of(const Router& router) { return listed(find_tensor(router, "table")); }
std::vector<int64_t> experts_of(const Router& router, const RouteCase& input) {
  return listed(route(router, input).assignment.choice_TK);
}

std::vector<int64_t> loads_of(const std::vector<int64_t>& table, const std::vector<int64_t>& counts, int64_t experts) {
  std::vector<int64_t> load(experts, 0);
  for (size_t v = 0; v < table.size(); ++v) load[table[v]] += counts[v];
  return load;
}

std::string hash_complaint(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

const std::vector<int64_t> kHashTokens{5, 2, 2, 7, 0, 5, 1, 7, 2, 6};
const std::vector<int64_t> kHashSequences{0, 1, 0, 0, 1, 1, 0, 1, 1, 0};  // interleaved

// Plain loop: the line that each row reads, `step` -1 for the token before it and 1 for the one after.
std::vector<int64_t> neighbours(int64_t step) {
  const auto rows = static_cast<int64_t>(kHashTokens.size());
  std::vector<int64_t> found;
  for (int64_t t = 0; t < rows; ++t) {
    int64_t other = t + step;
    while (other >= 0 && other < rows && kHashSequences[other] != kHashSequences[t]) other += step;
    found.push_back(other >= 0 && other < rows ? kHashTokens[other] : 0);
  }
  return found;
}

std::vector<int64_t> looked_up(const std::vector<int64_t>& table, const std::vector<int64_t>& lines) {
  std::vector<int64_t> experts;
  for (const int64_t line : lines) experts.push_back(table[line]);
  return experts;
}

}  // namespace

TEST_CASE("hash oracle (spec 3.4): counts 10 6 5 4 3 2 over two experts give loads 16 and 14") {
  const auto router = hash_router("balanced", 2, 6);
  router->prepare({longs_of({10, 6, 5, 4, 3, 2})});
  CHECK(table_of(*router) == std::vector<int64_t>{0, 1, 1, 0, 1, 0});
  CHECK(loads_of(table_of(*router), {10, 6, 5, 4, 3, 2}, 2) == std::vector<int64_t>{16, 14});
}

TEST_CASE("hash oracle (spec 3.4): one token above the mean bounds the balance: loads 100, 35, 35, max/mean 1.765") {
  const std::vector<int64_t> counts{100, 30, 20, 10, 5, 5};
  const auto router = hash_router("balanced", 3, 6);
  router->prepare({longs_of(counts)});
  std::vector<int64_t> load = loads_of(table_of(*router), counts, 3);
  CHECK(load == std::vector<int64_t>{100, 35, 35});
  CHECK(std::abs(load[0] / (170.0 / 3) - 1.765) < 5e-4);
}

TEST_CASE("before the counts are known, and for tokens that never occur, balanced deals round robin") {
  const auto router = hash_router("balanced", 3, 7);
  CHECK(table_of(*router) == std::vector<int64_t>{0, 1, 2, 0, 1, 2, 0});
  router->prepare({longs_of({0, 9, 0, 0, 4, 0})});  // a vocabulary with room: token 6 is not in the data
  CHECK(table_of(*router) == std::vector<int64_t>{0, 0, 1, 2, 1, 0, 1});
  CHECK(table_of(*hash_router("balanced", 4, 3, 3)) == std::vector<int64_t>{0, 1, 2, 3, 0, 1, 2, 3, 0});
}

TEST_CASE("balanced with two experts per token takes the two with the least count, and they differ") {
  const auto router = hash_router("balanced", 3, 4, 2);
  router->prepare({longs_of({8, 5, 4, 1})});
  // 8 → 0,1 (8 8 0);  5 → 2,0 (13 8 5);  4 → 2,1 (13 12 9);  1 → 2,1
  CHECK(table_of(*router) == std::vector<int64_t>{0, 1, 2, 0, 2, 1, 2, 1});
  const RouteOutput out = route(*router, token_case({1, 3}));
  CHECK(out.assignment.choice_TK.equal(longs_of({2, 0, 2, 1}).view({2, 2})));
}

TEST_CASE("a table's tokens have the expert of the table, gate 1, whatever weights, step, context or position (spec 3.4)") {
  const auto router = hash_router("random", 5, 8);
  const std::vector<int64_t> table = table_of(*router);
  RouteCase input = token_case(kHashTokens).sequences(kHashSequences);
  const RouteOutput out = route(*router, input);
  CHECK(listed(out.assignment.choice_TK) == looked_up(table, kHashTokens));
  CHECK(out.gate_TK.equal(at::ones({10, 1}, at::kDouble)));
  CHECK(sparse(out).gate_N.equal(at::ones({10}, at::kDouble)));
  input.in.step = 1000;
  input.in.x_TD = random_tensor(9, {10, 4});
  input.in.position_T = input.in.position_T.add(3);
  CHECK(experts_of(*router, input.train().seed(4)) == looked_up(table, kHashTokens));
  CHECK(router->parameters().empty());
  CHECK_FALSE(out.scores.loss_TE.defined());
}

TEST_CASE("equal tokens go to equal experts in two layers iff their tables are equal (spec 3.4)") {
  const auto one = hash_router("random", 8, 50, 1, 1), other = hash_router("random", 8, 50, 1, 2);
  const RouteCase input = token_case({3, 40, 17, 3, 8, 9, 21});
  CHECK(experts_of(*one, input) != experts_of(*other, input));
  set_tensor(*other, "table", find_tensor(*one, "table"));
  CHECK(experts_of(*one, input) == experts_of(*other, input));
}

TEST_CASE("random tables are uniform, and several experts of a token differ") {
  const std::vector<int64_t> table = table_of(*hash_router("random", 8, 8000));
  for (const int64_t load : loads_of(table, std::vector<int64_t>(8000, 1), 8)) CHECK(std::abs(load - 1000) < 150);  // 5 σ
  const Tensor pairs_VK = find_tensor(*hash_router("random", 4, 3000, 3), "table");
  CHECK(std::get<0>(pairs_VK.sort(1)).diff(1, 1).gt(0).all().item<bool>());
  for (int64_t e = 0; e < 4; ++e)
    for (int64_t j = 0; j < 3; ++j) CHECK(std::abs(pairs_VK.select(1, j).eq(e).sum().item<int64_t>() - 750) < 120);
}

TEST_CASE("previous and future read the neighbour in the sequence, token 0 where there is none (spec 3.4)") {
  const RouteCase input = token_case(kHashTokens).sequences(kHashSequences);
  for (const auto& [kind, step] : {std::pair{"previous", -1}, std::pair{"future", 1}}) {
    INFO(kind);
    const auto router = hash_router(kind, 8, 8);
    CHECK(experts_of(*router, input) == looked_up(table_of(*router), neighbours(step)));
  }
}

TEST_CASE("position reads the line of its position, round the table, and needs no tokens") {
  const auto router = hash_router("position", 8, 3);
  RouteCase input(random_tensor(1, {10, 4}));
  const std::vector<int64_t> positions{0, 0, 1, 2, 1, 2, 3, 3, 4, 4};
  std::vector<int64_t> lines;
  for (const int64_t p : positions) lines.push_back(p % 3);
  CHECK(experts_of(*router, input.sequences(kHashSequences)) == looked_up(table_of(*router), lines));
  CHECK_FALSE(router->facts().needs_token_ids);
}

TEST_CASE("bigram depends on the token and the one before it, in this order, and on nothing else") {
  const auto router = hash_router("bigram", 64, 200);
  const auto expert = [&](const std::vector<int64_t>& tokens) { return experts_of(*router, token_case(tokens)).back(); };
  CHECK(expert({9, 8, 3, 4}) == expert({7, 3, 4}));
  int64_t by_before = 0, by_order = 0;
  for (int64_t v = 1; v < 100; ++v) {
    by_before += expert({v, 4}) != expert({v + 100, 4});
    by_order += expert({v, v + 100}) != expert({v + 100, v});
  }
  CHECK(by_before > 85);  // of 99; two random experts of 64 differ but for 1.5
  CHECK(by_order > 85);
  CHECK(expert({0, 4}) == expert({4}));  // token 0 stands before the first
}

TEST_CASE("a checkpoint's table means the same in a run with another seed, for every kind") {
  for (const char* kind : {"balanced", "random", "bigram", "previous", "position", "future", "multi"}) {
    INFO(kind);
    const auto one = hash_router(kind, 6, 9, 2, 1), other = hash_router(kind, 6, 9, 2, 2);
    set_tensor(*other, "table", find_tensor(*one, "table"));
    const RouteCase input = token_case(kHashTokens).sequences(kHashSequences);
    CHECK(experts_of(*one, input) == experts_of(*other, input));
  }
}

TEST_CASE("decoding in pieces finds the token before: previous and bigram as in the full forward") {
  for (const char* kind : {"previous", "bigram", "balanced"}) {
    INFO(kind);
    const auto router = hash_router(kind, 8, 8);
    const std::vector<int64_t> expected = experts_of(*router, token_case(kHashTokens));
    RouteState state;
    std::vector<int64_t> found;
    for (const auto& [from, to] : {std::pair{0, 4}, std::pair{4, 5}, std::pair{5, 5}, std::pair{5, 10}}) {
      RouteCase piece = token_case({kHashTokens.begin() + from, kHashTokens.begin() + to});
      piece.in.mode = Mode::kDecode;
      piece.in.position_T = piece.in.position_T.add(from);
      RouteState fork = state;
      for (const int64_t expert : listed(router->route(piece.in, state).assignment.choice_TK)) found.push_back(expert);
      router->route(piece.in, fork);  // a copy of the state goes its own way
    }
    CHECK(found == expected);
  }
}

TEST_CASE("multi: hash j chooses within its own share of the experts (spec 3.4)") {
  const Tensor table_VK = find_tensor(*hash_router("multi", 8, 400, 2), "table");
  for (int64_t j = 0; j < 2; ++j) {
    std::vector<int64_t> load = loads_of(listed(table_VK.select(1, j)), std::vector<int64_t>(400, 1), 8);
    for (int64_t e = 0; e < 8; ++e) CHECK((load[e] > 0) == (e / 4 == j));
  }
  CHECK(find_tensor(*hash_router("multi", 5, 100, 2), "table").select(1, 0).max().item<int64_t>() == 1);  // shares of 2 and 3
}

TEST_CASE("multi: the sum of k narrow experts is the wide layer made of the slices that the hashes choose (spec 3.4)") {
  const auto router = hash_router("multi", 6, 8, 3);
  const ExpertEntry& ffn = Registry<ExpertEntry>::instance().find("ffn");
  Options options(ffn.options);
  for (const OptionSpec& spec : ffn.options) {
    if (spec.name == "width") options.set(spec, int64_t{5});
    if (spec.name == "bias") options.set(spec, false);
    if (spec.name == "activation") options.set(spec, word("relu"));
  }
  const auto bank = make_experts("ffn", {4, 6, at::kDouble, random_key(3, "experts"), 1, options});
  const RouteCase input = token_case(kHashTokens);
  const RouteOutput out = route(*router, input);
  const Tensor y_TD = execute(out.plan, *bank, {input.in.x_TD, input.in.sequence_T, {}, nullptr, false}, Execution::kAuto);
  const Tensor w_in = find_tensor(*bank, "w_in"), w_out = find_tensor(*bank, "w_out");
  for (int64_t t = 0; t < 10; ++t) {
    const Tensor slices = find_tensor(*router, "table")[kHashTokens[t]];
    const Tensor wide_in = w_in.index_select(0, slices).reshape({15, 4});
    const Tensor wide_out = w_out.index_select(0, slices).permute({1, 0, 2}).reshape({4, 15});
    CHECK(relative_error(y_TD[t], wide_out.matmul(wide_in.matmul(input.in.x_TD[t]).relu())) < 1e-12);
  }
}

TEST_CASE("hash's facts follow its kind: future looks ahead and cannot decode") {
  for (const char* kind : {"balanced", "random", "bigram", "previous", "position", "multi"}) {
    const RouterFacts facts = hash_router(kind, 4, 8)->facts();
    CHECK((!facts.looks_ahead && facts.decodes && !facts.learned && !facts.stateful));
    CHECK(causality(facts, {}, Mode::kEval, 1).causal);
  }
  const RouterFacts future = hash_router("future", 4, 8)->facts();
  CHECK((future.looks_ahead && !future.decodes));
  CHECK_FALSE(causality(future, {}, Mode::kTrain, 1).causal);
}

TEST_CASE("hash works without rows, with one expert, with k = E, and keeps out of the room to grow") {
  for (const char* kind : {"balanced", "random", "bigram", "previous", "position", "future", "multi"}) {
    INFO(kind);
    CHECK(route(*hash_router(kind, 4, 8), token_case({})).assignment.choice_TK.numel() == 0);
    CHECK(experts_of(*hash_router(kind, 1, 8), token_case({7, 1})) == std::vector<int64_t>{0, 0});
    std::vector<int64_t> all = experts_of(*hash_router(kind, 3, 8, 3), token_case({5}));
    std::sort(all.begin(), all.end());
    CHECK(all == std::vector<int64_t>{0, 1, 2});
  }
  const auto roomy = build_router({.name = "hash", .experts = 2, .max_experts = 40, .options = {{"vocabulary", int64_t{40}}}});
  CHECK(find_tensor(*roomy, "table").max().item<int64_t>() == 1);
  CHECK(roomy->per_expert_tensors().empty());  // 40 lines are not 40 experts
}

TEST_CASE("hash: a capacity serves rows in their order, and a replay repeats the selection") {
  const CapacityPolicy two{.mode = CapacityPolicy::Mode::kAbsolute, .value = 2};
  const auto router = build_router({.name = "hash", .experts = 3, .options = {{"vocabulary", int64_t{8}}}, .capacity = two});
  const RouteCase input = token_case({0, 3, 6, 1, 0});  // experts 0 0 0 1 0
  const RouteOutput out = route(*router, input);
  CHECK(sparse(out).token_N.equal(longs_of({0, 1, 3})));
  CHECK(sparse(out).dropped_token_M.equal(longs_of({2, 4})));
  set_tensor(*router, "table", at::zeros({8}, at::kLong));
  CHECK(sparse(route(*router, RouteCase(input).force(out.assignment))).token_N.equal(longs_of({0, 1, 3})));
}

TEST_CASE("hash names the token, expert or number that does not fit") {
  const auto router = hash_router("balanced", 4, 8);
  CHECK(hash_complaint([&] {
          route(*router, token_case({1, 8}));
        }) == "token 8 has no line in the table of router 'hash', which has 8");
  CHECK(hash_complaint([&] { route(*router, token_case({-2, 1})); }).starts_with("token -2 has no line"));
  CHECK(hash_complaint([&] {
          route(*router, RouteCase(random_tensor(1, {2, 4})));
        }).find("needs token ids") != std::string::npos);
  CHECK(hash_complaint([&] { router->prepare({at::ones({9}, at::kLong)}); }) ==
        "[moe.router] vocabulary = 8, but the data have 9 tokens");
  set_tensor(*router, "table", at::full({8}, 4, at::kLong));
  CHECK(hash_complaint([&] { route(*router, token_case({1})); }) == "the table of router 'hash' names expert 4, but there are 4");
  const auto pairs = hash_router("random", 4, 8, 2);
  set_tensor(*pairs, "table", at::ones({8, 2}, at::kLong));
  CHECK(hash_complaint([&] { route(*pairs, token_case({1})); }).find("twice") != std::string::npos);
  CHECK(hash_complaint([] { hash_router("balanced", 4, 0); }).find("vocabulary") != std::string::npos);
  CHECK(hash_complaint([] { hash_router("multi", 4, 8, 5); }).find("k = 5 is more than experts = 4") != std::string::npos);
}

TEST_CASE("`vocabulary` stands in where no model has one; without either the config is refused (contract 4)") {
  const auto layer = [](const std::string& line, int64_t model) {
    return read_layer(parse_config("[moe.router]\nname = \"hash\"\n" + line, "hash.toml"), 4, 0, model, at::kDouble,
                      random_key(0, "init"));
  };
  CHECK(layer("vocabulary = 12", 0).router_spec.vocabulary == 12);
  CHECK(layer("", 9).router_spec.vocabulary == 9);
  CHECK(layer("vocabulary = 12", 9).router_spec.vocabulary == 12);
  CHECK(hash_complaint([&] { layer("", 0); }).find("needs token ids") != std::string::npos);
  CHECK(hash_complaint([&] { layer("vocabulary = 8", 9); }) == "hash.toml:3:1: vocabulary = 8 is less than the model's 9");
}

TEST_CASE("a run balances the table by the counts of its training split, and the table is part of the model's state") {
  const Experiment run = load_experiment(parse_config(R"(
[model]
layers = 1
width = 8
heads = 2
context = 8
[moe]
experts = 3
[moe.router]
name = "hash"
[data]
name = "markov"
validation_documents = 2
)", "hash.toml"));
  std::vector<int64_t> counts = listed(run.data->token_counts_V());
  std::vector<int64_t> expected(counts.size()), load(3, 0), order(counts.size());
  for (size_t v = 0; v < counts.size(); ++v) order[v] = static_cast<int64_t>(v);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return counts[a] > counts[b]; });
  for (const int64_t v : order) {
    expected[v] = std::min_element(load.begin(), load.end()) - load.begin();
    load[expected[v]] += counts[v];
  }
  const auto buffers = run.model->buffers();
  REQUIRE(buffers.size() == 1);
  CHECK(buffers[0].name == "layers.0.moe.router.table");
  CHECK(listed(buffers[0].tensor) == expected);
}
