// The MoE layer of feed-forward experts (GELU, float32, no drops) beside its peers, forward and forward with backward:
//
//   moe_layer    routing (softmax top-k) and execution
//   execute      execution alone, of a given plan
//   bare         the experts' products and activations on rows already gathered, without autograd: the bar
//   dense        a dense layer of width k·f
//   plain        gather, the library's grouped product, index_add: the plain way of today
//   where        a loop over experts with where, index_select and index_add; each expert's weights are tensors of their own
//   where_stacked  the same on slices of stacked weights, whose gradients autograd makes as large as the whole stack
//   einsum       dispatch and combine masks of capacity 1.25 (GShard's form)
//
// Experts' loads: even in expectation, `zipf` (share of expert e ∝ 1/(e+1)), `one` (one expert takes all first choices).
#include "bench_support.h"

#include "core/error.h"
#include "core/execute.h"
#include "core/select.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <tuple>

using namespace moelab;
using namespace moelab::bench;

namespace {

struct Shape {
  int64_t rows, width, hidden, experts, k;
  std::string load = "even";

  std::string name() const {
    const std::string sizes = fmt::format("T{}_d{}_f{}_E{}_k{}", rows, width, hidden, experts, k);
    return load == "even" ? sizes : sizes + "_" + load;
  }
  double flops() const { return 4.0 * static_cast<double>(rows * k * width * hidden); }
  int64_t rows_per_expert() const { return rows * k / experts; }
  // s·(T(d + kf) + y, dx and parameter gradients), without x, which was there before.
  double minimal_bytes() const {
    return 4.0 * static_cast<double>(rows * k * hidden + 2 * rows * width + 2 * experts * width * hidden);
  }
};

std::unique_ptr<ExpertBank> bench_bank(const Shape& shape) {
  const OptionSpecs& specs = Registry<ExpertEntry>::instance().find("ffn").options;
  Options options(specs);
  for (const OptionSpec& spec : specs) {
    if (spec.name == "activation") options.set(spec, std::string("gelu"));
    if (spec.name == "width") options.set(spec, shape.hidden);
  }
  return make_experts("ffn", {.width = shape.width, .experts = shape.experts, .dtype = at::kFloat,
                              .init = random_key(1, "experts"),
                              .output_scale = 1, .options = options});
}

Tensor random_values(const char* purpose, at::IntArrayRef sizes, double std) {
  return normal_tensor(random_key(1, purpose), sizes, std, at::kFloat);
}

// What is added to the logits, so that the experts' shares are those of the load.
Tensor load_bias(const Shape& shape) {
  Tensor bias_E = at::zeros({shape.experts});
  if (shape.load == "zipf") bias_E = at::arange(1, shape.experts + 1, at::kFloat).log().neg();
  if (shape.load == "one") bias_E[0] = 100;
  return bias_E;
}

// The same rows, weights and output gradient for every line.
struct Fixture {
  Shape shape;
  std::shared_ptr<ExpertBank> bank = bench_bank(shape);
  Tensor x_TD = random_values("x", {shape.rows, shape.width}, 1).requires_grad_();
  Tensor grad_y_TD = random_values("grad", {shape.rows, shape.width}, 1);
  Tensor router_ED = random_values("router", {shape.experts, shape.width},
                                   1 / std::sqrt(static_cast<double>(shape.width))).requires_grad_();
  Tensor bias_E = load_bias(shape);
  Tensor dense_in_FD = random_values("in", {shape.k * shape.hidden, shape.width}, 0.06).requires_grad_();
  Tensor dense_out_DF = random_values("out", {shape.width, shape.k * shape.hidden}, 0.03).requires_grad_();
  SparsePlan plan;
  Tensor rows_ND, grad_rows_ND;
  std::vector<Tensor> w_in, w_out;          // of the bank
  std::vector<Tensor> own_in_E, own_out_E;  // copies, each a parameter

  explicit Fixture(Shape of) : shape(std::move(of)) {
    plan = route();
    plan.gate_N = plan.gate_N.detach().requires_grad_();
    const at::NoGradGuard no_grad;
    rows_ND = dispatch_rows(x_TD, plan);
    grad_rows_ND = dispatch_rows(grad_y_TD, plan).mul(plan.gate_N.unsqueeze(1));
    for (int64_t e = 0; e < shape.experts; ++e) {
      w_in.push_back(bank->parameters_of(e)[0].detach());
      w_out.push_back(bank->parameters_of(e)[1].detach());
      own_in_E.push_back(w_in.back().clone().requires_grad_());
      own_out_E.push_back(w_out.back().clone().requires_grad_());
    }
  }

  Tensor logits() const { return router_logits(x_TD, router_ED).add(bias_E); }

  SparsePlan plan_of(const Tensor& logits_TE) const {
    const SoftmaxTopk chosen = softmax_topk(logits_TE, shape.k);
    const Tensor all_TK = at::ones({shape.rows, shape.k}, at::kBool);
    return make_sparse_plan({chosen.choice_TK, all_TK, at::zeros_like(all_TK)}, chosen.prob_TK, shape.experts);
  }
  SparsePlan route() const { return plan_of(logits()); }

  void zero_grads() const {
    bank->zero_grad();
    for (const Tensor& leaf : {x_TD, router_ED, dense_in_FD, dense_out_DF, plan.gate_N}) leaf.mutable_grad() = Tensor();
    for (const auto* own : {&own_in_E, &own_out_E})
      for (const Tensor& leaf : *own) leaf.mutable_grad() = Tensor();
  }
};

Tensor layer_output(const Fixture& f) { return execute(f.route(), *f.bank, {.x_TD = f.x_TD}); }
Tensor executed_output(const Fixture& f) { return execute(f.plan, *f.bank, {.x_TD = f.x_TD}); }
Tensor dense_output(const Fixture& f) { return at::linear(at::gelu(at::linear(f.x_TD, f.dense_in_FD)), f.dense_out_DF); }

std::tuple<Tensor, Tensor> plain_choices(const Fixture& f) { return at::topk(f.logits().softmax(1), f.shape.k); }

// Sorted by expert with the library's own calls.
Tensor plain_output(const Fixture& f) {
  const auto [gate_TK, choice_TK] = plain_choices(f);
  const Tensor expert_N = choice_TK.flatten(), order_N = expert_N.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor ends_E = at::bincount(expert_N, {}, f.shape.experts).cumsum(0).to(at::kInt);
  const Tensor token_N = order_N.floor_divide(f.shape.k), rows_ND = f.x_TD.index_select(0, token_N);
  const Tensor w_in = f.bank->parameters()[0].tensor, w_out = f.bank->parameters()[1].tensor;
  const Tensor hidden_NF = at::gelu(at::_grouped_mm(rows_ND, w_in.transpose(1, 2), ends_E));
  const Tensor out_ND = at::_grouped_mm(hidden_NF, w_out.transpose(1, 2), ends_E);
  const Tensor gate_N1 = gate_TK.flatten().index_select(0, order_N).unsqueeze(1);
  return at::zeros_like(f.x_TD).index_add(0, token_N, out_ND.mul(gate_N1));
}

template <class Weights>
Tensor looped_output(const Fixture& f, const Weights& in, const Weights& out) {
  const auto [gate_TK, choice_TK] = plain_choices(f);
  Tensor y_TD = at::zeros_like(f.x_TD);
  for (int64_t e = 0; e < f.shape.experts; ++e) {
    const std::vector<Tensor> where = at::where(choice_TK.eq(e));
    if (where[0].numel() == 0) continue;
    const Tensor rows = f.x_TD.index_select(0, where[0]);
    const Tensor done = at::linear(at::gelu(at::linear(rows, in[static_cast<size_t>(e)])), out[static_cast<size_t>(e)]);
    y_TD = y_TD.index_add(0, where[0], done.mul(at::index(gate_TK, {where[0], where[1]}).unsqueeze(1)));
  }
  return y_TD;
}

Tensor where_output(const Fixture& f) { return looped_output(f, f.own_in_E, f.own_out_E); }

Tensor where_stacked_output(const Fixture& f) {
  return looped_output(f, f.bank->parameters()[0].tensor, f.bank->parameters()[1].tensor);
}

// Masks of T·E·C elements: what this project never makes.
Tensor einsum_output(const Fixture& f) {
  const auto [gate_TK, choice_TK] = plain_choices(f);
  const int64_t capacity = f.shape.rows * f.shape.k * 5 / (4 * f.shape.experts);
  const Tensor mask_TE = at::one_hot(choice_TK, f.shape.experts).sum(1), place_TE = mask_TE.cumsum(0).mul(mask_TE).sub(1);
  const Tensor fits_TE = place_TE.ge(0).logical_and(place_TE.lt(capacity));
  const Tensor dispatch_TEC = at::one_hot(place_TE.clamp(0, capacity - 1), capacity).mul(fits_TE.unsqueeze(2)).to(at::kFloat);
  const Tensor gate_TE = at::zeros(mask_TE.sizes()).scatter(1, choice_TK, gate_TK);
  const Tensor w_in = f.bank->parameters()[0].tensor, w_out = f.bank->parameters()[1].tensor;
  const Tensor rows_ECD = at::einsum("tec,td->ecd", {dispatch_TEC, f.x_TD});
  const Tensor out_ECD = at::gelu(rows_ECD.bmm(w_in.transpose(1, 2))).bmm(w_out.transpose(1, 2));
  return at::einsum("tec,ecd->td", {dispatch_TEC.mul(gate_TE.unsqueeze(2)), out_ECD});
}

// Without autograd, and with its result thrown away: nothing that multiplies these rows by the library can be cheaper.
struct BareProducts {
  std::vector<Tensor> hidden, activated, outputs;

  void forward(const Fixture& f) {
    const int64_t* offset = f.plan.offsets_E1.const_data_ptr<int64_t>();
    for (int64_t e = 0; e < f.shape.experts; ++e) {
      const Tensor rows = f.rows_ND.slice(0, offset[e], offset[e + 1]);
      hidden.push_back(rows.mm(f.w_in[static_cast<size_t>(e)].t()));
      activated.push_back(at::gelu(hidden.back()));
      outputs.push_back(activated.back().mm(f.w_out[static_cast<size_t>(e)].t()));
    }
  }

  std::vector<Tensor> backward(const Fixture& f) const {
    const int64_t* offset = f.plan.offsets_E1.const_data_ptr<int64_t>();
    std::vector<Tensor> grads;
    for (size_t e = 0; e < activated.size(); ++e) {
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
void check_answers(const Fixture& f) {
  layer_output(f).backward(f.grad_y_TD);
  const Tensor grad_w_in = f.bank->parameters()[0].tensor.grad().clone(), grad_x = f.x_TD.grad().clone();
  f.zero_grads();
  plain_output(f).backward(f.grad_y_TD);
  check_close(f.x_TD.grad(), grad_x, "gradient of the plain way");
  check_close(f.bank->parameters()[0].tensor.grad(), grad_w_in, "weights' gradient of the plain way");
  f.zero_grads();
  const at::NoGradGuard no_grad;
  BareProducts bare;
  bare.forward(f);
  check_close(bare.backward(f)[1], grad_w_in[0], "bare w_in");
  check_close(combine_rows(at::cat(bare.outputs), f.plan), layer_output(f), "bare");
  check_close(plain_output(f), layer_output(f), "plain");
  check_close(where_output(f), layer_output(f), "where");
  check_close(where_stacked_output(f), layer_output(f), "where on stacked weights");
}

// Made and checked when the first of its lines runs: a filter leaves most of them out.
class LazyFixture {
 public:
  explicit LazyFixture(Shape shape_) : shape(std::move(shape_)) {}
  const Fixture& operator*() const {
    if (made_) return *made_;
    const at::AutoGradMode graph(true);
    made_ = std::make_unique<Fixture>(shape);
    at::set_num_threads(1);
    check_answers(*made_);
    return *made_;
  }
  const Shape shape;

 private:
  mutable std::unique_ptr<Fixture> made_;
};
using FixturePtr = std::shared_ptr<const LazyFixture>;

using Output = Tensor (*)(const Fixture&);

void forward_once(const FixturePtr& f, Output output) {
  const at::NoGradGuard no_grad;
  benchmark::DoNotOptimize(output(**f));
}

void both_once(const FixturePtr& f, Output output) {
  output(**f).backward((**f).grad_y_TD);
  (**f).zero_grads();
}

void bare_once(const FixturePtr& f, bool backward) {
  const at::NoGradGuard no_grad;
  BareProducts bare;
  bare.forward(**f);
  if (backward) benchmark::DoNotOptimize(bare.backward(**f));
}

struct Lines {
  Suite& suite;
  FixturePtr f;
  int threads;
  bool keep;
  std::string pass;

  std::string name(const std::string& what) const {
    return fmt::format("{}/{}/{}{}/threads{}", what, pass, f->shape.name(), keep ? "" : "/returned", threads);
  }
  void add(const std::string& what, std::function<void()> work, int repetitions = 7) const {
    const double scale = pass == "fwd" ? 1 : 3;
    const Shape& s = f->shape;
    suite.add(Line{.name = name(what), .work = std::move(work), .threads = threads, .keep_memory = keep,
                   .repetitions = repetitions,
                   .counters = {{"flops", scale * s.flops()}, {"bytes", s.minimal_bytes()},
                                {"rows_per_expert", static_cast<double>(s.rows_per_expert())}}});
  }
  void add_output(const std::string& what, Output output, int repetitions = 7) const {
    const FixturePtr shared = f;
    if (pass == "fwd") add(what, [=] { forward_once(shared, output); }, repetitions);
    else add(what, [=] { both_once(shared, output); }, repetitions);
  }
  void ratio(const std::string& what, const std::string& numerator, const std::string& denominator, double bar,
             bool above) const {
    const std::string where = fmt::format("{} {}, {} thread{}{}: ", f->shape.name(), pass, threads, threads == 1 ? "" : "s",
                                          keep ? "" : ", memory handed back");
    suite.add(RatioRow{where + what, name(numerator), name(denominator), bar, above});
  }
};

double bare_bar(const Shape& shape) {
  if (shape.load != "even") return 0;
  return shape.rows_per_expert() >= 128 ? 1.12 : shape.rows_per_expert() == 32 ? 1.35 : 0;
}

void add_lines(const Lines& lines) {
  const FixturePtr f = lines.f;
  const Shape& s = f->shape;
  const bool backward = lines.pass != "fwd";
  lines.add_output("moe_layer", layer_output);
  lines.add_output("execute", executed_output);
  lines.add_output("dense", dense_output);
  lines.add("bare", [=] { bare_once(f, backward); });
  lines.ratio("execution over bare products", "execute", "bare", bare_bar(s), false);
  lines.ratio("layer over bare products", "moe_layer", "bare", 0, false);
  lines.ratio("layer over the dense layer", "moe_layer", "dense", 0, false);
  lines.add_output("plain", plain_output);
  lines.ratio("the plain way over the layer", "plain", "moe_layer", s.experts >= 256 ? 1.4 : s.experts >= 8 ? 1.1 : 0, true);
  if (s.experts == 64 && s.load == "even" && s.k == 2 && lines.keep) {
    lines.add_output("where", where_output, 3);
    lines.add_output("where_stacked", where_stacked_output, 3);
    lines.ratio("the where loop over the layer", "where", "moe_layer", backward ? 5 : 2, true);
    lines.ratio("the where loop on stacked weights over the layer", "where_stacked", "moe_layer", 0, true);
  }
  if (s.experts == 8 && s.k == 2 && s.load == "even" && lines.keep) {
    lines.add_output("einsum", einsum_output, 3);
    lines.ratio("capacity einsum over the layer", "einsum", "moe_layer", 0, true);
  }
}

// x was there before the pass, so it is in neither number.
void add_peak(Suite& suite, const Shape& shape) {
  suite.add(RatioRow{.what = shape.name() + " fwd_bwd: peak bytes over s·(kTf + y + dx + parameter gradients)",
                     .numerator = fmt::format("execute/fwd_bwd/{}/threads1", shape.name()), .denominator = {}, .bar = 1.15,
                     .above = false, .scale = 1 / shape.minimal_bytes(), .of_peaks = true});
}

void add_shape(Suite& suite, const Shape& shape) {
  const auto f = std::make_shared<const LazyFixture>(shape);
  for (const char* pass : {"fwd", "fwd_bwd"}) {
    for (const int threads : {1, 2}) add_lines({suite, f, threads, true, pass});
    add_lines({suite, f, 1, false, pass});
  }
}

// Routing and moving rows as a part of the layer: what is left of it without the experts' products.
void add_share(Suite& suite, const Shape& shape, double bar) {
  const std::string tail = fmt::format("fwd_bwd/{}/threads1", shape.name());
  suite.add(RatioRow{shape.name() + " fwd_bwd, 1 thread: router, dispatch and combine, share of the layer (1 − bare/layer)",
                     "bare/" + tail, "moe_layer/" + tail, bar, false, 1, /*from_one=*/true});
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  const Shape coarse{4096, 256, 1024, 8, 2}, many{4096, 256, 1024, 64, 2}, fine{4096, 512, 256, 64, 8};
  for (const Shape& shape : {coarse, many, fine}) {
    add_shape(suite, shape);
    Shape uneven = shape;
    uneven.load = "zipf";
    add_shape(suite, uneven);
  }
  for (const int64_t experts : {8, 64}) add_shape(suite, {4096, 256, 1024, experts, 1});
  add_shape(suite, {4096, 256, 1024, 64, 1, "one"});
  add_shape(suite, {1024, 64, 256, 16, 2});
  add_shape(suite, {4096, 256, 128, 256, 8});
  add_shape(suite, {1024, 256, 128, 256, 8});
  add_share(suite, coarse, 0.15);
  add_share(suite, fine, 0.30);
  add_peak(suite, many);
  add_peak(suite, fine);
  return suite.run(argc, argv);
}
