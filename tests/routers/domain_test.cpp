#include "tests/routers/oracle.h"

#include "core/error.h"
#include "experiments/experiment.h"
#include "tests/data/data_support.h"

#include <ATen/core/grad_mode.h>

using namespace moelab;

namespace {

RouteCase label_case(const std::vector<int64_t>& labels) {
  RouteCase input(random_tensor(1, {static_cast<int64_t>(labels.size()), 4}));
  input.in.domain_T = longs_of(labels);
  return input;
}

std::unique_ptr<Router> learned_router(int64_t experts, int64_t k, int64_t domains, int64_t max_experts = 0) {
  return build_router({.name = "domain", .experts = experts, .max_experts = max_experts,
                       .options = {{"hard", false}, {"k", k}, {"domains", domains}}});
}

std::string domain_complaint(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
  return "no error";
}

Experiment domain_run(const std::string& router, const std::string& data) {
  return load_experiment(
      parse_config("[model]\nlayers = 1\nwidth = 8\nheads = 2\ncontext = 8\n[moe]\nexperts = 4\n[moe.router]\n" +
                       ("name = \"domain\"\n" + router) + "\n[data]\n" + data,
                   "domain.toml"));
}

}  // namespace

TEST_CASE("a hard choice is the label, gate 1; more labels than experts share them in turn") {
  const RouteOutput out = route(*build_router({.name = "domain", .experts = 3}), label_case({2, 0, 1, 3, 7, 2}));
  CHECK(out.assignment.choice_TK.equal(longs_of({2, 0, 1, 0, 1, 2}).view({6, 1})));
  CHECK(sparse(out).gate_N.equal(at::ones({6}, at::kDouble)));
  CHECK_FALSE(out.scores.loss_TE.defined());
}

TEST_CASE("a hard choice of k gives each label k experts of its own while there are enough") {
  const auto router = build_router({.name = "domain", .experts = 6, .options = {{"k", int64_t{2}}}});
  const RouteOutput out = route(*router, label_case({0, 1, 2, 3}));
  CHECK(out.assignment.choice_TK.equal(longs_of({0, 1, 2, 3, 4, 5, 0, 1}).view({4, 2})));
  CHECK(out.gate_TK.equal(at::full({4, 2}, 0.5, at::kDouble)));
}

TEST_CASE("the choice depends on the label alone: not on x, the mode, the step or the other rows") {
  for (const bool hard : {true, false}) {
    const auto router = build_router({.name = "domain", .options = {{"hard", hard}}});
    RouteCase input = label_case({5, 1, 0, 5});
    const RouteOutput first = route(*router, input);
    input.in.x_TD = random_tensor(8, {4, 4});
    input.in.step = 40;
    CHECK(sparse(route(*router, input.train().seed(3))).gate_N.equal(sparse(first).gate_N));
    CHECK(first.assignment.choice_TK[0].equal(first.assignment.choice_TK[3]));
    CHECK(route(*router, label_case({1})).assignment.choice_TK[0].equal(first.assignment.choice_TK[1]));
  }
}

TEST_CASE("learned: the softmax of the label's line, the k largest, by plain loops (contract 4: weight [domains,E])") {
  const auto router = learned_router(5, 2, 3);
  const Tensor weight_RE = random_tensor(2, {3, 5});
  set_tensor(*router, "weight", weight_RE);
  const std::vector<int64_t> labels{2, 0, 2, 1};
  const RouteOutput out = route(*router, label_case(labels));
  for (size_t t = 0; t < labels.size(); ++t) {
    std::vector<double> z(5);
    for (int64_t e = 0; e < 5; ++e) z[e] = weight_RE[labels[t]][e].item<double>();
    for (int64_t rank = 0; rank < 2; ++rank) {
      const int64_t expert = slow_argmax(z, rank);
      CHECK(out.assignment.choice_TK[t][rank].item<int64_t>() == expert);
      CHECK(std::abs(out.gate_TK[t][rank].item<double>() - slow_softmax(z)[expert]) < 1e-14);
    }
  }
}

TEST_CASE("learned: gradients equal finite differences; a label that is not there gets a gradient of zero") {
  const auto router = learned_router(4, 2, 3);
  set_tensor(*router, "weight", random_tensor(2, {3, 4}));
  RouteCase input = label_case({2, 0, 2, 2});
  const Assignment selection = route(*router, input).assignment;
  input.force(selection);
  const Tensor weight_RE = find_tensor(*router, "weight");
  CHECK(gradient_error([&] { return routing_objective(*router, input); }, weight_RE) < 1e-7);
  CHECK(weight_RE.grad()[1].abs().max().item<double>() == 0);
}

TEST_CASE("a hard choice has an expert for every label, unless `domains` bounds them") {
  const auto router = build_router({.name = "domain", .experts = 4});
  CHECK(route(*router, label_case({3, 12, 1000001})).assignment.choice_TK.equal(longs_of({3, 0, 1}).view({3, 1})));
}

TEST_CASE("domain without rows, with one expert, ties, and room to grow") {
  for (const bool hard : {true, false}) {
    INFO(hard);
    CHECK(route(*build_router({.name = "domain", .options = {{"hard", hard}}}), label_case({})).assignment.choice_TK.numel() ==
          0);
    CHECK(sparse(route(*build_router({.name = "domain", .experts = 1, .options = {{"hard", hard}}}), label_case({7, 1})))
              .token_N.numel() == 2);
    const auto roomy = build_router({.name = "domain", .experts = 2, .max_experts = 8, .options = {{"hard", hard}}});
    if (!hard) set_tensor(*roomy, "weight", random_tensor(2, {8, 8}) * 9);
    const RouteOutput out = route(*roomy, label_case({0, 1, 2, 3, 4, 5, 6, 7}));
    CHECK(out.assignment.choice_TK.max().item<int64_t>() == 1);
    CHECK(roomy->active_experts_E().sum().item<int64_t>() == 2);
    if (!hard) CHECK(out.scores.loss_TE.slice(1, 2).abs().max().item<double>() == 0);
  }
  const auto tied = learned_router(4, 2, 3);
  set_tensor(*tied, "weight", at::zeros({3, 4}, at::kDouble));
  CHECK(route(*tied, label_case({2})).assignment.choice_TK.equal(longs_of({0, 1}).view({1, 2})));
}

TEST_CASE("a learned router's experts are the columns of its weight") {
  const auto router = learned_router(4, 1, 4);
  const std::vector<Tensor> rows = router->per_expert_tensors();
  REQUIRE(rows.size() == 1);
  {
    const at::NoGradGuard no_grad;
    rows[0].select(0, 2).fill_(5);
  }
  CHECK(find_tensor(*router, "weight").select(1, 2).equal(at::full({4}, 5, at::kDouble)));
}

TEST_CASE("domain's facts: hard learns nothing and has no scores, learned has both") {
  const RouterFacts hard = build_router({.name = "domain"})->facts(), learned = learned_router(4, 1, 2)->facts();
  CHECK((hard.needs_domain && !hard.learned && !hard.has_scores && !hard.differentiable_gate));
  CHECK((learned.needs_domain && learned.learned && learned.has_scores && learned.differentiable_gate));
}

TEST_CASE("a label outside the declared ones is named, and so are missing labels") {
  const auto router = build_router({.name = "domain", .options = {{"domains", int64_t{3}}}});
  CHECK(domain_complaint([&] { route(*router, label_case({0, 3})); }) ==
        "domain label 3 is outside 0 … 2; [moe.router] domains says how many there are");
  CHECK(domain_complaint([&] { route(*router, label_case({0, -1})); }).starts_with("domain label -1 is outside"));
  CHECK(domain_complaint([&] {
          route(*router, RouteCase(random_tensor(1, {2, 4})));
        }).find("needs domain labels") != std::string::npos);
}

TEST_CASE("an experiment whose data have no labels, or more than there are lines, is refused before it trains") {
  const std::string markov = "name = \"markov\"\nvalidation_documents = 2\nsources = 5";
  CHECK(domain_run("domains = 5", markov).model->sites().size() == 1);
  CHECK(domain_complaint([&] { domain_run("domains = 4", markov); }) == "domain.toml:10:1: domains = 4, but the data have 5");
  const ScratchFolder folder = data_tests::scratch();
  data_tests::write_text(folder.path() + "/a.txt", std::string(4000, 'a'));
  const std::string bytes = "name = \"bytes\"\npath = \"" + folder.path() + "\"";
  const std::string message = domain_complaint([&] { domain_run("", bytes); });
  CHECK(message == "domain.toml:9:1: router 'domain' needs domain labels, which these data do not have");
}
