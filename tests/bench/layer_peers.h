// One shape of the layer's benchmark: the same rows, weights and output gradient for every peer; moe_layer.cpp says what each is.
#pragma once

#include "bench_support.h"

#include "core/execute.h"
#include "core/ordered_blocks.h"
#include "core/select.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <tuple>

namespace moelab::bench {

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

inline std::unique_ptr<ExpertBank> bench_bank(const Shape& shape) {
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

inline Tensor random_values(const char* purpose, at::IntArrayRef sizes, double std) {
  return normal_tensor(random_key(1, purpose), sizes, std, at::kFloat);
}

// What is added to the logits, so that the experts' shares are those of the load.
inline Tensor load_bias(const Shape& shape) {
  Tensor bias_E = at::zeros({shape.experts});
  if (shape.load == "zipf") bias_E = at::arange(1, shape.experts + 1, at::kFloat).log().neg();
  if (shape.load == "one") bias_E[0] = 100;
  return bias_E;
}

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

inline Tensor layer_output(const Fixture& f) { return execute(f.route(), *f.bank, {.x_TD = f.x_TD}); }
inline Tensor executed_output(const Fixture& f) { return execute(f.plan, *f.bank, {.x_TD = f.x_TD}); }
inline Tensor dense_output(const Fixture& f) { return at::linear(at::gelu(at::linear(f.x_TD, f.dense_in_FD)), f.dense_out_DF); }

inline std::tuple<Tensor, Tensor> plain_choices(const Fixture& f) { return at::topk(f.logits().softmax(1), f.shape.k); }

// Sorted by expert with the library's own calls.
inline Tensor plain_output(const Fixture& f) {
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
inline Tensor looped_output(const Fixture& f, const Weights& in, const Weights& out) {
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

inline Tensor where_output(const Fixture& f) { return looped_output(f, f.own_in_E, f.own_out_E); }

inline Tensor where_stacked_output(const Fixture& f) {
  return looped_output(f, f.bank->parameters()[0].tensor, f.bank->parameters()[1].tensor);
}

// Masks of T·E·C elements: what this project never makes.
inline Tensor einsum_output(const Fixture& f) {
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

struct ProductsAlone {
  explicit ProductsAlone(const Fixture& f)
      : hidden_NF(at::empty({f.rows_ND.size(0), f.shape.hidden})), other_NF(at::empty_like(hidden_NF)),
        out_ND(at::empty_like(f.rows_ND)), grad_in_EFD(at::empty_like(f.bank->parameters()[0].tensor)),
        grad_out_EDF(at::empty_like(f.bank->parameters()[1].tensor)) {}

  using View = MatrixView<float>;
  static View view(const Tensor& matrix) { return {matrix.const_data_ptr<float>(), matrix.size(0), matrix.size(1)}; }
  static float* at(const Tensor& matrix) { return matrix.mutable_data_ptr<float>(); }

  // Experts are shared out to threads as the layer's blocks are.
  void once(const Fixture& f, bool backward) const {
    for_ordered_blocks(f.shape.experts, at::get_num_threads(), [&](int64_t e, int64_t) { of_expert(f, e, backward); });
  }

  void of_expert(const Fixture& f, int64_t e, bool backward) const {
    const int64_t* offset = f.plan.offsets_E1.const_data_ptr<int64_t>();
    const int64_t first = offset[e], rows = offset[e + 1] - first;
    const auto part = [&](const Tensor& all) { return all.narrow(0, first, rows); };
    const Tensor hidden = part(hidden_NF), other = part(other_NF), out = part(out_ND);
    const View x = view(part(f.rows_ND)), grad = view(part(f.grad_rows_ND));
    const View in = view(f.w_in[static_cast<size_t>(e)]), back = view(f.w_out[static_cast<size_t>(e)]);
    library_multiply(x, in.t(), at(hidden));
    library_multiply(view(hidden), back.t(), at(out));
    if (!backward) return;
    library_multiply(grad, back, at(other));
    library_multiply(grad.t(), view(hidden), at(grad_out_EDF.select(0, e)));
    library_multiply(view(other).t(), x, at(grad_in_EFD.select(0, e)));
    library_multiply(view(other), in, at(out));
  }

  Tensor hidden_NF, other_NF, out_ND, grad_in_EFD, grad_out_EDF;
};

// Each line shows once that it computes what it says.
inline void check_answers(const Fixture& f) {
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
  const ProductsAlone products(f);
  products.once(f, /*backward=*/false);
  const auto first = [&](const Tensor& all) { return all.narrow(0, 0, f.plan.offsets_E1[1].item<int64_t>()); };
  check_close(first(products.out_ND), first(f.rows_ND).mm(f.w_in[0].t()).mm(f.w_out[0].t()), "products");
  check_close(where_output(f), layer_output(f), "where");
  check_close(where_stacked_output(f), layer_output(f), "where on stacked weights");
}

}  // namespace moelab::bench
