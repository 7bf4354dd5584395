#include "tests/support/bfloat_bounds.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace moelab::testing {
namespace {

constexpr double kUnit = 0x1p-9, kFloatUnit = 0x1p-20;
constexpr int kStored = 2;  // a product: stored, and rounded again where a bias or another block is added

Bounded exact(const Tensor& value) { return {value.detach().to(at::kDouble), at::zeros(value.sizes(), at::kDouble)}; }
Tensor reach(const Bounded& a) { return a.value.abs().add(a.error); }

// magnitude: what |operands| at their farthest give; sure: what |values| give.
Bounded bounded(const Tensor& value, const Tensor& magnitude, const Tensor& sure, int roundings) {
  return {value, magnitude.mul(1 + roundings * kUnit + kFloatUnit).sub(sure)};
}
Bounded product(const Bounded& a, const Bounded& b, int roundings = kStored) {
  return bounded(a.value.matmul(b.value), reach(a).matmul(reach(b)), a.value.abs().matmul(b.value.abs()), roundings);
}
Bounded times(const Bounded& a, const Bounded& b, int roundings = 1) {
  return bounded(a.value.mul(b.value), reach(a).mul(reach(b)), a.value.abs().mul(b.value.abs()), roundings);
}
Bounded sum(const Bounded& a, const Bounded& b, int roundings = 1) {
  return {a.value.add(b.value), a.error.add(b.error).add(reach(a).add(reach(b)), roundings * kUnit)};
}
Bounded column_sums(const Bounded& a) { return {a.value.sum(0), a.error.sum(0).add(reach(a).sum(0), kStored * kUnit)}; }
Bounded turned(const Bounded& a) { return {a.value.t(), a.error.t()}; }
Bounded rows(const Bounded& a, int64_t first, int64_t count) {
  return {a.value.narrow(0, first, count), a.error.narrow(0, first, count)};
}
Bounded joined(const std::vector<Bounded>& parts, bool stacked) {
  std::vector<Tensor> values, errors;
  for (const Bounded& part : parts) values.push_back(part.value), errors.push_back(part.error);
  return stacked ? Bounded{at::stack(values), at::stack(errors)} : Bounded{at::cat(values), at::cat(errors)};
}

// An activation with the largest sizes of its first and second derivatives anywhere (rounded up).
struct Curve {
  Tensor value, slope;
  double most_slope, most_bend;
};
Curve curve_of(const std::string& activation, const Tensor& z) {
  const at::AutoGradMode graph(true);
  const Tensor at_z = z.detach().requires_grad_();
  const Tensor value = activation == "relu"        ? at::relu(at_z)
                       : activation == "gelu"      ? at::gelu(at_z)
                       : activation == "gelu_tanh" ? at::gelu(at_z, "tanh")
                                                   : at::silu(at_z);
  value.sum().backward();
  const double most_bend = activation == "relu" ? 0 : activation == "swiglu" ? 0.5 : 0.81;
  return {value.detach(), at_z.grad(), activation == "relu" ? 1.0 : 1.13, most_bend};
}
Bounded activated(const std::string& activation, const Bounded& z) {
  const Curve curve = curve_of(activation, z.value);
  const Tensor moved = z.error.mul(curve.most_slope);
  return {curve.value, moved.add(curve.value.abs().add(moved), kUnit).add(reach(z), kFloatUnit)};
}
// The slope of ReLU is anybody's where rounding may carry the number over zero.
Bounded slope_of(const std::string& activation, const Bounded& z) {
  const Curve curve = curve_of(activation, z.value);
  const Tensor over = activation == "relu" ? z.value.abs().le(z.error).to(at::kDouble) : z.error.mul(curve.most_bend);
  return {curve.slope, over.add(reach(z).add(1), kFloatUnit)};
}

// One expert's way there and back. parameters: w, b of each map.
struct FfnBounds {
  Bounded output, grad_x;
  std::vector<Bounded> grads;
};

Bounded linear(const Bounded& x, const Bounded& weight, const Bounded& bias) {
  return sum(product(x, turned(weight), 1), {bias.value.unsqueeze(0), bias.error.unsqueeze(0)});
}

struct FfnWay {
  const std::string& activation;
  const std::vector<Bounded>& p;
  Bounded x, z, up, hidden;
  bool gated() const { return activation == "swiglu"; }

  FfnWay(const std::string& name, const std::vector<Bounded>& parameters, const Bounded& input)
      : activation(name), p(parameters), x(input), z(linear(input, p[0], p[1])), hidden(activated(name, z)) {
    if (gated()) up = linear(x, p[2], p[3]), hidden = times(hidden, up);
  }

  Bounded output() const { return linear(hidden, p[p.size() - 2], p.back()); }

  FfnBounds back(const Bounded& grad) const {
    const Bounded grad_hidden = product(grad, p[p.size() - 2]);
    const Bounded inner = gated() ? times(grad_hidden, up) : grad_hidden;
    const Bounded grad_z = times(inner, slope_of(activation, z));
    FfnBounds out{
        .output = output(), .grad_x = product(grad_z, p[0]), .grads = {product(turned(grad_z), x), column_sums(grad_z)}};
    if (gated()) {
      const Bounded grad_up = times(grad_hidden, activated(activation, z));
      out.grads.insert(out.grads.end(), {product(turned(grad_up), x), column_sums(grad_up)});
      out.grad_x = sum(out.grad_x, product(grad_up, p[2]));
    }
    out.grads.insert(out.grads.end(), {product(turned(grad), hidden), column_sums(grad)});
    return out;
  }
};

// Slots [first, first + count) run through one mixture of experts.
struct Span {
  size_t mixture;
  int64_t first, count;
};

struct WholeBounds {
  Bounded y, grad_x, grad_read_TJ, grad_write_TJ;
  std::vector<std::vector<Bounded>> grads;  // of each mixture's parameters
};

// Y = C·F(Dᵀ·X) and the way back.
WholeBounds whole(const Bounded& read_TJ, const Bounded& write_TJ, const std::vector<Span>& spans,
                  const std::vector<std::vector<Bounded>>& mixtures, const std::string& activation, const Bounded& x,
                  const Bounded& grad_y) {
  const Bounded slots_JD = product(turned(read_TJ), x), grad_JD = product(turned(write_TJ), grad_y);
  std::vector<Bounded> outputs, grad_slots;
  WholeBounds all;
  all.grads.resize(mixtures.size());
  for (const Span& span : spans) {
    const FfnWay way(activation, mixtures[span.mixture], rows(slots_JD, span.first, span.count));
    const FfnBounds one = way.back(rows(grad_JD, span.first, span.count));
    outputs.push_back(one.output), grad_slots.push_back(one.grad_x);
    std::vector<Bounded>& grads = all.grads[span.mixture];
    if (grads.empty()) grads = one.grads;
    else
      for (size_t i = 0; i < grads.size(); ++i) grads[i] = sum(grads[i], one.grads[i]);
  }
  const Bounded output_JD = joined(outputs, false), grad_slots_JD = joined(grad_slots, false);
  all.y = product(write_TJ, output_JD);
  all.grad_x = product(read_TJ, grad_slots_JD);
  all.grad_write_TJ = product(grad_y, turned(output_JD));
  all.grad_read_TJ = product(x, turned(grad_slots_JD));
  return all;
}

std::vector<std::vector<Bounded>> experts_of(const ExpertBank& bank) {
  std::vector<std::vector<Bounded>> all(static_cast<size_t>(bank.experts()));
  for (int64_t e = 0; e < bank.experts(); ++e)
    for (const Tensor& parameter : bank.parameters_of(e)) all[static_cast<size_t>(e)].push_back(exact(parameter));
  return all;
}

std::vector<Bounded> stacked(const std::vector<std::vector<Bounded>>& experts) {
  std::vector<Bounded> all;
  for (size_t p = 0; p < experts.front().size(); ++p) {
    std::vector<Bounded> each;
    for (const auto& expert : experts) each.push_back(expert[p]);
    all.push_back(joined(each, true));
  }
  return all;
}

std::vector<Bounded> in_order(const WholeBounds& all, std::vector<Bounded> leaves, const std::vector<Bounded>& parameters) {
  std::vector<Bounded> order{all.y};
  order.insert(order.end(), leaves.begin(), leaves.end());
  order.insert(order.end(), parameters.begin(), parameters.end());
  order.push_back(all.grad_x);
  return order;
}

std::vector<Bounded> sparse_bounds(const SparsePlan& plan, const ExpertBank& bank, const std::string& activation,
                                   const Bounded& x, const Bounded& grad_y) {
  const Tensor read_TJ = at::arange(plan.rows, at::kLong).unsqueeze(1).eq(plan.token_N.unsqueeze(0)).to(at::kDouble);
  const auto* offset = plan.offsets_E1.const_data_ptr<int64_t>();
  std::vector<Span> spans;
  for (int64_t e = 0; e < plan.experts; ++e) spans.push_back({static_cast<size_t>(e), offset[e], offset[e + 1] - offset[e]});
  const WholeBounds all = whole(exact(read_TJ), exact(read_TJ.mul(plan.gate_N)), spans, experts_of(bank), activation, x, grad_y);
  const auto of_pairs = [&](const Tensor& grad_TJ) { return grad_TJ.mul(read_TJ).sum(0); };
  const Bounded grad_gate_N{of_pairs(all.grad_write_TJ.value), of_pairs(all.grad_write_TJ.error)};
  return in_order(all, {grad_gate_N}, stacked(all.grads));
}

// p ∘ (g − ⟨p, g⟩ along `dim`), in float.
Bounded softmax_back(const Bounded& p, const Bounded& g, int64_t dim) {
  const Bounded each = times(p, g, 0);
  const Bounded mean{each.value.sum(dim, true), each.error.sum(dim, true)};
  return times(p, {g.value.sub(mean.value), g.error.add(mean.error)}, 0);
}

std::vector<Bounded> soft_bounds(const SoftPlan& plan, const ExpertBank& bank, const std::string& activation, const Bounded& x,
                                 const Bounded& grad_y) {
  const int64_t tokens = x.value.size(0), slots = plan.experts * plan.slots_per_expert, present = plan.key_SD.size(0);
  std::vector<Tensor> reads, writes, members;
  std::vector<Span> spans;
  for (int64_t b = 0; b < plan.sequences; ++b) {
    const SoftMatrices one = soft_matrices(plan, b);
    const auto spread = [&](const Tensor& of_MS) {
      return at::zeros({tokens, slots}, at::kDouble).index_copy(0, one.row_M, of_MS.detach());
    };
    reads.push_back(spread(one.dispatch_MS)), writes.push_back(spread(one.combine_MS)), members.push_back(one.row_M);
    for (int64_t e = 0; e < plan.experts; ++e)
      spans.push_back({static_cast<size_t>(e), b * slots + e * plan.slots_per_expert, plan.slots_per_expert});
  }
  const auto in_float = [](const std::vector<Tensor>& parts) {  // what float makes of softmax of logits of some units
    const Tensor value = at::cat(parts, 1);
    return Bounded{value, value.mul(16 * kFloatUnit)};
  };
  const Bounded read_TJ = in_float(reads), write_TJ = in_float(writes);
  const WholeBounds all = whole(read_TJ, write_TJ, spans, experts_of(bank), activation, x, grad_y);
  Bounded key = exact(at::zeros_like(plan.key_SD)), scale = exact(at::zeros({1}, at::kDouble)),
          query = exact(at::zeros_like(plan.query_TD));
  for (int64_t b = 0; b < plan.sequences; ++b) {
    const Tensor& row_M = members[static_cast<size_t>(b)];
    const auto part = [&](const Bounded& of_TJ) {
      const auto cut = [&](const Tensor& t) { return t.narrow(1, b * slots, present).index_select(0, row_M); };
      return Bounded{cut(of_TJ.value), cut(of_TJ.error)};
    };
    const auto back = [&](SlotWeights mode, const Bounded& weight, const Bounded& grad, int64_t dim) {
      return mode == SlotWeights::kSoft ? softmax_back(part(weight), part(grad), dim)
                                        : exact(at::zeros({row_M.numel(), present}));
    };
    const Bounded logits = sum(back(plan.dispatch, read_TJ, all.grad_read_TJ, 0),
                               back(plan.combine, write_TJ, all.grad_write_TJ, 1), 0);
    const Bounded q = exact(plan.query_TD.index_select(0, row_M)), k = exact(plan.key_SD), s = exact(plan.scale);
    const Bounded toward = product(logits, k, 0), at_scale = times(toward, q, 0);
    key = sum(key, times(product(turned(logits), q, 0), s, 0), 0);
    scale = sum(scale, {at_scale.value.sum().view({1}), at_scale.error.sum().view({1})}, 0);
    const Bounded grad_q = times(toward, s, 0);
    query = {query.value.index_copy(0, row_M, grad_q.value), query.error.index_copy(0, row_M, grad_q.error)};
  }
  return in_order(all, {key, scale, query}, stacked(all.grads));
}

std::vector<Bounded> merge_bounds(const MergePlan& plan, const ExpertBank& bank, const std::string& activation, const Bounded& x,
                                  const Bounded& grad_y) {
  const int64_t groups = plan.alpha_GE.size(0), copies = kStored + 1 + static_cast<int>(groups);  // sums over groups are stored
  const Bounded alpha{plan.alpha_GE.detach().to(at::kDouble), plan.alpha_GE.detach().to(at::kDouble).mul(kUnit)};
  const std::vector<Bounded> parameters = stacked(experts_of(bank));
  std::vector<std::vector<Bounded>> merged(static_cast<size_t>(groups));
  const auto flat = [](const Bounded& p) { return Bounded{p.value.flatten(1), p.error.flatten(1)}; };
  for (const Bounded& p : parameters) {
    const Bounded all_GP = product(alpha, flat(p));
    for (int64_t g = 0; g < groups; ++g) {
      const auto shaped = [&](const Tensor& t) { return t.select(0, g).view(p.value.sizes().slice(1)); };
      merged[static_cast<size_t>(g)].push_back({shaped(all_GP.value), shaped(all_GP.error)});
    }
  }
  const Tensor order_T = plan.group_of_token_T.argsort(/*stable=*/true, 0, false);
  const Tensor one_TJ = at::eye(x.value.size(0), at::kDouble).index_select(1, order_T);
  std::vector<Span> spans;
  for (int64_t g = 0, first = 0; g < groups; ++g) {
    const int64_t count = plan.group_of_token_T.eq(g).sum().item<int64_t>();
    spans.push_back({static_cast<size_t>(g), first, count}), first += count;
  }
  const WholeBounds all = whole(exact(one_TJ), exact(one_TJ), spans, merged, activation, x, grad_y);
  const std::vector<Bounded> grad_merged = stacked(all.grads);
  std::vector<Bounded> grads;
  Bounded grad_alpha = exact(at::zeros_like(plan.alpha_GE));
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Bounded grad_EP = product(turned(alpha), flat(grad_merged[p]), static_cast<int>(copies));
    grads.push_back({grad_EP.value.view(parameters[p].value.sizes()), grad_EP.error.view(parameters[p].value.sizes())});
    grad_alpha = sum(grad_alpha, product(flat(grad_merged[p]), turned(flat(parameters[p]))));
  }
  return in_order(all, {grad_alpha}, grads);
}

}  // namespace

std::vector<Bounded> bfloat_bounds(const Plan& plan, const ExpertBank& bank, const std::string& activation, const Tensor& x_TD,
                                   const Tensor& grad_y_TD) {
  const at::NoGradGuard no_grad;
  const Bounded x = exact(x_TD), grad_y = exact(grad_y_TD);
  if (const auto* soft = std::get_if<SoftPlan>(&plan)) return soft_bounds(*soft, bank, activation, x, grad_y);
  if (const auto* merge = std::get_if<MergePlan>(&plan)) return merge_bounds(*merge, bank, activation, x, grad_y);
  return sparse_bounds(std::get<SparsePlan>(plan), bank, activation, x, grad_y);
}

}  // namespace moelab::testing
