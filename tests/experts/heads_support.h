// Attention whose heads are experts, from one line of text, with random parameters; its output and gradients.
#pragma once

#include "core/config.h"
#include "core/model/routed_attention.h"
#include "tests/support/sparse_cases.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>

namespace moelab::testing {

constexpr int64_t kWidth = 6, kExperts = 4;

struct HeadCase {
  std::string style = "moa";
  std::string tables = "";  // [moe.router]
  std::string expert = "";  // more of [moe.expert]
  bool causal = true;
  bool rotary = true;
  int64_t heads = 2;  // of the model: a head's size is 6 / heads
  int64_t experts = kExperts;
  std::string execution = "auto";
};

inline std::shared_ptr<RoutedAttention> attention_of(const HeadCase& at) {
  const std::string text = "[moe]\nexecution = \"" + at.execution + "\"\nexperts = " + std::to_string(at.experts) + "\n" +
                           at.tables + "\n";
  const std::string head = "[moe.expert]\nname = \"attention_head\"\nstyle = \"" + at.style + "\"\n" + at.expert;
  AttentionPlace place;
  place.path = "attention";
  place.attention.width = kWidth;
  place.attention.heads = at.heads;
  place.attention.causal = at.causal;
  place.attention.rotary = at.rotary;
  place.layer = read_layer(parse_config(text + head, "heads.toml"), kWidth, 0, 0, at::kDouble, random_key(3, "heads"));
  const auto attention = Registry<ExpertEntry>::instance().find("attention_head").make_attention(place);
  std::mt19937_64 draw(4);
  const at::NoGradGuard no_grad;
  for (const NamedTensor& entry : attention->parameters())
    entry.tensor.copy_(random_leaf(draw, entry.tensor.sizes().vec(), at::kDouble, false));
  return attention;
}

inline Tensor head_tensor(const Module& module, const std::string& name) {
  for (const NamedTensor& entry : module.parameters())
    if (entry.name == name) return entry.tensor;
  FAIL("no parameter " << name);
  return {};
}

// y, its gradients by x and by every parameter, and what was decided.
struct HeadOutcome {
  std::vector<Tensor> values;
  std::vector<LayerOutput> outs;
};

inline std::vector<Tensor> with_gradients(const RoutedAttention& attention, const RouteInput& in, const Tensor& y_TD,
                                          const Tensor& grad_TD) {
  std::vector<Tensor> leaves{in.x_TD}, all{y_TD.detach()};
  for (const NamedTensor& entry : attention.parameters()) leaves.push_back(entry.tensor);
  for (const Tensor& leaf : leaves) leaf.mutable_grad() = Tensor();
  if (y_TD.requires_grad()) y_TD.backward(grad_TD, /*retain_graph=*/true);
  for (const Tensor& leaf : leaves) all.push_back(leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf));
  return all;
}

inline HeadOutcome head_outcome(const RoutedAttention& attention, const RouteInput& in, const Tensor& grad_TD,
                                const std::vector<Assignment>& forced = {}) {
  std::vector<SiteShare> shares;
  for (const Assignment& assignment : forced) shares.push_back({.forced = &assignment});
  SiteWalk walk(in, std::move(shares));
  const Tensor y_TD = attention.forward(in.x_TD, walk, nullptr);
  HeadOutcome outcome{with_gradients(attention, in, y_TD, grad_TD), walk.take()};
  REQUIRE(outcome.outs.size() == attention.sites().size());
  return outcome;
}

}  // namespace moelab::testing
