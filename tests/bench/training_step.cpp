// A training step of the quickstart's model (gradients of one batch of 8 × 128 bytes) beside its dense twin of equal active
// parameters, and beside the same model whose experts are a plain loop; and the time from the start of the process to the first
// step.
#include "bench_support.h"

#include "core/comm.h"
#include "core/config.h"
#include "core/expert.h"
#include "experiments/experiment.h"
#include "trainers/step.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <memory>

using namespace moelab;
using namespace moelab::bench;

namespace {

// What a plain user writes on stacked weights: one linear map after another on expert e's slice.
class PlainLoopBank : public ExpertBank {
 public:
  explicit PlainLoopBank(const ExpertSpec& spec) : width_(spec.width), hidden_(spec.options.integer("width")) {
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {}});
    add("w_gate", spec, hidden_, width_);
    add("w_up", spec, hidden_, width_);
    add("w_down", spec, width_, hidden_);
  }
  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return 6.0 * static_cast<double>(width_ * hidden_); }
  void reset_expert(int64_t, RandomKey) override {}
  bool has_forward_with() const override { return true; }
  Tensor forward_with(const std::vector<Tensor>& p, const Tensor& rows) const override {
    return at::linear(at::silu(at::linear(rows, p[0])).mul(at::linear(rows, p[1])), p[2]);
  }
  Tensor forward(const ExpertContext& context, int) const override { return loop(context.rows_ND, context.offsets_E1); }

  // Gathers by index_select and adds by index_add, expert after expert.
  Tensor forward_layer(const ExpertContext& context) const override {
    const SparsePlan& plan = *context.plan;
    const auto* offset = context.offsets_E1.const_data_ptr<int64_t>();
    Tensor y_TD = at::zeros_like(context.input_TD);
    for (int64_t e = 0; e < experts(); ++e) {
      const Tensor token_M = plan.token_N.slice(0, offset[e], offset[e + 1]),
          gate_M = plan.gate_N.slice(0, offset[e], offset[e + 1]);
      const Tensor out = forward_with(parameters_of(e), context.input_TD.index_select(0, token_M));
      y_TD = y_TD.index_add(0, token_M, out.mul(gate_M.unsqueeze(1)));
    }
    return y_TD;
  }

 private:
  Tensor loop(const Tensor& rows_ND, const Tensor& offsets_E1) const {
    const auto* offset = offsets_E1.const_data_ptr<int64_t>();
    std::vector<Tensor> outputs;
    for (int64_t e = 0; e < experts(); ++e) outputs.push_back(forward_with(parameters_of(e),
                                                                           rows_ND.slice(0, offset[e], offset[e + 1])));
    return at::cat(outputs);
  }
  void add(const std::string& name, const ExpertSpec& spec, int64_t out, int64_t in) {
    const Tensor value = normal_tensor(spec.init.with(name), {spec.experts, out, in}, 1 / std::sqrt(static_cast<double>(in)),
                                       spec.dtype);
    groups_.front().stacked.push_back({name, add_parameter(name, value)});
  }
  int64_t width_, hidden_;
};

const Registration<ExpertEntry> registration{{
    .name = "plain_loop",
    .title = "A plain loop over experts (a peer of the benchmarks)",
    .citation = "-",
    .equation = "y = w_down·(silu(w_gate·x) ∘ (w_up·x))",
    .options = {{.name = "activation", .default_value = std::string("swiglu"), .doc = "swiglu alone", .choices = {"swiglu"}},
                {.name = "width", .default_value = int64_t{128}, .doc = "hidden width of one expert", .min = 1}},
    .make = [](ExpertSpec spec) -> std::unique_ptr<ExpertBank> { return std::make_unique<PlainLoopBank>(spec); },
}};

struct Stepper {
  Experiment experiment;
  std::vector<Batch> batches;

  explicit Stepper(const std::vector<std::string>& more) : experiment(load_experiment(parse_config(R"(
seed = 1
[model]
layers = 3
width = 128
heads = 4
context = 128
moe_layers = "all"
[moe]
experts = 8
[moe.router]
name = "softmax_topk"
k = 2
renormalise = "before_drop"
[moe.expert]
activation = "swiglu"
width = 128
[data]
name = "markov"
states = 256
validation_documents = 8
[train]
steps = 1
batch = 8
)", "step.toml", more))) {
    batches.push_back(experiment.data->train_batch(1, 0, 0, 8, 8));
  }

  void once() const {
    static const std::shared_ptr<Comm> alone = single_comm();
    StepContext context;
    context.comm = alone.get();
    context.seed = 1;
    experiment.model->zero_grad();
    benchmark::DoNotOptimize(compute_step(*experiment.model, *make_objective("task"), batches, context, false).task_loss);
  }
};

void add_stepper(Suite& suite, const std::string& name, const std::vector<std::string>& more) {
  const auto stepper = std::make_shared<const Stepper>(more);
  for (const int threads : {1, 2})
    suite.add(Line{.name = fmt::format("training_step/{}/threads{}", name, threads), .work = [=] { stepper->once(); },
                   .threads = threads});
}

}  // namespace

int main(int argc, char** argv) {
  const auto start = std::chrono::steady_clock::now();
  Suite suite;
  add_stepper(suite, "moe", {});
  Stepper({}).once();
  const double first = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  add_stepper(suite, "dense_twin", {"model.twin=dense_active"});
  add_stepper(suite, "plain_loop", {"moe.expert.name=plain_loop"});
  for (const int threads : {1, 2}) {
    const auto line = [&](const char* name) { return fmt::format("training_step/{}/threads{}", name, threads); };
    const std::string where = fmt::format("quickstart model's step, {} thread(s): ", threads);
    suite.add(RatioRow{where + "dense twin over the model", line("dense_twin"), line("moe"), 0.85, true});
    suite.add(RatioRow{where + "plain loops over the model", line("plain_loop"), line("moe"), 1.5, true});
  }
  suite.add_number("main to the end of the first two steps, seconds (libraries loaded)", first, 1.5, false);
  return suite.run(argc, argv);
}
