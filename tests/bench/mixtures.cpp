// Soft and merge plans beside the matrix products that they are made of, and low-rank experts beside what they spare. float32,
// forward with backward.
//
//   soft_products    logits, dispatch, experts, combine and their gradients as bare products of whole matrices
//   soft_again       the same and the three products of logits that a layer without a matrix of rows × slots makes again
//   merge_on_graph   one merged copy per group, all of them kept for the backward pass
//   lora_merged      each expert's weights made as one matrix, base and adapter added up
//   lora_base        the frozen feed-forward layer alone, once per row
#include "bench_support.h"

#include "core/adapters.h"
#include "core/error.h"
#include "core/execute.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <memory>

using namespace moelab;
using namespace moelab::bench;

namespace {

std::shared_ptr<ExpertBank> gelu_bank(int64_t width, int64_t experts, int64_t hidden, const std::string& kind = "ffn") {
  const OptionSpecs& specs = Registry<ExpertEntry>::instance().find(kind).options;
  Options options(specs);
  for (const OptionSpec& spec : specs) {
    if (spec.name == "activation") options.set(spec, std::string("gelu"));
    if (spec.name == "width") options.set(spec, hidden);
  }
  return make_experts(kind, {.width = width, .experts = experts, .dtype = at::kFloat, .init = random_key(1, "experts"),
                              .output_scale = 1, .options = options});
}

Tensor values(const char* purpose, at::IntArrayRef sizes, double std = 1) {
  return normal_tensor(random_key(1, purpose), sizes, std, at::kFloat).requires_grad_();
}

struct Mixture {
  std::shared_ptr<ExpertBank> bank;
  Plan plan;
  Tensor x_TD, grad_y_TD;

  void once() const {
    execute(plan, *bank, {.x_TD = x_TD}).backward(grad_y_TD, /*retain_graph=*/true);
    bank->zero_grad();
    x_TD.mutable_grad() = Tensor();
  }
};

// One sequence.
Mixture soft_mixture(int64_t rows, int64_t width, int64_t hidden, int64_t experts, int64_t slots) {
  Mixture m{gelu_bank(width, experts, hidden), {}, values("x", {rows, width}), values("grad", {rows, width}).detach()};
  m.plan = SoftPlan{.experts = experts, .slots_per_expert = slots, .query_TD = m.x_TD,
                    .key_SD = values("key", {experts * slots, width}, 0.05), .scale = at::ones({1}).requires_grad_(),
                    .sequence_T = at::zeros({rows}, at::kLong), .sequences = 1, .noise_TS = {}, .noise_key = {}, .position_T = {},
                    .sequence_key_T = {}};
  return m;
}

// The products alone, on matrices that are there: logits, D, C and what their gradients need.
void soft_products(const Mixture& m, bool again) {
  const at::NoGradGuard no_grad;
  const auto& plan = std::get<SoftPlan>(m.plan);
  const Tensor key_SD = plan.key_SD.detach(), x = m.x_TD.detach(), logits_TS = x.mm(key_SD.t());
  const Tensor slots_SD = logits_TS.t().mm(x), y_TD = logits_TS.mm(slots_SD);
  const Tensor w_in = m.bank->parameters()[0].tensor, w_out = m.bank->parameters()[1].tensor;
  const Tensor rows_ESD = slots_SD.view({plan.experts, plan.slots_per_expert, -1});
  const Tensor hidden = at::gelu(rows_ESD.bmm(w_in.transpose(1, 2))), out = hidden.bmm(w_out.transpose(1, 2));
  const Tensor grad_hidden = out.bmm(w_out);
  for (const Tensor& done : {out.transpose(1, 2).bmm(hidden), grad_hidden.transpose(1, 2).bmm(rows_ESD), grad_hidden.bmm(w_in)})
    benchmark::DoNotOptimize(done);
  // combine: ∂C, ∂Y; dispatch: ∂D, ∂x; and logits to query and key, for both
  for (const Tensor& done : {m.grad_y_TD.mm(slots_SD.t()), logits_TS.t().mm(m.grad_y_TD), x.mm(slots_SD.t()),
                             logits_TS.mm(slots_SD),
                             logits_TS.mm(key_SD), logits_TS.t().mm(x)})
    benchmark::DoNotOptimize(done);
  for (int i = 0; again && i < 3; ++i) benchmark::DoNotOptimize(x.mm(key_SD.t()));
}

Mixture merge_mixture(int64_t groups, int64_t rows, int64_t width, int64_t hidden, int64_t experts) {
  Mixture m{gelu_bank(width, experts, hidden), {}, values("x", {rows, width}), values("grad", {rows, width}).detach()};
  m.plan = MergePlan{.alpha_GE = values("alpha", {groups, experts}).softmax(1),
                     .group_of_token_T = at::arange(rows, at::kLong).floor_divide(rows / groups)};
  return m;
}

Tensor merged_on_graph(const Mixture& m) {
  const auto& plan = std::get<MergePlan>(m.plan);
  const int64_t groups = plan.alpha_GE.size(0), rows = m.x_TD.size(0) / groups;
  std::vector<Tensor> outputs;
  for (int64_t g = 0; g < groups; ++g)
    outputs.push_back(m.bank->forward_with(m.bank->merge(plan.alpha_GE.select(0, g)), m.x_TD.narrow(0, g * rows, rows)));
  return at::cat(outputs);
}

void add_soft(Suite& suite, int64_t rows, int64_t width, int64_t hidden, int64_t experts, int64_t slots) {
  const auto m = std::make_shared<const Mixture>(soft_mixture(rows, width, hidden, experts, slots));
  check_close(execute(m->plan, *m->bank, {.x_TD = m->x_TD}), execute_reference(m->plan, *m->bank, {.x_TD = m->x_TD}), "soft");
  const std::string tail = fmt::format("fwd_bwd/T{}_d{}_f{}_E{}_p{}/threads1", rows, width, hidden, experts, slots);
  // logits, dispatch and combine, then the experts; three times that with gradients
  const double flops = 3 * (6.0 * static_cast<double>(rows) + 4.0 * static_cast<double>(hidden)) *
                       static_cast<double>(experts * slots * width);
  suite.add(Line{.name = "soft/" + tail, .work = [=] { m->once(); }, .threads = 1, .counters = {{"flops", flops}}});
  const double logits_flops = 2.0 * static_cast<double>(rows * experts * slots * width);
  for (const bool again : {false, true})
    suite.add(Line{.name = (again ? "soft_again/" : "soft_products/") + tail,
                   .work = [=] { soft_products(*m, again); },
                   .threads = 1,
                   .counters = {{"flops", flops + (again ? 3 * logits_flops : 0)}}});
  suite.add(RatioRow{"soft, " + tail + ": its products over the layer", "soft_products/" + tail, "soft/" + tail, 0.8, true});
  suite.add(RatioRow{"soft, " + tail + ": products with logits made again over the layer", "soft_again/" + tail, "soft/" + tail,
                     0, true});
}

void add_merge(Suite& suite, int64_t groups, int64_t rows, int64_t width, int64_t hidden, int64_t experts) {
  const auto m = std::make_shared<const Mixture>(merge_mixture(groups, rows, width, hidden, experts));
  check_close(execute(m->plan, *m->bank, {.x_TD = m->x_TD}), merged_on_graph(*m), "merge");
  const std::string tail = fmt::format("fwd_bwd/G{}_T{}_d{}_f{}_E{}/threads1", groups, rows, width, hidden, experts);
  const auto on_graph = [=] {
    merged_on_graph(*m).backward(m->grad_y_TD, /*retain_graph=*/true);
    m->bank->zero_grad();
    m->x_TD.mutable_grad() = Tensor();
  };
  const double flops = 12.0 * static_cast<double>(rows * width * hidden);
  suite.add(Line{.name = "merge/" + tail, .work = [=] { m->once(); }, .threads = 1, .counters = {{"flops", flops}}});
  suite.add(Line{.name = "merge_on_graph/" + tail, .work = on_graph, .threads = 1, .counters = {{"flops", flops}}});
  suite.add(RatioRow{"merge, " + tail + ": all copies on the graph over the layer", "merge_on_graph/" + tail, "merge/" + tail, 0,
                     true});
  suite.add(RatioRow{.what = "merge, " + tail + ": peak bytes over those with all copies on the graph",
                     .numerator = "merge/" + tail,
                     .denominator = "merge_on_graph/" + tail, .above = false, .of_peaks = true});
}

// Feed-forward experts of rank 8 on one frozen layer, two of them per row, whose gates sum to one.
Mixture lora_mixture(int64_t rows, int64_t width, int64_t hidden, int64_t experts) {
  Mixture m{gelu_bank(width, experts, hidden, "lora"), {}, values("x", {rows, width}), values("grad", {rows, width}).detach()};
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : m.bank->parameters())  // the second factors begin at zero
    if (entry.name.ends_with("_b")) entry.tensor.copy_(values(entry.name.c_str(), entry.tensor.sizes(), 0.02));
  const Tensor first_T = at::arange(rows).remainder(experts),
               step_T = at::arange(rows).floor_divide(experts).remainder(experts - 1);
  const Tensor choice_TK = at::stack({first_T, first_T.add(step_T).add(1).remainder(experts)}, 1);
  const Tensor all_TK = at::ones({rows, 2}, at::kBool);
  const Tensor gate_TK = values("gate", {rows, 2}).softmax(1);
  m.plan = make_sparse_plan({choice_TK, all_TK, all_TK.logical_not()}, gate_TK.requires_grad_(), experts);
  return m;
}

Tensor lora_output(const Mixture& m) { return m.bank->run(m.plan, {.x_TD = m.x_TD}); }

Tensor merged_output(const Mixture& m) {
  const auto& plan = std::get<SparsePlan>(m.plan);
  const auto& adapters = dynamic_cast<const AdapterBank&>(*m.bank);
  const std::vector<NamedTensor> base = m.bank->base()->parameters();
  const Tensor rows_ND = dispatch_rows(m.x_TD, plan);
  const auto* offset = plan.offsets_E1.const_data_ptr<int64_t>();
  std::vector<Tensor> outputs;
  for (int64_t e = 0; e < plan.experts; ++e) {
    const std::vector<Tensor> more = adapters.dense_deltas(e);
    const Tensor in = base[0].tensor[0].add(more[0]), out = base[1].tensor[0].add(more[1]);
    outputs.push_back(at::linear(at::gelu(at::linear(rows_ND.narrow(0, offset[e], offset[e + 1] - offset[e]), in)), out));
  }
  return combine_rows(at::cat(outputs), plan);
}

Tensor base_output(const Mixture& m) {
  const std::vector<NamedTensor> base = m.bank->base()->parameters();
  return at::linear(at::gelu(at::linear(m.x_TD, base[0].tensor[0])), base[1].tensor[0]);
}

void add_lora(Suite& suite, int64_t rows, int64_t width, int64_t hidden, int64_t experts) {
  const auto m = std::make_shared<const Mixture>(lora_mixture(rows, width, hidden, experts));
  check_close(lora_output(*m), merged_output(*m), "lora");
  const std::string tail = fmt::format("fwd_bwd/T{}_d{}_f{}_E{}_k2_r8/threads1", rows, width, hidden, experts);
  const auto line = [&](const char* name, Tensor (*output)(const Mixture&)) {
    const auto once = [=] {
      output(*m).backward(m->grad_y_TD, /*retain_graph=*/true);
      m->bank->zero_grad();
      m->x_TD.mutable_grad() = Tensor();
    };
    suite.add(Line{.name = name + ("/" + tail), .work = once, .threads = 1});
  };
  line("lora", lora_output);
  line("lora_merged", merged_output);
  line("lora_base", base_output);
  suite.add(RatioRow{"lora, " + tail + ": merged weights over the layer", "lora_merged/" + tail, "lora/" + tail, 0, true});
  suite.add(RatioRow{"lora, " + tail + ": the layer over its base", "lora/" + tail, "lora_base/" + tail, 0, false});
  suite.add(RatioRow{.what = "lora, " + tail + ": peak bytes over those with merged weights", .numerator = "lora/" + tail,
                     .denominator = "lora_merged/" + tail, .above = false, .of_peaks = true});
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  add_soft(suite, 1024, 256, 1024, 64, 16);
  add_soft(suite, 4096, 256, 1024, 64, 4);
  add_merge(suite, 16, 4096, 256, 1024, 8);
  add_lora(suite, 4096, 256, 1024, 8);
  return suite.run(argc, argv);
}
