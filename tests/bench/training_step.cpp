// A training step of the quickstart's model (one batch of 8 × 128 bytes: gradients, clipping, update) beside its dense twin of
// equal active parameters, and beside the same model whose experts are a plain loop; and a whole run of one step, from the start
// of the process to its end.
#include "stepper.h"

#include "core/error.h"
#include "core/expert.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>

using namespace moelab;
using namespace moelab::bench;

namespace {

// What a plain user writes: a loop over experts. Their weights are tensors of their own, or slices of stacked ones, whose
// gradients autograd makes as large as the stack, expert by expert.
class PlainLoopBank : public ExpertBank {
 public:
  PlainLoopBank(const ExpertSpec& spec, bool stacked) : width_(spec.width), hidden_(spec.options.integer("width")) {
    const int64_t together = stacked ? spec.experts : 1;
    for (int64_t e = 0; e < spec.experts; e += together) {
      groups_.push_back({.first = e, .experts = together, .stacked = {}});
      add("w_gate", spec, hidden_, width_);
      add("w_up", spec, hidden_, width_);
      add("w_down", spec, width_, hidden_);
    }
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
    ExpertGroup& group = groups_.back();
    const Tensor value = normal_tensor(spec.init.with(name, group.first), {group.experts, out, in},
                                       1 / std::sqrt(static_cast<double>(in)), spec.dtype);
    group.stacked.push_back({name, add_parameter(fmt::format("{}.{}", group.first, name), value)});
  }
  int64_t width_, hidden_;
};

ExpertEntry plain_loop(const std::string& name, bool stacked) {
  return {
      .name = name,
      .title = "A plain loop over experts (a peer of the benchmarks)",
      .citation = "-",
      .equation = "y = w_down·(silu(w_gate·x) ∘ (w_up·x))",
      .options = {{.name = "activation", .default_value = std::string("swiglu"), .doc = "swiglu alone", .choices = {"swiglu"}},
                  {.name = "width", .default_value = int64_t{128}, .doc = "hidden width of one expert", .min = 1}},
      .make = [stacked](ExpertSpec spec) -> std::unique_ptr<ExpertBank> {
        return std::make_unique<PlainLoopBank>(spec, stacked);
      },
  };
}

const Registration<ExpertEntry> own{plain_loop("plain_loop", false)}, stacked{plain_loop("plain_loop_stacked", true)};

const std::string kModel = R"(
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
)";

// The program itself, with one step to train and next to nothing to evaluate: nothing before the first step is left out.
void add_whole_run(Suite& suite) {
  const std::string folder = std::filesystem::temp_directory_path() / fmt::format("moelab-bench-{}", std::random_device{}());
  std::filesystem::create_directory(folder);
  std::ofstream(folder + "/step.toml") << kModel << "[eval]\nsequences = 1\n";
  const std::string run = fmt::format("'{0}' run {1}/step.toml --quiet --set data.validation_documents=1 --out {1}/run > {1}/log "
                                      "2>&1; code=$?; rm -rf {1}/run; exit $code", MOELAB_PROGRAM, folder);
  suite.add(Line{.name = "whole_run/one_step", .work = [run] {
    check_invariant(std::system(run.c_str()) == 0, "the run of one step failed: " + run);
  }});
  suite.add(RatioRow{"start of the process to the end of a run of one step, seconds", "whole_run/one_step", "", 1.5, false});
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  add_steps(suite, "training_step", "moe", kModel, {});
  add_steps(suite, "training_step", "dense_twin", kModel, {"model.twin=dense_active"});
  add_steps(suite, "training_step", "plain_loop", kModel, {"moe.expert.name=plain_loop"});
  add_steps(suite, "training_step", "plain_loop_stacked", kModel, {"moe.expert.name=plain_loop_stacked"});
  for (const int threads : {1, 2}) {
    const auto line = [&](const char* name) { return fmt::format("training_step/{}/threads{}", name, threads); };
    const std::string where = fmt::format("quickstart model's step, {} thread(s): ", threads);
    suite.add(RatioRow{where + "dense twin over the model", line("dense_twin"), line("moe"), 0.85, true});
    suite.add(RatioRow{where + "plain loops over the model", line("plain_loop"), line("moe"), 1.5, true});
    suite.add(RatioRow{where + "plain loops over the dense twin, the most that any execution could reach", line("plain_loop"),
                       line("dense_twin"), 0, true});
    suite.add(
        RatioRow{where + "plain loops on stacked weights over the model", line("plain_loop_stacked"), line("moe"), 0, true});
  }
  add_whole_run(suite);
  return suite.run(argc, argv);
}
