// The layer of SwiGLU experts on a CUDA device, bfloat16, forward with backward, of a given plan: what each kind of product
// takes, beside the dense layer of the same active width. Prints why where there is no device.
#include "bench_support.h"
#include "tests/cuda/device.h"

#include "core/execute.h"
#include "core/select.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cstdio>
#include <memory>

using namespace moelab;
using namespace moelab::bench;

namespace {

struct Shape {
  int64_t rows, width, hidden, experts, k;
  std::string name() const { return fmt::format("T{}_d{}_f{}_E{}_k{}", rows, width, hidden, experts, k); }
  double flops() const { return 18.0 * static_cast<double>(rows * k * width * hidden); }
};

Tensor on_device(const char* purpose, at::IntArrayRef sizes, double std = 1) {
  return normal_tensor(random_key(1, purpose), sizes, std, at::kFloat).to(at::kCUDA, at::kBFloat16).requires_grad_();
}

std::shared_ptr<ExpertBank> swiglu_bank(const Shape& shape) {
  const OptionSpecs& specs = Registry<ExpertEntry>::instance().find("ffn").options;
  Options options(specs);
  for (const OptionSpec& spec : specs) {
    if (spec.name == "activation") options.set(spec, std::string("swiglu"));
    if (spec.name == "width") options.set(spec, shape.hidden);
  }
  std::shared_ptr<ExpertBank> bank = make_experts("ffn", {.width = shape.width,
                                                          .experts = shape.experts,
                                                          .dtype = at::kBFloat16,
                                                          .init = random_key(1, "experts"),
                                                          .output_scale = 1,
                                                          .options = options});
  testing::move_to_cuda(*bank);
  return bank;
}

SparsePlan even_plan(const Shape& shape) {
  const Tensor logits_TE = normal_tensor(random_key(1, "logits"), {shape.rows, shape.experts}, 1, at::kFloat);
  const SoftmaxTopk chosen = softmax_topk(logits_TE, shape.k);
  const Tensor all_TK = at::ones({shape.rows, shape.k}, at::kBool);
  SparsePlan plan = make_sparse_plan({chosen.choice_TK, all_TK, all_TK.logical_not()}, chosen.prob_TK, shape.experts);
  plan.gate_N = plan.gate_N.detach().to(at::kCUDA).requires_grad_();
  return plan;
}

struct Layer {
  explicit Layer(const Shape& shape)
      : bank(swiglu_bank(shape)),
        plan(even_plan(shape)),
        x_TD(on_device("x", {shape.rows, shape.width})),
        grad_TD(on_device("grad", {shape.rows, shape.width}).detach()),
        gate_FD(on_device("gate", {shape.k * shape.hidden, shape.width}, 0.02)),
        up_FD(on_device("up", {shape.k * shape.hidden, shape.width}, 0.02)),
        down_DF(on_device("down", {shape.width, shape.k * shape.hidden}, 0.02)) {}

  Tensor routed(Execution execution) const { return execute(plan, *bank, {.x_TD = x_TD}, execution); }
  Tensor dense() const { return at::linear(at::silu(at::linear(x_TD, gate_FD)).mul(at::linear(x_TD, up_FD)), down_DF); }

  // Reading a number waits for the device.
  void backward(const Tensor& y_TD) const {
    y_TD.backward(grad_TD);
    benchmark::DoNotOptimize(x_TD.grad()[0][0].item<float>());
    bank->zero_grad();
    for (const Tensor& leaf : {x_TD, plan.gate_N, gate_FD, up_FD, down_DF}) leaf.mutable_grad() = Tensor();
  }

  std::shared_ptr<ExpertBank> bank;
  SparsePlan plan;
  Tensor x_TD, grad_TD, gate_FD, up_FD, down_DF;
};

void add_shape(Suite& suite, const Shape& shape) {
  const auto layer = std::make_shared<const Layer>(shape);
  const auto line = [&](const std::string& name, std::function<void()> work) {
    suite.add(Line{.name = fmt::format("{}/fwd_bwd/{}/cuda", name, shape.name()),
                   .work = std::move(work),
                   .counters = {{"flops", shape.flops()}}});
  };
  for (const char* word : {"auto", "loop", "bmm"}) line(word, [=] { layer->backward(layer->routed(execution_of(word))); });
  line("dense", [=] { layer->backward(layer->dense()); });
  for (const char* other : {"loop", "bmm", "dense"})
    suite.add(RatioRow{fmt::format("{} fwd_bwd, bfloat16 on CUDA: {} over auto", shape.name(), other),
                       fmt::format("{}/fwd_bwd/{}/cuda", other, shape.name()), fmt::format("auto/fwd_bwd/{}/cuda", shape.name()),
                       0, true});
}

}  // namespace

int main(int argc, char** argv) {
  if (const std::string& why = testing::why_no_cuda(); !why.empty()) {
    std::printf("bench_cuda_layer: not run: no CUDA device: %s\n", why.c_str());
    return 0;
  }
  Suite suite;
  add_shape(suite, {16384, 2048, 1024, 64, 8});
  add_shape(suite, {16384, 2048, 1024, 8, 2});
  add_shape(suite, {4096, 512, 256, 64, 8});
  return suite.run(argc, argv);
}
