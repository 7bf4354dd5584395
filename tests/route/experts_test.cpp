// `moelab route` with a frozen base and with attention heads, against loops over rows in double.
#include "route_support.h"
#include "tests/support/compare.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>
#include <nlohmann/json.hpp>

#include "core/io/safetensors.h"

using namespace moelab;
using namespace moelab::testing;

namespace {

Tensor drawn(std::vector<int64_t> shape) { return at::randn(shape, at::kDouble); }

RouteRun run_experts(const std::string& toml, const std::vector<NamedTensor>& in, const std::string& arguments) {
  const RouteFolder folder;
  folder.write("exp.toml", toml);
  write_safetensors(folder.file("in.safetensors"), in);
  return folder.run(arguments);
}

// Σ(y·grad_y) of Σ_e gate[t,e] over softmax gates of the two largest logits.
Tensor top2_gates(const Tensor& x_TD, const Tensor& weight_ED) {
  const Tensor p_TE = x_TD.matmul(weight_ED.t()).softmax(1);
  const Tensor second = std::get<0>(p_TE.topk(2, 1)).narrow(1, 1, 1).detach();
  return p_TE * p_TE.detach().ge(second).to(at::kDouble);
}

}  // namespace

TEST_CASE("route: low-rank experts on a frozen linear base, values and gradients") {
  at::manual_seed(3);
  const Tensor x = drawn({6, 4}), grad_y = drawn({6, 3}), router = drawn({3, 4}), base = drawn({3, 4}), a = drawn({3, 2, 4}),
               b = drawn({3, 3, 2});
  const RouteRun run = run_experts(
      "[moe]\nexperts = 3\nlosses = \"none\"\n[moe.router]\nk = 2\n[moe.expert]\nname = \"lora\"\ntargets = \"linear\"\nwidth = "
      "3\nrank = 2\nalpha = 6.0\n",
      {{"x", x}, {"grad_y", grad_y}, {"router.weight", router}, {"base.weight", base}, {"experts.a", a}, {"experts.b", b}},
      "--grad");
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  const std::vector<Tensor> leaves{x.clone().requires_grad_(), router.clone().requires_grad_(), a.clone().requires_grad_(),
                                   b.clone().requires_grad_()};
  const Tensor gates_TE = top2_gates(leaves[0], leaves[1]);
  std::vector<Tensor> rows;
  for (int64_t t = 0; t < 6; ++t) {
    Tensor y = base.mv(leaves[0][t]);
    for (int64_t e = 0; e < 3; ++e) y = y + gates_TE[t][e] * 3.0 * leaves[3][e].mv(leaves[2][e].mv(leaves[0][t]));
    rows.push_back(y);
  }
  const Tensor y_TO = at::stack(rows);
  (y_TO * grad_y).sum().backward();
  CHECK(relative_error(run.tensors.at("y"), y_TO.detach()) < 1e-10);
  const std::vector<std::string> names{"grad.x", "grad.router.weight", "grad.experts.a", "grad.experts.b"};
  for (size_t i = 0; i < names.size(); ++i) CHECK(relative_error(run.tensors.at(names[i]), leaves[i].grad()) < 1e-10);
  CHECK(at::equal(run.tensors.at("grad.base.weight"), at::zeros({3, 4}, at::kDouble)));  // frozen
  CHECK(at::equal(run.tensors.at("base.weight"), base));
}

TEST_CASE("route: a feed-forward base comes with or without its expert axis, and is y where B is 0") {
  at::manual_seed(4);
  const Tensor x = drawn({5, 4}), w_in = drawn({6, 4}), w_out = drawn({4, 6});
  const RouteRun run = run_experts("[moe]\nexperts = 3\n[moe.expert]\nname = \"lora\"\nwidth = 6\nrank = 2\n",
                                   {{"x", x}, {"base.w_in", w_in}, {"base.w_out", w_out}}, "");
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  CHECK(relative_error(run.tensors.at("y"), x.matmul(w_in.t()).relu().matmul(w_out.t())) < 1e-12);
  CHECK(run.tensors.at("base.w_in").sizes() == w_in.sizes());
  CHECK(run.tensors.at("experts.w_out_a").sizes() == at::IntArrayRef{3, 2, 6});
}

TEST_CASE("route: attention heads stay within interleaved sequences, without padding, causal by position") {
  at::manual_seed(5);
  const Tensor x = drawn({7, 4}), router = drawn({3, 4}), w_q = drawn({3, 2, 4}), w_o = drawn({3, 4, 2}), w_k = drawn({2, 4}),
               w_v = drawn({2, 4});
  const Tensor sequence = at::tensor({5, 9, 5, 9, 5, 5, 9}, at::kLong), padding = at::arange(7).eq(5);
  const RouteRun run =
      run_experts("[attention]\nexperts = 3\nlosses = \"none\"\n[attention.router]\nk = 2\n[attention.expert]\nhead_size = 2\n",
                  {{"x", x},
                   {"sequence_ids", sequence},
                   {"padding", padding},
                   {"grad_y", drawn({7, 4})},
                   {"router.weight", router},
                   {"experts.w_q", w_q},
                   {"experts.w_o", w_o},
                   {"shared.w_k", w_k},
                   {"shared.w_v", w_v}},
                  "--grad");
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  const Tensor gates_TE = top2_gates(x, router);
  Tensor y_TD = at::zeros({7, 4}, at::kDouble);
  for (int64_t t = 0; t < 7; ++t)
    for (int64_t e = 0; e < 3 && t != 5; ++e) {
      std::vector<Tensor> scores, values;
      for (int64_t s = 0; s <= t; ++s) {
        if (s == 5 || sequence[s].item<int64_t>() != sequence[t].item<int64_t>()) continue;
        scores.push_back(w_q[e].mv(x[t]).dot(w_k.mv(x[s])) / std::sqrt(2.0));
        values.push_back(w_v.mv(x[s]));
      }
      y_TD[t] += gates_TE[t][e] * w_o[e].mv(at::stack(values).t().mv(at::stack(scores).softmax(0)));
    }
  CHECK(relative_error(run.tensors.at("y"), y_TD) < 1e-10);
  CHECK(run.tensors.at("token").numel() == 12);
  CHECK(run.tensors.at("grad.shared.w_k").abs().max().item<double>() > 0);
}

TEST_CASE("route: an attention of several decisions shows each under its name, and its signature lists their tensors") {
  at::manual_seed(6);
  const std::string toml =
      "[moe]\nexperts = 2\n[moe.router]\nname = \"sigmoid_topk\"\nk = 1\n[moe.expert]\nname = \"attention_head\"\n"
      "style = \"switchhead\"\nheads = 2\nhead_size = 2\n";
  const RouteRun run = run_experts(toml, {{"x", drawn({4, 4})}}, "");
  CAPTURE(run.err);
  REQUIRE(run.code == 0);
  for (const char* name : {"value0.token", "value1.gate", "output1.expert", "output0.probe.logits", "value1.router.weight"})
    CHECK(run.tensors.contains(name));
  const RouteFolder folder;
  folder.write("exp.toml", toml);
  const RouteRun signature = folder.run_bare(folder.file("exp.toml") + " --signature");
  std::map<std::string, nlohmann::json> shapes;
  for (const auto& entry : nlohmann::json::parse(signature.out)) shapes[entry.at("name")] = entry.at("shape");
  CHECK(shapes.at("output1.experts.w_o") == nlohmann::json({2, "D", 2}));
  CHECK(shapes.at("shared.w_q") == nlohmann::json({2, 2, "D"}));
}
