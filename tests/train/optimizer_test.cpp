// Optimisers, schedule and clipping against plain loops in double, and what stops before an update.
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <numbers>

namespace moelab::test {
namespace {

// A matrix, a vector, an embedding, a router's matrix, and three stacked experts.
struct Parameters {
  std::vector<NamedTensor> list;
  Parameters() {
    at::manual_seed(5);
    const std::vector<std::pair<std::string, std::vector<int64_t>>> shapes{
        {"layers.0.attention.query", {2, 3}}, {"layers.0.norm", {3}}, {"embedding.weight", {4, 2}},
        {"layers.0.moe.router.weight", {3, 2}}, {"layers.0.moe.experts.w_in", {3, 2, 2}}};
    for (const auto& [name, shape] : shapes) list.push_back({name, at::randn(shape, at::kDouble).requires_grad_(true)});
  }
  void draw_gradients(int64_t step) const {
    at::manual_seed(100 + step);
    for (const NamedTensor& p : list) p.tensor.mutable_grad() = at::randn_like(p.tensor.detach());
  }
  Tensor experts() const { return list.back().tensor; }
};

std::vector<double> numbers_of(const Tensor& tensor) {
  const Tensor flat = tensor.detach().contiguous();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}

// One parameter's update by loops, with moments of its own.
struct PlainUpdate {
  std::vector<double> x, m, v;
  double lr_scale = 1, decay = 0;

  void adamw(const std::vector<double>& g, const OptimizerSettings& s, double lr, int t) {
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] -= lr * lr_scale * decay * x[i];
      m[i] = s.beta1 * m[i] + (1 - s.beta1) * g[i];
      v[i] = s.beta2 * v[i] + (1 - s.beta2) * g[i] * g[i];
      const double mean = m[i] / (1 - std::pow(s.beta1, t)), root = std::sqrt(v[i] / (1 - std::pow(s.beta2, t)));
      x[i] -= lr * lr_scale * mean / (root + s.epsilon);
    }
  }
  void sgd(const std::vector<double>& g, const OptimizerSettings& s, double lr) {
    for (size_t i = 0; i < x.size(); ++i) {
      m[i] = s.momentum * m[i] + g[i] + decay * x[i];
      x[i] -= lr * lr_scale * m[i];
    }
  }
};

TEST_CASE("AdamW and SGD equal plain loops: decay of matrices alone, momentum, the router's learning rate") {
  OptimizerSettings settings;
  settings.name = GENERATE("adamw", "sgd");
  settings.epsilon = 1e-3;
  settings.router_lr_scale = 0.25;
  const Parameters parameters;
  Optimizer optimizer(settings, parameters.list);
  std::vector<PlainUpdate> plain;
  for (const NamedTensor& p : parameters.list) {
    const std::vector<double> x = numbers_of(p.tensor), zero(x.size(), 0);
    const bool decayed = p.name.ends_with("query") || p.name.ends_with("w_in");
    plain.push_back({x, zero, zero, p.name.find("router") == std::string::npos ? 1 : 0.25, decayed ? 0.1 : 0});
  }
  for (int t = 1; t <= 5; ++t) {
    const double lr = 0.02 * t;
    parameters.draw_gradients(t);
    optimizer.step(lr);
    for (size_t p = 0; p < plain.size(); ++p) {
      const std::vector<double> g = numbers_of(parameters.list[p].tensor.grad());
      if (settings.name == "adamw") plain[p].adamw(g, settings, lr, t);
      else plain[p].sgd(g, settings, lr);
      CAPTURE(settings.name, t, parameters.list[p].name);
      const Tensor expected = at::tensor(plain[p].x, at::kDouble).view_as(parameters.list[p].tensor);
      CHECK(largest_error({{"x", parameters.list[p].tensor.detach()}}, {{"x", expected}}) <= 1e-10);
    }
  }
}

TEST_CASE("a missing gradient counts as zero, and a frozen parameter stays as it is, bit for bit") {
  const Parameters parameters;
  Optimizer optimizer({}, parameters.list);
  parameters.draw_gradients(1);
  optimizer.step(0.1);
  const Tensors before = copies_of(parameters.list);
  parameters.list[0].tensor.mutable_grad() = Tensor();
  parameters.experts().requires_grad_(false);
  optimizer.step(0.1);
  CHECK_FALSE(at::equal(parameters.list[0].tensor, before.at(parameters.list[0].name)));  // its momentum goes on
  CHECK(at::equal(parameters.experts(), before.at("layers.0.moe.experts.w_in")));
}

// What `kUnfreeze` does to a router that was frozen from the start.
TEST_CASE("a parameter that thaws in the middle of a run is updated with fresh moments, and that survives a checkpoint") {
  const Experiment e = tiny_experiment("frozen", {"train.steps=1", "schedule.decay=constant"});
  Trainer trainer = trainer_of(e);
  const Tensor weight = e.model->sites()[0]->router->parameters()[0].tensor;
  const Tensor before = weight.detach().clone();
  weight.requires_grad_(true);
  trainer.run();
  const Tensor step = weight.detach().sub(before), gradient = weight.grad();
  REQUIRE(gradient.abs().max().item<double>() > 0);
  // AdamW's first step is lr · g / (|g| + ε).
  CHECK(largest_error({{"x", step}}, {{"x", gradient.div(gradient.abs().add(1e-8)).mul(-0.01)}}) <= 1e-3);
  const Tensors moments = copies_of(trainer.optimizer().state());
  CHECK(moments.at("m.layers.0.moe.router.weight").abs().max().item<double>() > 0);
  CHECK(moments.at("m.layers.1.moe.router.weight").abs().max().item<double>() == 0);
}

TEST_CASE("untouched slices keep values and moments bit for bit while the others move") {
  OptimizerSettings settings;
  settings.name = GENERATE("adamw", "sgd");
  const Parameters parameters;
  Optimizer optimizer(settings, parameters.list);
  parameters.draw_gradients(1);
  optimizer.step(0.1);
  Tensors before = copies_of(parameters.list);
  before.merge(copies_of(optimizer.state()));
  parameters.draw_gradients(2);
  optimizer.step(0.1, {{parameters.experts(), 1}});
  Tensors after = copies_of(parameters.list);
  after.merge(copies_of(optimizer.state()));
  for (const auto& [name, tensor] : before) {
    if (!name.ends_with("w_in") || name.starts_with("step.")) continue;
    CAPTURE(name);
    CHECK(at::equal(after.at(name)[1], tensor[1]));
    CHECK_FALSE(at::equal(after.at(name)[0], tensor[0]));
    CHECK_FALSE(at::equal(after.at(name)[2], tensor[2]));
  }
}

TEST_CASE("surgery clears the moments of one slice and no other") {
  const Parameters parameters;
  Optimizer optimizer({}, parameters.list);
  parameters.draw_gradients(1);
  optimizer.step(0.1);
  const Tensors before = copies_of(optimizer.state());
  optimizer.reset_slice({parameters.experts(), 0});
  const Tensors after = copies_of(optimizer.state());
  for (const char* moment : {"m.", "v."}) {
    const std::string name = std::string(moment) + "layers.0.moe.experts.w_in";
    CHECK(after.at(name)[0].abs().max().item<double>() == 0);
    CHECK(at::equal(after.at(name)[1], before.at(name)[1]));
    CHECK(at::equal(after.at(name)[2], before.at(name)[2]));
    CHECK(before.at(name)[0].abs().max().item<double>() > 0);
  }
}

// An expert's part may be a column of a parameter, as in a matrix [labels, experts] that is given transposed.
TEST_CASE("a slice of a view is that part of the parameter and of its moments") {
  const Parameters parameters;
  Optimizer optimizer({}, parameters.list);
  parameters.draw_gradients(1);
  optimizer.step(0.1);
  const Tensor weight_RE = parameters.list[3].tensor;
  const Tensor before = weight_RE.detach().clone();
  optimizer.reset_slice({weight_RE.t(), 1});
  const Tensor moment = copies_of(optimizer.state()).at("m.layers.0.moe.router.weight");
  CHECK(moment.select(1, 1).abs().max().item<double>() == 0);
  CHECK(moment.select(1, 0).abs().min().item<double>() > 0);
  parameters.draw_gradients(2);
  optimizer.step(0.1, {{weight_RE.t(), 1}});
  CHECK(at::equal(weight_RE.select(1, 1), before.select(1, 1)));
  CHECK((weight_RE.select(1, 0) != before.select(1, 0)).all().item<bool>());
}

// Peak 2, four steps of warm-up, twelve in all, down to half.
TEST_CASE("the schedule warms up linearly and falls along a cosine") {
  const ScheduleSettings cosine{4, "cosine", 0.5};
  const std::vector<double> expected{
      0.5, 1, 1.5, 2, 2, 1.5 + 0.5 * std::cos(std::numbers::pi / 8), 1.5 + 0.5 * std::cos(std::numbers::pi / 4)};
  for (size_t step = 0; step < expected.size(); ++step)
    CHECK(std::abs(learning_rate(2, cosine, static_cast<int64_t>(step), 12) - expected[step]) < 1e-14);
  CHECK(std::abs(learning_rate(2, cosine, 8, 12) - 1.5) < 1e-14);
  CHECK(std::abs(learning_rate(2, cosine, 12, 12) - 1) < 1e-14);
  CHECK(learning_rate(2, {4, "constant", 0.5}, 11, 12) == 2);
  CHECK(learning_rate(2, {0, "constant", 0.5}, 0, 12) == 2);
}

// (3, 4) and (12): the norm is 13.
TEST_CASE("clipping scales all gradients to the limit, and only above it") {
  std::vector<NamedTensor> list{
      {"a", at::zeros({2}, at::kDouble)}, {"b", at::zeros({1}, at::kDouble)}, {"none", at::zeros({1}, at::kDouble)}};
  const auto set = [&] {
    list[0].tensor.mutable_grad() = at::tensor({3.0, 4.0}, at::kDouble);
    list[1].tensor.mutable_grad() = at::tensor({12.0}, at::kDouble);
  };
  set();
  CHECK(gradient_norm(list) == 13);
  clip_gradients(list, 13, 6.5);
  CHECK(numbers_of(list[0].tensor.grad()) == std::vector<double>{1.5, 2});
  CHECK(numbers_of(list[1].tensor.grad()) == std::vector<double>{6});
  set();
  for (const double limit : {0.0, 13.0, 20.0}) clip_gradients(list, 13, limit);
  CHECK(numbers_of(list[1].tensor.grad()) == std::vector<double>{12});
}

TEST_CASE("unused experts decay by default and rest where the config says skip") {
  const std::string rule = GENERATE("zero_grad", "skip");
  // Expert 3 is never among the first two places of a round robin of two: k = 1, positions 0 and 1 go to experts 0 and 1.
  const Experiment e = tiny_experiment(
      "uniform", {"moe.router.k=1", "model.context=2", "optimizer.unused_experts=" + rule, "train.steps=3"});
  const Tensors before = copies_of(e.model->parameters());
  const Tensors after = trained(e);
  for (const auto& [name, tensor] : before) {
    if (name.find(".experts.w") == std::string::npos) continue;
    CAPTURE(name, rule);
    CHECK(at::equal(after.at(name)[3], tensor[3]) == (rule == "skip"));
    CHECK_FALSE(at::equal(after.at(name)[0], tensor[0]));
    CHECK((after.at("m." + name)[3].abs().max().item<double>() == 0));
  }
}

// At step 2 the loss is infinite, or it is finite and one tensor's gradient is NaN: √ has an infinite slope at 0, times 0.
class BrokenObjective : public Objective {
 public:
  explicit BrokenObjective(bool loss) : loss_(loss) {}
  ObjectiveOutput compute(const Model& model, const Batch& batch, const StepContext& context) const override {
    ObjectiveOutput out;
    out.passes.push_back(model.forward(batch, context));
    out.loss_sum = cross_entropy_sum(out.passes[0].logits_BLV, batch.targets_BL);
    if (context.step == 2) out.loss_sum = loss_ ? out.loss_sum * INFINITY : out.loss_sum + zero_with_broken_slope(model);
    out.task_sum = out.loss_sum.item<double>();
    return out;
  }

 private:
  static Tensor zero_with_broken_slope(const Model& model) {
    for (const NamedTensor& entry : model.trainable())
      if (entry.name == "layers.1.moe.router.weight") return entry.tensor.sum().mul(0).square().sqrt();
    return {};
  }
  bool loss_;
};

const Registration<ObjectiveEntry> broken_loss{{.name = "broken_loss", .title = "", .equation = "", .make = [](const Options&) {
                                                  return std::make_unique<BrokenObjective>(true);
                                                }}};
const Registration<ObjectiveEntry> broken_gradient{
    {.name = "broken_gradient", .title = "", .equation = "", .make = [](const Options&) {
       return std::make_unique<BrokenObjective>(false);
     }}};

// The message of the divergence that this run ends with; the state must be that of the last whole step.
std::string divergence_of(Trainer& trainer) {
  try {
    trainer.run();
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kDiverged);
    return error.what();
  }
  return "it went on";
}

TEST_CASE("a loss or gradient that is not finite stops before the update and says where") {
  const std::string objective = GENERATE("broken_loss", "broken_gradient");
  const Experiment e = tiny_experiment("switch", {"train.objective=" + objective, "schedule.decay=constant"});
  Trainer trainer = trainer_of(e);
  const std::string message = divergence_of(trainer);
  CAPTURE(message);
  CHECK(message.find("at step 2") != std::string::npos);
  CHECK(message.find("nothing was updated") != std::string::npos);
  CHECK(message.find(objective == "broken_loss" ? "the task loss is inf" : "non-finite gradient of layers.1.moe.router.weight") !=
        std::string::npos);
  CHECK(trainer.step() == 2);
  CHECK(bitwise_equal(state_of(trainer), trained(tiny_experiment("switch", {"train.steps=2", "schedule.decay=constant"}))));
}

TEST_CASE("a parameter that is not finite is found where it is first felt, with tensor, layer and step") {
  const double value = GENERATE(INFINITY, NAN);
  const Experiment e = tiny_experiment("switch");
  for (const NamedTensor& entry : e.model->parameters())
    if (entry.name == "layers.0.moe.experts.w_in" || entry.name == "layers.0.moe.experts.w_down")
      entry.tensor.detach().fill_(value);
  const Tensors before = copies_of(e.model->parameters());
  Trainer trainer = trainer_of(e);
  const std::string message = divergence_of(trainer);
  CAPTURE(message);
  CHECK(message == "non-finite x in the router of layer 1 at step 0");
  for (const auto& [name, tensor] : copies_of(e.model->parameters())) CHECK(at::allclose(tensor, before.at(name), 0, 0, true));
}

}  // namespace
}  // namespace moelab::test
