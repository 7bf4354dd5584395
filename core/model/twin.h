// Dense layers: the plain ones of blocks without experts, and the twin of a layer of experts.
#pragma once

#include "core/config.h"
#include "core/model/block.h"

#include <string>

namespace moelab {

// One expert of the given hidden width; `activation` "" keeps what `spec.options` says.
DenseSettings dense_expert(const std::string& name, ExpertSpec spec, int64_t width, const std::string& activation = "");

// The dense layer that has as many parameters as a row of `layer` uses ("dense_active") or as all its experts hold
// ("dense_total"), shared experts included, router not. Refused at its place where no such number exists.
DenseSettings dense_twin(const Table& tables, const LayerSettings& layer, const std::string& twin);

}  // namespace moelab
