#include "trainers/surgery.h"

#include "core/error.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>

#include <fmt/format.h>

#include <algorithm>

namespace moelab {
namespace {

using Slices = std::vector<ExpertBank::Slice>;

// Parts of expert e that surgery moves: parameters first, then each one's moments. The same order for all experts of a kind.
std::vector<Tensor> parts_with_moments(const Slices& slices, const Optimizer& optimizer) {
  std::vector<Tensor> parts;
  for (const ExpertBank::Slice& slice : slices) {
    parts.push_back(slice.view());
    for (const Tensor& moment : optimizer.moments(slice)) parts.push_back(moment);
  }
  return parts;
}

void reset_moments(const Slices& slices, Optimizer& optimizer) {
  for (const ExpertBank::Slice& slice : slices) optimizer.reset_slice(slice);
}

// Trained or not: router state that is no parameter (masks, biases) moves too.
Slices router_rows(const Site& site, int64_t expert) {
  Slices rows;
  for (const Tensor& tensor : site.router->per_expert_tensors()) rows.push_back({tensor, expert});
  return rows;
}

void permute_parts(const std::vector<std::vector<Tensor>>& parts_E, const std::vector<int64_t>& old_of_new) {
  std::vector<std::vector<Tensor>> before;
  for (const std::vector<Tensor>& parts : parts_E) {
    before.emplace_back();
    for (const Tensor& part : parts) before.back().push_back(part.clone());
  }
  for (size_t e = 0; e < parts_E.size(); ++e)
    for (size_t i = 0; i < parts_E[e].size(); ++i) Tensor(parts_E[e][i]).copy_(before[static_cast<size_t>(old_of_new[e])][i]);
}

void require_weights(const Site& site, int64_t target, const std::vector<double>& weight_E) {
  if (static_cast<int64_t>(weight_E.size()) != site.bank->experts())
    usage_error(fmt::format("merge: {} weights for {} experts; give one for each", weight_E.size(), site.bank->experts()));
  for (size_t e = 0; e < weight_E.size(); ++e) {
    if (!(weight_E[e] >= 0))
      usage_error(fmt::format("merge: expert {} has weight {}; weights must not be negative", e, weight_E[e]));
    if (weight_E[e] > 0 && !site.bank->alike(static_cast<int64_t>(e), target))
      usage_error(fmt::format("merge: experts {} and {} of '{}' differ in kind or shape; give the first no weight", e, target,
                              site.bank->name()));
  }
}

void copy_with_noise(Tensor to, const Tensor& from, double noise, RandomKey key) {
  to.copy_(from);
  if (noise == 0 || from.numel() < 2) return;
  to.add_(
      normal_tensor(key, from.sizes(), noise * from.to(at::kDouble).std(/*unbiased=*/false).item<double>(), from.scalar_type()));
}

}  // namespace

std::vector<ExpertBank::Slice> slices_of(const Site& site, int64_t expert, bool with_router) {
  Slices all = site.bank->slices(expert);
  if (with_router) {
    const Slices rows = router_rows(site, expert);
    all.insert(all.end(), rows.begin(), rows.end());
  }
  std::erase_if(all, [](const ExpertBank::Slice& slice) { return !slice.stacked.requires_grad(); });
  return all;
}

void clone_expert(Site& site, Optimizer& optimizer, int64_t from, int64_t to, bool with_moments) {
  site.bank->clone_expert(from, to);
  reset_moments(slices_of(site, to, /*with_router=*/true), optimizer);
  if (!with_moments) return;
  const Slices source = slices_of(site, from, /*with_router=*/false), target = slices_of(site, to, /*with_router=*/false);
  for (size_t i = 0; i < target.size(); ++i) optimizer.copy_slice(source[i], target[i]);
}

void reset_expert(Site& site, Optimizer& optimizer, int64_t expert, RandomKey key) {
  site.bank->reset_expert(expert, key);
  reset_moments(slices_of(site, expert, /*with_router=*/true), optimizer);
}

void remove_expert(Site& site, Optimizer& optimizer, int64_t expert) {
  const at::NoGradGuard no_grad;
  for (const ExpertBank::Slice& slice : site.bank->slices(expert)) slice.view().zero_();
  reset_moments(site.bank->slices(expert), optimizer);
}

void merge_experts(Site& site, Optimizer& optimizer, int64_t target, const std::vector<double>& weight_E) {
  const at::NoGradGuard no_grad;
  require_weights(site, target, weight_E);
  const std::vector<Tensor> parts = parts_with_moments(site.bank->slices(target), optimizer);
  std::vector<Tensor> sums;
  for (const Tensor& part : parts) sums.push_back(at::zeros_like(part));
  for (size_t e = 0; e < weight_E.size(); ++e) {
    if (weight_E[e] == 0) continue;
    const std::vector<Tensor> own = parts_with_moments(site.bank->slices(static_cast<int64_t>(e)), optimizer);
    for (size_t i = 0; i < sums.size(); ++i) sums[i].add_(own[i], weight_E[e]);
  }
  for (size_t i = 0; i < parts.size(); ++i) Tensor(parts[i]).copy_(sums[i]);
}

void permute_experts(Site& site, Optimizer& optimizer, const std::vector<int64_t>& old_of_new) {
  const at::NoGradGuard no_grad;
  site.bank->permute(old_of_new);  // refuses what cannot be done before anything has moved
  std::vector<std::vector<Tensor>> beside;
  for (int64_t e = 0; e < site.bank->experts(); ++e) {
    beside.emplace_back();
    for (const ExpertBank::Slice& slice : site.bank->slices(e))
      for (const Tensor& moment : optimizer.moments(slice)) beside.back().push_back(moment);
    for (const Tensor& part : parts_with_moments(router_rows(site, e), optimizer)) beside.back().push_back(part);
  }
  permute_parts(beside, old_of_new);
}

bool fits(const ExpertBank& bank, int64_t expert, const ExpertBank& dense) {
  const std::vector<Tensor> own = bank.parameters_of(expert), other = dense.parameters_of(0);
  return bank.kind_of(expert) == dense.kind_of(0) && !own.empty() &&
         std::equal(own.begin(), own.end(), other.begin(), other.end(),
                    [](const Tensor& a, const Tensor& b) { return a.sizes() == b.sizes(); });
}

int64_t upcycle(const Site& site, const ExpertBank& dense, double noise, RandomKey key) {
  const at::NoGradGuard no_grad;
  const std::vector<Tensor> source = dense.parameters_of(0);
  int64_t taken = 0;
  for (int64_t e = 0; e < site.bank->experts(); ++e) {
    if (!fits(*site.bank, e, dense)) continue;
    const Slices own = site.bank->slices(e);
    for (size_t i = 0; i < own.size(); ++i)
      copy_with_noise(own[i].view(), source[i], noise, key.with(site.path, e).with("parameter", static_cast<int64_t>(i)));
    ++taken;
  }
  if (taken == 0)
    usage_error(
        fmt::format("upcycle: no expert of '{}' ({}) is of the dense layer's kind and shape; give them its width and activation",
                    site.path, site.bank->name()));
  return taken;
}

int64_t upcycle(Site& site, Optimizer& optimizer, const ExpertBank& dense, double noise, RandomKey key) {
  const int64_t taken = upcycle(site, dense, noise, key);
  for (int64_t e = 0; e < site.bank->experts(); ++e)
    if (fits(*site.bank, e, dense)) reset_moments(slices_of(site, e, /*with_router=*/true), optimizer);
  return taken;
}

}  // namespace moelab
