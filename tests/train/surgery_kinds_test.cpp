// The life of experts of every kind, wherever in a block they stand: parameters, moments and router rows, by plain copies.
#include "experiments/expert_compat.h"
#include "experiments/experiment.h"
#include "tests/train/train_support.h"
#include "trainers/surgery.h"

#include <catch2/catch_test_macros.hpp>

#include <algorithm>
#include <map>

using namespace moelab;

namespace {

const char* const kVectorsAround = "[model]\nname = \"mlp\"\nlayers = 1\nwidth = 32\n[data]\nname = \"clusters\"\n";
const char* const kTokensAround =
    "[model]\nlayers = 1\nwidth = 32\nheads = 2\ncontext = 16\n[data]\nname = \"markov\"\nvalidation_documents = 4\n";

// A model with such experts, and an optimiser whose moments are no zeros.
struct LivingExperts {
  explicit LivingExperts(const CompatExperts& experts)
      : experiment(load_experiment(parse_config(
            (experts.table == "attention" ? kTokensAround : kVectorsAround) + compat_tables(experts, compat_facts().front()),
            "kinds.toml"))),
        optimizer(experiment.train.optimizer, experiment.model->optimised()) {
    at::manual_seed(6);
    for (const NamedTensor& entry : optimizer.state()) entry.tensor.copy_(at::rand_like(entry.tensor));
  }

  std::map<std::string, Tensor> values() const {
    std::map<std::string, Tensor> all;
    for (const auto& list : {experiment.model->parameters(), experiment.model->buffers(), optimizer.state()})
      for (const NamedTensor& entry : list) all[entry.name] = entry.tensor.detach().clone();
    return all;
  }

  // Names of the bank's stacked parameters that hold this expert, with the slot that is its own.
  std::map<std::string, int64_t> slots_of(const Site& site, int64_t expert) const {
    std::map<std::string, int64_t> slots;
    for (const ExpertGroup& group : site.bank->groups())
      for (const NamedTensor& stacked : group.stacked)
        for (const NamedTensor& entry : experiment.model->parameters())
          if (entry.tensor.is_same(stacked.tensor) && expert >= group.first && expert < group.first + group.experts)
            slots[entry.name] = expert - group.first;
    return slots;
  }

  Experiment experiment;
  Optimizer optimizer;
};

using Values = std::map<std::string, Tensor>;

// `now` holds in slot `to` of each of the expert's tensors and moments what `before` held in slot `from`; with `moments` false
// zeros there, and with `parameters` false zeros in both.
void check_became(const LivingExperts& living, const Site& site, const Values& now, const Values& before, int64_t to,
                  int64_t from, bool parameters = true, bool moments = true) {
  const auto own = living.slots_of(site, to), source = living.slots_of(site, from);
  REQUIRE(own.size() == source.size());
  REQUIRE(own.empty() == site.bank->parameters().empty());
  for (auto a = own.begin(), b = source.begin(); a != own.end(); ++a, ++b)
    for (const std::string prefix : {"", "m.", "v."}) {
      CAPTURE(prefix, a->first, a->second, b->first, b->second);
      const Tensor is = now.at(prefix + a->first)[a->second], was = before.at(prefix + b->first)[b->second];
      const bool kept = prefix.empty() ? parameters : parameters && moments;
      CHECK(at::equal(is, kept ? was : at::zeros_like(was)));
    }
}

void check_same(const Values& now, const Values& before) {
  REQUIRE(now.size() == before.size());
  for (const auto& [name, tensor] : before) {
    CAPTURE(name);
    CHECK(at::equal(tensor, now.at(name)));
  }
}

// Two experts that may stand in for each other; equal where there are none.
std::pair<int64_t, int64_t> two_alike(const ExpertBank& bank) {
  for (int64_t a = 0; a < bank.experts(); ++a)
    for (int64_t b = a + 1; b < bank.experts(); ++b)
      if (bank.alike(a, b)) return {a, b};
  return {0, 0};
}

void check_life(const CompatExperts& experts) {
  LivingExperts living(experts);
  for (Site* site : living.experiment.model->sites()) {
    CAPTURE(experts.label, site->path);
    const auto [a, b] = two_alike(*site->bank);
    CHECK((a != b) == (experts.groups.size() == 1));  // of four kinds, none is like another
    std::vector<int64_t> swap(site->bank->experts());
    for (size_t e = 0; e < swap.size(); ++e) swap[e] = static_cast<int64_t>(e);
    std::swap(swap[a], swap[b]);

    const Values start = living.values();
    permute_experts(*site, living.optimizer, swap);
    const Values permuted = living.values();
    check_became(living, *site, permuted, start, a, b);
    check_became(living, *site, permuted, start, b, a);
    for (const Tensor& rows : site->router->per_expert_tensors())
      for (const NamedTensor& entry : living.experiment.model->parameters())
        if (entry.tensor.is_same(rows)) CHECK(at::equal(permuted.at(entry.name)[a], start.at(entry.name)[b]));
    permute_experts(*site, living.optimizer, swap);
    check_same(living.values(), start);
    if (a == b) continue;

    clone_expert(*site, living.optimizer, a, b, /*with_moments=*/true);
    check_became(living, *site, living.values(), start, b, a);
    check_became(living, *site, living.values(), start, a, a);
    reset_expert(*site, living.optimizer, b, random_key(9, "life"));
    const Values reset = living.values();
    check_became(living, *site, reset, reset, b, b, /*parameters=*/true, /*moments=*/false);

    std::vector<double> weight_E(swap.size(), 0.0);
    weight_E[a] = 1;
    merge_experts(*site, living.optimizer, b, weight_E);
    check_became(living, *site, living.values(), start, b, a);
    remove_expert(*site, living.optimizer, b);
    check_became(living, *site, living.values(), start, b, a, /*parameters=*/false);
  }
}

}  // namespace

TEST_CASE("experts of every kind and place are permuted, cloned, reset, merged and removed with their moments") {
  for (const CompatExperts& experts : compat_experts()) check_life(experts);
}
