// The MoE layer beside a dense feed-forward layer of equal active width and beside the bare matrix products of the same rows,
// with freed memory kept by the process and handed back. One thread, float32, T=4096 d=256 f=1024 E=8 k=2, no drops, GELU.
//
// All lines run interleaved at random in one process; at exit the ratios of their medians are printed for both memory modes.
// The bar: layer tokens/s ≥ 0.75 of the dense layer's, or layer time ≤ 1.35 of the products'.
#include "core/error.h"
#include "core/execute.h"
#include "core/memory.h"
#include "core/select.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <malloc.h>

#include <algorithm>
#include <map>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

using namespace moelab;

namespace {

constexpr int64_t kRows = 4096, kWidth = 256, kHidden = 1024, kExperts = 8, kChoices = 2;

// glibc's own starting values; setting them stops it from adapting them, so the two modes can alternate.
void return_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 128 << 10);
  mallopt(M_TRIM_THRESHOLD, 128 << 10);
  mallopt(M_TOP_PAD, 0);
  malloc_trim(0);
}

std::unique_ptr<ExpertBank> bench_bank() {
  const OptionSpecs& specs = Registry<ExpertEntry>::instance().find("ffn").options;
  Options options(specs);
  for (const OptionSpec& spec : specs) {
    if (spec.name == "activation") options.set(spec, std::string("gelu"));
    if (spec.name == "width") options.set(spec, kHidden);
  }
  return make_experts("ffn", {.width = kWidth, .experts = kExperts, .dtype = at::kFloat, .init = random_key(1, "experts"),
                              .output_scale = 1, .options = options});
}

// The same rows, weights and output gradient for every line.
struct Fixture {
  std::unique_ptr<ExpertBank> bank = bench_bank();
  Tensor x_TD = normal_tensor(random_key(1, "x"), {kRows, kWidth}, 1, at::kFloat).requires_grad_();
  Tensor grad_y_TD = normal_tensor(random_key(1, "grad"), {kRows, kWidth}, 1, at::kFloat);
  Tensor router_ED = normal_tensor(random_key(1, "router"), {kExperts, kWidth}, 0.06, at::kFloat).requires_grad_();
  Tensor dense_in_FD = normal_tensor(random_key(1, "in"), {kChoices * kHidden, kWidth}, 0.06, at::kFloat).requires_grad_();
  Tensor dense_out_DF = normal_tensor(random_key(1, "out"), {kWidth, kChoices * kHidden}, 0.03, at::kFloat).requires_grad_();
  SparsePlan plan;        // of the layer's own decision
  Tensor rows_ND;         // gathered
  Tensor grad_rows_ND;
  std::vector<Tensor> w_in, w_out;

  Fixture() {
    plan = route();
    const at::NoGradGuard no_grad;
    rows_ND = dispatch_rows(x_TD, plan);
    grad_rows_ND = dispatch_rows(grad_y_TD, plan).mul(plan.gate_N.unsqueeze(1));
    for (int64_t e = 0; e < kExperts; ++e) {
      w_in.push_back(bank->parameters_of(e)[0].detach());
      w_out.push_back(bank->parameters_of(e)[1].detach());
    }
  }

  // Softmax, top 2, gates renormalised.
  SparsePlan route() const {
    const Tensor probs_TE = router_logits(x_TD, router_ED).softmax(1);
    const Tensor choice_TK = stable_topk(probs_TE.detach(), kChoices), all_TK = at::ones_like(choice_TK, at::kBool);
    const Tensor gate_TK = renormalised(gather_choices(probs_TE, choice_TK), all_TK);
    return make_sparse_plan({choice_TK, all_TK, all_TK.logical_not()}, gate_TK, kExperts);
  }

  void zero_grads() const {
    bank->zero_grad();
    for (const Tensor& leaf : {x_TD, router_ED, dense_in_FD, dense_out_DF}) leaf.mutable_grad() = Tensor();
  }
};

const Fixture& fixture() {
  static const Fixture shared;
  return shared;
}

Tensor layer_output() {
  const Fixture& f = fixture();
  return execute(f.route(), *f.bank, {.x_TD = f.x_TD});
}

Tensor dense_output() {
  const Fixture& f = fixture();
  return at::linear(at::gelu(at::linear(f.x_TD, f.dense_in_FD)), f.dense_out_DF);
}

// The products of every expert with activation, on gathered rows and without autograd: nothing else can be cheaper.
struct BareProducts {
  std::vector<Tensor> hidden, activated, outputs;

  void forward() {
    const Fixture& f = fixture();
    const int64_t* offset = f.plan.offsets_E1.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < kExperts; ++e) {
      const Tensor rows = f.rows_ND.slice(0, offset[e], offset[e + 1]);
      hidden.push_back(rows.mm(f.w_in[static_cast<size_t>(e)].t()));
      activated.push_back(at::gelu(hidden.back()));
      outputs.push_back(activated.back().mm(f.w_out[static_cast<size_t>(e)].t()));
    }
  }

  std::vector<Tensor> backward() const {
    const Fixture& f = fixture();
    const int64_t* offset = f.plan.offsets_E1.const_data_ptr<int64_t>();
    std::vector<Tensor> grads;
    for (size_t e = 0; e < kExperts; ++e) {
      const Tensor grad = f.grad_rows_ND.slice(0, offset[e], offset[e + 1]), rows = f.rows_ND.slice(0, offset[e], offset[e + 1]);
      grads.push_back(grad.t().mm(activated[e]));
      const Tensor grad_hidden = at::gelu_backward(grad.mm(f.w_out[e]), hidden[e]);
      grads.push_back(grad_hidden.t().mm(rows));
      grads.push_back(grad_hidden.mm(f.w_in[e]));
    }
    return grads;
  }
};

// Each line shows once that it computes what it says.
void check_close(const Tensor& a, const Tensor& b, const std::string& what) {
  const double error = a.sub(b).abs().max().item<double>() / b.abs().max().item<double>();
  check_invariant(error < 1e-4, what + ": wrong answer before timing");
}

void check_answers() {
  const Fixture& f = fixture();
  layer_output().backward(f.grad_y_TD);
  const Tensor grad_w_in = f.bank->parameters()[0].tensor.grad(), grad_w_out = f.bank->parameters()[1].tensor.grad();
  const at::NoGradGuard no_grad;
  BareProducts bare;
  bare.forward();
  const std::vector<Tensor> grads = bare.backward();
  check_close(layer_output(), execute_reference(f.plan, *f.bank, {.x_TD = f.x_TD}), "layer");
  check_close(combine_rows(at::cat(bare.outputs), f.plan), layer_output(), "bare");
  for (size_t e = 0; e < kExperts; ++e) {
    check_close(grads[3 * e], grad_w_out[static_cast<int64_t>(e)], "bare w_out");
    check_close(grads[3 * e + 1], grad_w_in[static_cast<int64_t>(e)], "bare w_in");
  }
  check_close(dense_output(), at::gelu(f.x_TD.matmul(f.dense_in_FD.t())).matmul(f.dense_out_DF.t()), "dense");
  f.zero_grads();
}

template <class Work>
void timed(benchmark::State& state, bool keep, Work work) {
  at::set_num_threads(1);
  keep ? keep_freed_memory() : return_freed_memory();
  work();  // warm
  for (auto _ : state) work();
  state.counters["tokens/s"] = benchmark::Counter(kRows, benchmark::Counter::kIsIterationInvariantRate);
}

template <class Output>
void forward_and_backward(Output output) {
  output().backward(fixture().grad_y_TD);
  fixture().zero_grads();
}

void register_lines(bool keep) {
  const std::string memory = keep ? "/kept" : "/returned";
  const auto line = [&](const std::string& name, auto work) {
    benchmark::RegisterBenchmark((name + memory).c_str(), [=](benchmark::State& state) { timed(state, keep, work); })
        ->Unit(benchmark::kMillisecond)->Iterations(1)->Repetitions(15)->ReportAggregatesOnly(false);
  };
  line("layer/forward", [] { const at::NoGradGuard no_grad; benchmark::DoNotOptimize(layer_output()); });
  line("dense/forward", [] { const at::NoGradGuard no_grad; benchmark::DoNotOptimize(dense_output()); });
  line("bare/forward", [] { const at::NoGradGuard no_grad; BareProducts().forward(); });
  line("layer/both", [] { forward_and_backward(layer_output); });
  line("dense/both", [] { forward_and_backward(dense_output); });
  line("bare/both", [] {
    const at::NoGradGuard no_grad;
    BareProducts bare;
    bare.forward();
    benchmark::DoNotOptimize(bare.backward());
  });
}

// Prints as usual, and keeps the processor time of every repetition.
class RatioReporter : public benchmark::ConsoleReporter {
 public:
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs)
      if (run.run_type == Run::RT_Iteration) times_[run.run_name.function_name].push_back(run.GetAdjustedCPUTime());
    ConsoleReporter::ReportRuns(runs);
  }

  void print_ratios() const {
    for (const std::string pass : {"/forward", "/both"})
      for (const std::string memory : {"/kept", "/returned"}) {
        const double layer = median("layer" + pass + memory);
        std::printf("%-8s %-9s  layer tokens/s over dense %.2f (bar 0.75)   layer time over bare products %.2f (bar 1.35)\n",
                    pass.c_str() + 1, memory.c_str() + 1, median("dense" + pass + memory) / layer,
                    layer / median("bare" + pass + memory));
      }
  }

 private:
  double median(const std::string& name) const {
    const auto found = times_.find(name);
    if (found == times_.end()) return std::nan("");  // filtered out
    std::vector<double> sorted = found->second;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
  std::map<std::string, std::vector<double>> times_;
};

}  // namespace

int main(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true";
  arguments.insert(arguments.begin() + 1, interleave);
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  at::set_num_threads(1);
  check_answers();
  for (const bool keep : {true, false}) register_lines(keep);
  RatioReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  reporter.print_ratios();
  return 0;
}
