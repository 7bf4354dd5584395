// The life of experts: what is done to one is done to all that belongs to it, its parameters and the optimiser's moments of them.
// Slots stay where they are: a bank keeps its shape, and a removed expert's slot waits for the next one.
#pragma once

#include "core/moe_layer.h"
#include "trainers/optimizer.h"

#include <vector>

namespace moelab {

// An expert's own parameters, and its rows of the router's tensors where they are asked for; frozen ones are left out.
std::vector<ExpertBank::Slice> slices_of(const Site& site, int64_t expert, bool with_router);

// Expert `to` becomes a copy of `from`. Its moments, those of its router rows too, start at zero; `with_moments` copies the
// expert's own beside it. Refused unless the two are alike.
void clone_expert(Site& site, Optimizer& optimizer, int64_t from, int64_t to, bool with_moments);

// Initial values drawn with `key`, moments of zero.
void reset_expert(Site& site, Optimizer& optimizer, int64_t expert, RandomKey key);

// Parameters and moments of zero, for good. Whether it may still be chosen is the router's mask to say; a router that takes an
// expert away for a while (DynMoE) leaves it as it was.
void remove_expert(Site& site, Optimizer& optimizer, int64_t expert);

// Expert `target` becomes Σ_e weight[e]·θ_e, its moments Σ_e weight[e]·m_e: one weight per expert, none negative, since second
// moments are squares. Experts with a weight have to be like the target.
void merge_experts(Site& site, Optimizer& optimizer, int64_t target, const std::vector<double>& weight_E);

// Expert e becomes what old_of_new[e] was, with its router rows and all moments: where the router's choice follows its rows, the
// layer's function stays the same. Permuting and permuting back is the identity, bitwise.
void permute_experts(Site& site, Optimizer& optimizer, const std::vector<int64_t>& old_of_new);

// Whether the one expert of `dense` could stand in for this one. Kinds are compared too: shapes do not tell a ReLU from a GELU.
bool fits(const ExpertBank& bank, int64_t expert, const ExpertBank& dense);

// Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert like the dense one becomes a copy of it, plus noise
// of `noise` times each parameter's own standard deviation where that is not 0; moments of zero. Returns how many took it;
// experts of other kinds stay as they are. Refused where none is like it.
int64_t upcycle(Site& site, Optimizer& optimizer, const ExpertBank& dense, double noise, RandomKey key);
int64_t upcycle(const Site& site, const ExpertBank& dense, double noise, RandomKey key);  // before there are any moments

}  // namespace moelab
