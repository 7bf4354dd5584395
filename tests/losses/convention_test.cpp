// Same name, different maths: the rows of routers.md 1.3, their values at perfect balance and at collapse.
#include "tests/losses/plain_losses.h"

#include "core/config.h"
#include "core/error.h"
#include "core/moe_layer.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_floating_point.hpp>

using namespace moelab;
using namespace moelab::test;
using Catch::Matchers::WithinAbs;
using Catch::Matchers::WithinRel;

namespace {

// Row t chooses t, t+1, … (mod E) with gate 1/k, probabilities uniform: every expert gets the same.
RouteOutput balanced_decision(int64_t experts, int64_t k) {
  Choices choices(experts, std::vector<int64_t>(k));
  for (int64_t t = 0; t < experts; ++t)
    for (int64_t j = 0; j < k; ++j) choices[t][j] = (t + j) % experts;
  Scores scores;
  scores.loss_TE = tensor_of(Rows(experts, std::vector<double>(experts, 1.0 / experts)));
  scores.clean_TE = scores.noisy_TE = scores.loss_TE.mul(0);
  return decision_of(choices_of(choices), tensor_of(Rows(experts, std::vector<double>(k, 1.0 / k))), scores);
}

// Every row chooses experts 0 … k-1 with gate and probability 1/k.
RouteOutput collapsed_decision(int64_t experts, int64_t k) {
  std::vector<double> row(experts);
  std::vector<int64_t> choice(k);
  for (int64_t j = 0; j < k; ++j) row[j] = 1.0 / k, choice[j] = j;
  Scores scores;
  scores.loss_TE = tensor_of(Rows(experts, row));
  scores.clean_TE = scores.noisy_TE = scores.loss_TE.log();
  return decision_of(choices_of(Choices(experts, choice)), tensor_of(Rows(experts, std::vector<double>(k, 1.0 / k))), scores);
}

struct Convention {
  std::string name;
  std::vector<Setting> settings;
};

const std::vector<Convention> kConventions = {
    {"balance", {}},
    {"balance", {{"counts", std::string("any_choice")}}},
    {"balance", {{"counts", std::string("any_choice")}, {"divide_by_k", true}}},
    {"balance", {{"counts", std::string("any_choice")}, {"layers", std::string("pooled")}}},
    {"balance", {{"probabilities", std::string("noisy")}}},
    {"importance", {}},
    {"importance", {{"of", std::string("probabilities")}}},
    {"importance", {{"variance", std::string("sample")}}},
    {"load", {}},
    {"load", {{"threshold", std::string("include_self")}, {"variance", std::string("sample")}}},
    {"z", {}},
    {"entropy", {}},
};

RouterEntry entry_with(const std::string& loss, std::map<std::string, OptionValue> options) {
  RouterEntry entry;
  entry.paper_losses = {{loss, 0.1, std::move(options)}};
  return entry;
}

}  // namespace

TEST_CASE("Every loss takes its landmark values at perfect balance and at collapse, for every E and k") {
  for (const Convention& convention : kConventions)
    for (const int64_t experts : {1, 2, 8})
      for (const int64_t k : {1, 2, 8}) {
        if (k > experts) continue;
        CAPTURE(convention.name, convention.settings.size(), experts, k);
        const auto loss = make_loss(convention.name, convention.settings);
        const Landmarks marks = loss->landmarks(experts, k);
        const RouteInput in = input_of(experts);
        const double balance = value_of(*loss, in, balanced_decision(experts, k), experts).item<double>();
        const double collapse = value_of(*loss, in, collapsed_decision(experts, k), experts).item<double>();
        CHECK_THAT(balance, WithinAbs(marks.balance, 1e-12));
        if (convention.name == "z") CHECK(std::isnan(marks.collapse));
        else CHECK_THAT(collapse, WithinAbs(marks.collapse, 1e-12));
      }
}

// A decision laid out over `room` more experts that are not there: probability 0.
RouteOutput with_room(RouteOutput out, int64_t room) {
  const auto widened = [&](const Tensor& rows_TE, double fill) {
    return at::cat({rows_TE, at::full({rows_TE.size(0), room}, fill, at::kDouble)}, 1);
  };
  out.scores.loss_TE = widened(out.scores.loss_TE, 0);
  out.scores.clean_TE = widened(out.scores.clean_TE, -1e9);
  out.scores.noisy_TE = out.scores.clean_TE;
  return out;
}

TEST_CASE("With room to grow, landmarks say the values that losses over max_experts take") {
  for (const Convention& convention : kConventions)
    for (const int64_t k : {1, 2, 5}) {
      CAPTURE(convention.name, convention.settings.size(), k);
      const auto loss = make_loss(convention.name, convention.settings);
      const Landmarks marks = loss->landmarks_among(5, 8, k);
      const RouteInput in = input_of(5);
      const double balance = value_of(*loss, in, with_room(balanced_decision(5, k), 3), 8).item<double>();
      const double collapse = value_of(*loss, in, with_room(collapsed_decision(5, k), 3), 8).item<double>();
      CHECK_THAT(balance, WithinAbs(marks.balance, 1e-12));
      if (convention.name != "z") CHECK_THAT(collapse, WithinAbs(marks.collapse, 1e-12));
    }
  CHECK(make_loss("balance")->landmarks_among(5, 8, 1).balance == 8.0 / 5);
}

TEST_CASE("1.3 Switch and GShard count first choices: 1 at balance, E at top-1 collapse") {
  const Landmarks marks = make_loss("balance")->landmarks(8, 1);
  CHECK(marks.balance == 1);
  CHECK(marks.collapse == 8);
}

TEST_CASE("1.3 flaxformer counts any of the k choices: k at balance, E at collapse") {
  const Landmarks marks = make_loss("balance", {{"counts", std::string("any_choice")}})->landmarks(8, 2);
  CHECK(marks.balance == 2);
  CHECK(marks.collapse == 8);
}

TEST_CASE("1.3 Megatron and DeepSpeed top-k divide by k: E/(k·T²)·Σ count·Σp, 1 at balance") {
  const Rows logits = {{2, 1, 0}, {1.5, 1.4, -1}, {.2, .1, 0}, {3, -1, 2}};
  const std::vector<double> counts = {4, 3, 1}, mass = plain_column_sums(plain_softmax(logits));
  double megatron = 0;
  for (size_t e = 0; e < 3; ++e) megatron += 3.0 / (2 * 4 * 4) * counts[e] * mass[e];
  const auto loss = make_loss("balance", {{"counts", std::string("any_choice")}, {"divide_by_k", true}});
  const RouteOutput out = noisy_topk_decision(tensor_of(logits), {}, {}, 2);
  CHECK_THAT(value_of(*loss, input_of(4), out, 3).item<double>(), WithinRel(megatron, 1e-12));
  CHECK(loss->landmarks(8, 2).balance == 1);
}

TEST_CASE("1.3 Mixtral-style code pools all layers before f·P is formed: k at balance") {
  const auto loss = make_loss("balance", {{"counts", std::string("any_choice")}, {"layers", std::string("pooled")}});
  REQUIRE(loss->pooled_over_layers());
  CHECK_FALSE(make_loss("balance")->pooled_over_layers());
  const Rows one = {{2, 1, 0}, {1, 0, 3}}, two = {{0, 1, 5}, {-1, 2, 1}};
  Rows both = one;
  both.insert(both.end(), two.begin(), two.end());
  const BareRouter router;
  LossStatistics total;
  for (const Rows& layer : {one, two}) {
    const RouteOutput out = noisy_topk_decision(tensor_of(layer), {}, {}, 2);
    const LossStatistics part = collect_statistics(*loss, LossScope::kStep, {input_of(2), out, router, 3}).front();
    for (size_t i = 0; i < part.sums.size(); ++i)
      total.sums.size() <= i ? total.sums.push_back(part.sums[i]) : void(total.sums[i] = total.sums[i].add(part.sums[i]));
    total.rows += part.rows;
  }
  const Choices choices = {{0, 1}, {2, 0}, {2, 1}, {1, 2}};
  CHECK_THAT(loss->value(total, router).item<double>(), WithinRel(plain_balance(choices, plain_softmax(both), 2), 1e-12));
}

// E · Σ f·P of second choices, P without the first choice, divided by what is left.
double plain_second_place(const Choices& choices, const Rows& probabilities) {
  Rows rest = probabilities;
  Choices seconds;
  for (size_t t = 0; t < rest.size(); ++t) {
    const double left = 1 - rest[t][choices[t][0]];
    rest[t][choices[t][0]] = 0;
    for (double& p : rest[t]) p /= left;
    seconds.push_back({choices[t][1]});
  }
  return plain_balance(seconds, rest, 1);
}

TEST_CASE("1.3 fairscale's mean over experts of f·P is the balance loss divided by E²: 1/E² at balance") {
  const Rows logits = {{2, 1, 0}, {1.5, 1.4, -1}, {.2, .1, 0}, {3, -1, 2}};
  const std::vector<double> mass = plain_column_sums(plain_softmax(logits)), first = {4, 0, 0};
  double fairscale = 0;
  for (size_t e = 0; e < 3; ++e) fairscale += first[e] / 4 * mass[e] / 4 / 3;
  const auto loss = make_loss("balance");
  const RouteOutput out = noisy_topk_decision(tensor_of(logits), {}, {}, 2);
  CHECK_THAT(value_of(*loss, input_of(4), out, 3).item<double>() / 9, WithinRel(fairscale, 1e-12));
  CHECK_THAT(value_of(*loss, input_of(8), balanced_decision(8, 2), 8).item<double>() / 64, WithinRel(1.0 / 64, 1e-12));
}

TEST_CASE("1.3 GShard's second place in Mesh TensorFlow adds half of the same sum over second choices: 1.5 at balance") {
  const auto loss = make_loss("balance", {{"second_place", 0.5}}), plain = make_loss("balance");
  const Rows logits = {{2, 1, 0}, {1.5, 1.4, -1}, {.2, .1, 0}, {3, -1, 2}};
  const RouteOutput out = noisy_topk_decision(tensor_of(logits), {}, {}, 2);
  const Choices choices = {{0, 1}, {0, 1}, {0, 1}, {0, 2}};
  const double first = plain_balance(choices, plain_softmax(logits), 1);
  const double second = plain_second_place(choices, plain_softmax(logits));
  constexpr double guard = 1e-8;  // the code divides by what is left + 1e-9
  CHECK_THAT(value_of(*loss, input_of(4), out, 3).item<double>(), WithinRel(first + 0.5 * second, guard));
  CHECK(plain->landmarks(8, 2).balance == 1);  // off unless asked for
  CHECK(loss->landmarks(8, 2).balance == 1.5);
  for (const int64_t k : {1, 2, 5}) {
    const Landmarks marks = loss->landmarks(8, k);
    CHECK_THAT(value_of(*loss, input_of(8), balanced_decision(8, k), 8).item<double>(), WithinRel(marks.balance, guard));
    CHECK_THAT(value_of(*loss, input_of(8), collapsed_decision(8, k), 8).item<double>(), WithinRel(marks.collapse, guard));
  }
}

TEST_CASE("1.3 default coefficients: those of the papers, a router's own before those of the loss") {
  const std::map<std::string, double> of_loss{
      {"importance", 0.1},  {"load", 0.1},        {"balance", 1e-2},          {"z", 1e-3},
      {"entropy", 1e-4},    {"distillation", 1},  {"stablemoe_balance", 0.3}, {"diversity", 1e-2},
      {"simplicity", 1e-2}, {"efficiency", 1e-2}, {"dynmoe_balance", 1e-2}};
  for (const auto& [name, coefficient] : of_loss) {
    INFO(name);
    CHECK(Registry<LossEntry>::instance().find(name).coefficient == coefficient);
  }
  using Terms = std::map<std::string, double>;
  const std::map<std::string, Terms> of_router{{"noisy_topk", {{"importance", 0.1}, {"load", 0.1}}},
                                               {"vmoe", {{"importance", 0.005}, {"load", 0.005}}},
                                               {"switch", {{"balance", 1e-2}}},
                                               {"gshard", {{"balance", 1e-2}}},
                                               {"stablemoe", {{"stablemoe_balance", 0.3}, {"distillation", 1}}},
                                               {"top_p", {{"balance", 1e-2}, {"entropy", 1e-4}}},
                                               {"dynmoe", {{"diversity", 1e-2}, {"simplicity", 1e-2}}}};
  for (const auto& [name, expected] : of_router) {
    INFO(name);
    Terms found;
    const RouterEntry& router = Registry<RouterEntry>::instance().find(name);
    for (const PaperLoss& paper : router.paper_losses) found[paper.name] = paper.coefficient;
    CHECK(found == expected);
  }
}

TEST_CASE("1.3 a [[loss]] without a coefficient takes its router's paper's, else its own paper's") {
  const auto coefficient = [](const std::string& router, const std::string& loss) {
    const std::string text = "[moe.router]\nname = \"" + router + "\"\n[[loss]]\nname = \"" + loss + "\"\n";
    return read_layer(parse_config(text, "loss.toml"), 4, 0, 0, at::kDouble, random_key(0, "init")).losses.at(0).coefficient;
  };
  CHECK(coefficient("vmoe", "importance") == 0.005);
  CHECK(coefficient("softmax_topk", "importance") == 0.1);
  CHECK(coefficient("softmax_topk", "z") == 1e-3);
}

TEST_CASE("1.3 sample variance is E/(E-1) times the population's") {
  const Landmarks population = make_loss("importance")->landmarks(4, 1);
  const Landmarks sample = make_loss("importance", {{"variance", std::string("sample")}})->landmarks(4, 1);
  CHECK(population.collapse == 3);
  CHECK(sample.collapse == 4);
}

TEST_CASE("The balance loss has no lower bound of 1: shares and probabilities may run against each other") {
  Scores scores;
  scores.loss_TE = tensor_of({{.51, .49}, {.51, .49}, {0, 1}});
  const RouteOutput out = decision_of(choices_of({{0}, {0}, {1}}), tensor_of({{1}, {1}, {1}}), scores);
  const double below_one = 2 * (2. / 3 * .34 + 1. / 3 * .66);
  CHECK_THAT(value_of(*make_loss("balance"), input_of(3), out, 2).item<double>(), WithinAbs(below_one, 1e-12));
}

TEST_CASE("Choices are counted before drops and refusals, and -1 is no choice") {
  Scores scores;
  scores.loss_TE = tensor_of({{.5, .5}, {.5, .5}});
  RouteOutput out = decision_of(choices_of({{0, 1}, {0, -1}}), tensor_of({{1, .5}, {1, 7}}), scores);
  out.assignment.kept_TK = out.assignment.kept_TK.logical_and(out.assignment.choice_TK.eq(1));
  const auto any = make_loss("balance", {{"counts", std::string("any_choice")}});
  CHECK_THAT(value_of(*any, input_of(2), out, 2).item<double>(), WithinAbs(2 * (1 * .5 + .5 * .5), 1e-12));
  CHECK_THAT(value_of(*make_loss("importance"), input_of(2), out, 2).item<double>(), WithinAbs(plain_cv2({2, .5}), 1e-12));
}

TEST_CASE("3.9 Where k varies, divide_by_k divides f by Σ f, the mean number of choices") {
  Scores scores;
  scores.loss_TE = tensor_of({{.7, .2, .1}, {.3, .3, .4}});
  RouteOutput out = decision_of(choices_of({{0, 1}, {0, -1}}), tensor_of({{.5, .5}, {1, 0}}), scores);
  out.k = 0;
  const auto loss = make_loss("balance", {{"counts", std::string("any_choice")}, {"divide_by_k", true}});
  CHECK_THAT(value_of(*loss, input_of(2), out, 3).item<double>(), WithinAbs(3 * (2. / 3 * .5 + 1. / 3 * .25), 1e-12));
  CHECK(loss->landmarks(8, 0).balance == 1);
  CHECK(std::isnan(make_loss("balance", {{"counts", std::string("any_choice")}})->landmarks(8, 0).balance));
}

TEST_CASE("Importance and load follow the router's paper unless the option is set") {
  const RouteOutput out = noisy_topk_decision(tensor_of({{1, 0, -1}, {0, 2, 1}}), tensor_of({{1, 2, 1}, {1, 1, 1}}),
                                              tensor_of({{.1, .2, 0}, {0, -1, 1}}), 2);
  const RouteInput in = input_of(2);
  const auto value = [&](const std::string& name, std::vector<Setting> settings, const RouterEntry& entry) {
    return value_of(*make_loss(name, settings, entry), in, out, 3).item<double>();
  };
  const RouterEntry vmoe = entry_with("importance", {{"of", std::string("probabilities")}});
  CHECK(value("importance", {}, vmoe) == value("importance", {{"of", std::string("probabilities")}}, {}));
  CHECK(value("importance", {{"of", std::string("gates")}}, vmoe) == value("importance", {}, {}));
  CHECK(value("importance", {}, vmoe) != value("importance", {}, {}));
  const RouterEntry vmoe_load = entry_with("load", {{"threshold", std::string("include_self")}});
  CHECK(value("load", {}, vmoe_load) == value("load", {{"threshold", std::string("include_self")}}, {}));
  CHECK(value("load", {}, vmoe_load) != value("load", {}, {}));
}

TEST_CASE("Losses refuse routers that have nothing for them to read, and say so") {
  auto& losses = Registry<LossEntry>::instance();
  RouterFacts merge, scoreless;
  merge.plan = PlanForm::kMerge;
  scoreless.has_scores = false;
  for (const char* counting : {"balance", "importance", "load"}) CHECK(losses.find(counting).refuses(merge) != "");
  for (const char* scoring : {"balance", "z", "entropy"}) CHECK(losses.find(scoring).refuses(scoreless) != "");
  for (const char* any : {"balance", "importance", "load", "z", "entropy"}) CHECK(losses.find(any).refuses({}) == "");
  const RouteOutput bare = decision_of(choices_of({{0}}), tensor_of({{1}}), {});
  for (const char* scoring : {"balance", "z", "entropy"})
    CHECK_THROWS_AS(value_of(*make_loss(scoring), input_of(1), bare, 2), Error);
}
